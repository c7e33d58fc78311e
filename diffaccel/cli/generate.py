"""``diffaccel generate``: images, and a record that makes them again."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from .. import zoo
from ..errors import OptionError
from ..eval.provenance import plain, versions
from ..eval.sampler import Sampler
from ..pipelines import accelerate, resolve
from ..zoo.folders import quiet
from .reading import DTYPES, check_options, read_accel, set_scheduler
from .writing import StepBar, check_output, progress_bar, write_files

__all__ = ["generate", "load"]


def load(model: str, scheduler: str | None, device: str, dtype: str) -> Any:
    """Loads a pipeline without noise of its own, with another scheduler if one is named.

    Raises:
        DiffaccelError: If there is no such model, or it cannot have this scheduler.
    """
    pipe: Any = zoo.load_pipeline(model, DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, scheduler)
    return pipe.to(device)


def generate(
    model: str,
    conditions: list[str],
    accel: str | None,
    steps: int,
    guidance: float | None,
    seed: int,
    scheduler: str | None,
    out: Path,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[list[Path], str]:
    """Writes one PNG a condition and ``run.json``; the arguments are those of the command.

    Returns:
        The files, and what is to be said about the run.

    Raises:
        DiffaccelError: For any mistake in the arguments; nothing is written then.
    """
    check_options(device, dtype, guidance, scheduler)
    spec = None if accel is None else read_accel(accel)
    resolve([] if spec is None else spec)
    check_output(out)
    messages: list[str] = []
    with quiet(messages):
        pipe = load(model, scheduler, device, dtype)
        if spec is not None:
            accelerate(pipe, spec)
        sampler = Sampler(pipe, conditions, steps, guidance, seed)
        images = _sample(pipe, sampler)
    files: dict[str, str | bytes] = {f"{n:04d}.png": _png(image) for n, image in enumerate(images)}
    record = {
        "model": model, "conditions": conditions, "accel": accel, "steps": steps,
        "guidance": sampler.guidance, "seed": seed, "scheduler": scheduler, "device": device, "dtype": dtype,
        "images": list(files), "pipeline": type(pipe).__name__, "versions": versions(),
        "scheduler_config": {"class": type(pipe.scheduler).__name__, **dict(pipe.scheduler.config)},
        "report": sampler.reports[-1][1].to_dict() if sampler.reports else None,
    }  # fmt: skip
    files["run.json"] = json.dumps(plain(record), indent=1, allow_nan=False)
    remarks = [*([str(pipe.accel)] if sampler.reports else []), *(f"note: {text}" for text in messages)]
    return write_files(out, files), "\n".join(remarks)


def _sample(pipe: Any, sampler: Sampler) -> torch.Tensor:
    """Returns the images, with a bar that follows the pipeline's steps."""
    with progress_bar() as progress:
        task = progress.add_task(f"{sampler.count} images", total=sampler.steps)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        def bar(iterable: Any = None, total: Any = None) -> StepBar:
            return StepBar(tell, iterable, total)

        pipe.progress_bar = bar
        try:
            images = sampler().clamp(0, 1)
        finally:
            del pipe.progress_bar
    if not bool(images.isfinite().all()):
        raise OptionError("the images are not finite; use --dtype float32, or less guidance")
    return images


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil_image(image.float()).save(buffer, "PNG")
    return buffer.getvalue()

"""``diffaccel generate``: images, and a record that makes them again."""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
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

__all__ = ["check_finite", "generate", "load", "png", "record_of", "watched"]


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
    files: dict[str, str | bytes] = {f"{n:04d}.png": png(image) for n, image in enumerate(images)}
    settings = {
        "model": model, "conditions": conditions, "accel": accel, "steps": steps,
        "guidance": sampler.guidance, "seed": seed, "scheduler": scheduler, "device": device, "dtype": dtype,
    }  # fmt: skip
    report = sampler.reports[-1][1].to_dict() if sampler.reports else None
    files["run.json"] = record_of(pipe, settings, list(files), report=report)
    remarks = [*([str(pipe.accel)] if sampler.reports else []), *(f"note: {text}" for text in messages)]
    return write_files(out, files), "\n".join(remarks)


def record_of(pipe: Any, settings: Mapping[str, Any], images: list[str], **more: Any) -> str:
    """Returns the text of ``run.json``.

    Arguments:
        pipe: The pipeline.
        settings: The arguments of the command.
        images: The names of the files.
        more: Further entries.
    """
    record = {
        **settings, "images": images, "pipeline": type(pipe).__name__, "versions": versions(),
        "scheduler_config": {"class": type(pipe.scheduler).__name__, **dict(pipe.scheduler.config)}, **more,
    }  # fmt: skip
    return json.dumps(plain(record), indent=1, allow_nan=False)


def _sample(pipe: Any, sampler: Sampler) -> torch.Tensor:
    with watched(pipe, f"{sampler.count} images", sampler.steps):
        return check_finite(sampler().clamp(0, 1))


@contextlib.contextmanager
def watched(pipe: Any, what: str, steps: int) -> Iterator[None]:
    """Shows a progress bar that follows a pipeline's steps.

    Arguments:
        pipe: The pipeline.
        what: What is made.
        steps: The number of steps.
    """
    with progress_bar() as progress:
        task = progress.add_task(what, total=steps)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        def bar(iterable: Any = None, total: Any = None) -> StepBar:
            return StepBar(tell, iterable, total)

        pipe.progress_bar = bar
        try:
            yield
        finally:
            del pipe.progress_bar


def check_finite(images: torch.Tensor) -> torch.Tensor:
    """Returns the images.

    Raises:
        OptionError: If they are not finite.
    """
    if not bool(images.isfinite().all()):
        raise OptionError("the images are not finite; use --dtype float32, or less guidance")
    return images


def png(image: torch.Tensor) -> bytes:
    """Returns an image (C, H, W) in [0, 1] as the content of a PNG file."""
    buffer = io.BytesIO()
    to_pil_image(image.float()).save(buffer, "PNG")
    return buffer.getvalue()

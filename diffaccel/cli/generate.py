"""``diffaccel generate``: images, and a record that makes them again."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torchvision.transforms.functional import to_pil_image

from .. import zoo
from ..pipelines import accelerate
from .options import Sampler, open_output, read_accel, set_scheduler, versions, write

__all__ = ["generate", "load"]


def load(model: str, scheduler: str | None, device: str, dtype: str) -> Any:
    """Loads a pipeline without noise of its own, with another scheduler if one is named."""
    pipe: Any = zoo.load_pipeline(model, getattr(torch, dtype))
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
) -> list[Path]:
    """Writes one PNG a condition and ``run.json``; the arguments are those of the command.

    Raises:
        DiffaccelError: For any mistake in the arguments, before anything is written.
    """
    pipe = load(model, scheduler, device, dtype)
    if accel is not None:
        accelerate(pipe, read_accel(accel))
    sampler = Sampler(pipe, conditions, steps, guidance, seed)
    with open_output(out), Progress(transient=True) as progress:
        progress.add_task(f"{sampler.count} images, {steps} steps", total=None)
        images = sampler().clamp(0, 1)
        paths = []
        for number, image in enumerate(images):
            path = out / f"{number:04d}.png"
            _save(image, path)
            paths.append(path)
        record = {
            "model": model, "conditions": conditions, "accel": accel, "steps": steps, "guidance": guidance,
            "seed": seed, "scheduler": scheduler, "device": device, "dtype": dtype, "versions": versions(),
            "scheduler_config": {"class": type(pipe.scheduler).__name__, **_plain(pipe.scheduler.config)},
            "report": pipe.accel.report.to_dict() if accel is not None else None,
        }  # fmt: skip
        write(out / "run.json", json.dumps(record, indent=1))
    if accel is not None:
        print(pipe.accel)
    return paths


def _save(image: torch.Tensor, path: Path) -> None:
    import io

    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "PNG")
    write(path, buffer.getvalue())


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config), default=str))

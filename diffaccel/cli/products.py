"""``diffaccel generate`` with ``--product``, ``--temperature`` or ``--particles``: Feynman-Kac correctors."""

from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from ..eval.sampler import Sampler, refusals
from ..pipelines.feynman_kac_pipeline import FeynmanKacPipeline
from ..pipelines.feynman_kac_report import FeynmanKacReport
from ..zoo.folders import quiet
from .generate import check_finite, load, png, record_of, watched
from .reading import check_options
from .writing import check_output, write_files

__all__ = ["PARTICLES", "generate_products"]

PARTICLES = 8
"""The particles of an image, by default."""


def generate_products(
    model: str,
    product: list[str],
    conditions: list[str],
    accel: str | None,
    steps: int,
    guidance: float | None,
    temperature: float,
    particles: int,
    seed: int,
    scheduler: str | None,
    out: Path,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[list[Path], str]:
    """Writes PNG files and ``run.json``; the arguments are those of the command.

    With ``product``, one image of the product of all conditions; else an image of each condition.  Image n
    has a generator with the seed ``seed + n``.  Without ``guidance`` the densities are those of the model.

    Returns:
        The files, and what is to be said about the run.

    Raises:
        DiffaccelError: For any mistake in the arguments; nothing is written then.
    """
    check_options(device, dtype, guidance, scheduler)
    if accel is not None:
        raise OptionError("--accel does not go with --product, --temperature and --particles")
    check_output(out)
    messages: list[str] = []
    with quiet(messages):
        pipe = load(model, scheduler, device, dtype)
        sampler = Sampler(pipe, [*product, *conditions], steps, guidance, seed)  # checks the conditions
        values: list[Any] = [sampler.values or None] if product or not sampler.values else sampler.values
        options = {"guidance_scale": guidance, "temperature": temperature, "num_particles": particles,
                   "num_inference_steps": steps}  # fmt: skip
        images, reports = _sample(pipe, values, seed, options)
    files: dict[str, str | bytes] = {f"{n:04d}.png": png(image) for n, image in enumerate(images)}
    settings = {
        "model": model, "product": product, "conditions": conditions, "steps": steps, "guidance": guidance,
        "temperature": temperature, "particles": particles, "seed": seed, "scheduler": scheduler,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    files["run.json"] = record_of(
        pipe, settings, list(files), feynman_kac=[report.to_dict() for report in reports]
    )
    remarks = [*map(str, reports), *(f"note: {text}" for text in messages)]
    return write_files(out, files), "\n".join(remarks)


def _sample(
    pipe: Any, values: list[Any], seed: int, options: dict[str, Any]
) -> tuple[torch.Tensor, list[FeynmanKacReport]]:
    """Returns an image (3, H, W) of each of the values, and the reports."""
    corrected = FeynmanKacPipeline.from_pipe(pipe)
    images, reports = [], []
    with watched(pipe, f"{len(values)} images", options["num_inference_steps"]):
        for number, value in enumerate(values):
            generator = torch.Generator().manual_seed((seed + number) % 2**63)
            with refusals(pipe):
                found = corrected(value, generator=generator, output_type="np", **options)
            image = torch.as_tensor(found.images)[0]  # the frames of a video side by side
            images.append(torch.cat(image.unbind(0), 1) if image.ndim == 4 else image)
            reports.append(found.report)
    return check_finite(torch.stack(images).movedim(-1, 1).clamp(0, 1)), reports

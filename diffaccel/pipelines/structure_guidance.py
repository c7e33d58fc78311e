"""Structure guidance: the coarse wavelet band of a guide image in the place of the predicted one's.

In the first steps of a stage the predicted x0, after guidance, is decoded, gets the guide's band, and is
encoded again; the solver gets the output that stands for it, whatever the network predicts and whichever the
solver is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import gaussian_blur

from ..errors import DiffaccelError, UnsupportedPipeline
from .accelerator import Accelerator, Proceed
from .late_start import prepared
from .latent_images import LatentImages
from .run import Evaluation, Run, Update
from .wavelets import low_band, with_low_band

__all__ = ["Guide", "Record", "StructureGuidance", "Watch", "sharpened", "upsampled"]

SINGULAR = 1e-6
KERNEL = 3
"""The pixels of the blur that sharpening subtracts."""


def upsampled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns images (B, C, H, W) at another size, by bicubic interpolation."""
    if images.shape[-2:] == size:
        return images
    return interpolate(images, size, mode="bicubic", align_corners=False)


def sharpened(images: Tensor, alpha: float, sigmas: Tensor) -> Tensor:
    """Returns (1 + alpha) images - alpha blurred(images): an unsharp mask of 3 x 3 pixels.

    Arguments:
        images: The images, with shape (B, C, H, W).
        alpha: The strength; 0 is the identity.
        sigmas: The standard deviation of the blur, in pixels, with shape (B).
    """
    if alpha == 0:
        return images
    pairs = zip(images, sigmas.tolist(), strict=True)
    blurred = torch.stack([gaussian_blur(image, [KERNEL] * 2, [sigma] * 2) for image, sigma in pairs])
    return images + alpha * (images - blurred)


@dataclass(frozen=True)
class Guide:
    """The images that give a stage its structure, and what is taken from them.

    Arguments:
        images: The images, with shape (B, 3, H, W), in [0, 1] but for what sharpening adds.
        latent_images: The way between images and latents.
        steps: The steps in which the band is exchanged.
        level: The levels of the wavelet transform.
        mode: How images go on beyond their borders.
    """

    images: Tensor
    latent_images: LatentImages
    steps: int
    level: int = 1
    mode: str = "symmetric"

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    def band(self) -> Tensor:
        """Returns the coarse band of the images, (B, 3, h, w)."""
        return low_band(self.images, self.level, self.mode)

    def apply(self, x0: Tensor, band: Tensor) -> Tensor:
        """Returns latents of the scheduler with the structure of the guide.

        Arguments:
            x0: Predicted latents of the scheduler, with shape (B, *), or a multiple of B.
            band: What `band` has given.
        """
        ways = self.latent_images
        images = ways.decode(ways.unpack(x0, self.size))
        band = band.repeat(len(images) // len(band), 1, 1, 1)
        return ways.pack(ways.encode(with_low_band(images, band, self.level, self.mode)))


@dataclass
class Record:
    """What was seen of a call.

    Arguments:
        schedule: The scheduler as it stood before the first step.
        latents: The final latents of the scheduler, with shape (B, *).
    """

    schedule: Any = None
    latents: Tensor | None = None


class Watch(Accelerator):
    """Keeps the schedule and the final latents of a call, which it leaves as it is; in no registry.

    Arguments:
        record: Where it keeps them.
    """

    def __init__(self, record: Record) -> None:
        self.record = record

    def start(self, run: Run) -> None:
        """Keeps the schedule.

        Raises:
            UnsupportedPipeline: If this is a second loop.
        """
        if self.record.schedule is not None:
            raise UnsupportedPipeline(f"{type(run.pipe).__name__} has a second loop; images are made in one")
        self.record.schedule = prepared(run.scheduler)

    def update(self, call: Update, proceed: Proceed) -> Any:
        """Keeps the latents."""
        result = proceed(call)
        self.record.latents = result[0]
        return result


class StructureGuidance(Watch):
    """Drives a stage: a schedule that begins late, from given latents, with the structure of a guide.

    It has no name and is in no registry, since it needs a call that `DiffuseHighPipeline` arranges.

    Arguments:
        record: Where the final latents are kept.
        schedule: The scheduler of the stage, made by `late_start`.
        begin: The latents of its first level as the pipeline is given them, with shape (B, *).
        guide: The guide.
    """

    def __init__(self, record: Record, schedule: Any, begin: Tensor, guide: Guide) -> None:
        super().__init__(record)
        self.schedule, self.begin, self.guide = schedule, begin, guide

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns the scheduler of the stage, for the length of a call."""
        return self.schedule

    def start(self, run: Run) -> None:
        """Takes the band of the guide."""
        super().start(run)
        self.band = self.guide.band() if self.guide.steps else None

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Evaluates a network at the size of the stage.

        Raises:
            UnsupportedPipeline: If the network does not take this size, in its own words.
        """
        if call.step:
            return proceed(call)
        try:
            return proceed(call)
        except (DiffaccelError, torch.OutOfMemoryError):
            raise
        except (ValueError, RuntimeError) as error:
            height, width = self.guide.size
            what = f"the {call.network} of {type(call.run.pipe).__name__}"
            raise UnsupportedPipeline(f"{what} does not run at {height} x {width}: {error}") from error

    def update(self, call: Update, proceed: Proceed) -> Any:
        """Gives the solver the output that stands for an x0 with the guide's structure.

        Raises:
            UnsupportedPipeline: If the pipeline has not begun from the given latents, or its network's output
                is not of their shape.
        """
        if call.step == 0:
            self._check_begin(call)
        order = int(getattr(call.run.scheduler, "order", 1))
        if self.band is not None and call.step // order < self.guide.steps:
            call = replace(call, output=self._guided(call, self.band))
        return super().update(call, proceed)

    def _guided(self, call: Update, band: Tensor) -> Tensor:
        level, name = call.run.path[call.index], type(call.run.pipe).__name__
        if call.output.shape != call.sample.shape:
            raise UnsupportedPipeline(
                f"{name} gives its scheduler {tuple(call.output.shape)} for samples "
                f"{tuple(call.sample.shape)}, such as a variance besides"
            )
        gain = level.x0_per_output if level.q == 0 or abs(level.jacobian) >= SINGULAR else 0.0
        if abs(gain) < SINGULAR:
            return call.output  # x0 is not determined here, or not by the output
        x0 = level.x0(call.output, call.sample)
        change = self.guide.apply(x0, band) - x0
        return (call.output + change / gain).to(call.output.dtype)

    def _check_begin(self, call: Update) -> None:
        given, found = self.begin, call.sample
        same = given.shape[1:] == found.shape[1:] and len(found) % len(given) == 0
        if not (same and torch.equal(found[: len(given)], given.to(found))):
            name = type(call.run.pipe).__name__
            raise UnsupportedPipeline(f"{name} does not begin from the latents that it is given")

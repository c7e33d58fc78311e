"""How far images are from those of a reference run on the same noise: RMS error, PSNR, relative error."""

import math
from dataclasses import dataclass

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

__all__ = ["Fidelity", "fidelity"]


@dataclass(frozen=True)
class Fidelity:
    """The distance of images to reference images.

    Arguments:
        rms: The root mean square difference of pixels in [0, 1].
        psnr: The peak signal-to-noise ratio in dB, over all images together; infinite if they are equal.
        relative: The norm of the difference divided by the norm of the reference, a mean over images.
        worst: The largest RMS of one image.
    """

    rms: float
    psnr: float
    relative: float
    worst: float


def fidelity(images: Tensor, reference: Tensor) -> Fidelity:
    """Compares images pair by pair.

    Arguments:
        images: With shape (N, C, H, W), in [0, 1].
        reference: The images of the reference run, with the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and reference {tuple(reference.shape)} differ in shape"
        )
    images, reference = images.double(), reference.double()
    difference = (images - reference).flatten(1)
    rms = difference.pow(2).mean(1).sqrt()
    norm = reference.flatten(1).norm(dim=1).clamp_min(1e-12)
    total = float(difference.pow(2).mean().sqrt())
    psnr = float(peak_signal_noise_ratio(images, reference, data_range=1.0)) if total else math.inf
    return Fidelity(total, psnr, float((difference.norm(dim=1) / norm).mean()), float(rms.max()))

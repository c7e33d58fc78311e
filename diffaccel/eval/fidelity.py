r"""How far images are from those of a reference run on the same noise: RMS error, PSNR, relative error, SSIM.

For a pair of images whose pixels differ by :math:`d` on average of squares, on a scale that ends at
:math:`L`,

.. math:: \operatorname{PSNR} = 10 \log_{10} \frac{L^2}{d}

in dB. A mean over pairs can be taken of the :math:`d` or of the dB; the latter has no value where a pair is
identical. Both are given here, under different names, and identical pairs are counted.

References:
    | Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., 2004)
    | https://doi.org/10.1109/TIP.2003.819861
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ..errors import OptionError
from .estimate import Estimate
from .images import TOLERANCE
from .pixels import quantize

__all__ = ["Fidelity", "Pairs", "as_bytes", "check_pairs", "fidelity", "mean_estimate", "to_floats"]

WINDOW = 11
"""The side of SSIM's Gaussian window."""
CHUNK = 2**22
"""Pixel values that are compared at once: 34 MB in float64, and SSIM needs about ten times its half."""


@dataclass(frozen=True)
class Fidelity:
    """The distance of images to reference images.

    Arguments:
        rms: The root mean square difference of pixels in [0, 1], not rounded to bytes.
        psnr: The dB of the mean squared error over all pairs, identical ones among them, of the same pixels
            (``-20 log10(rms)``); infinite if all are equal.
        relative: The norm of the difference divided by the norm of the reference, a mean over images.
        worst: The largest RMS of one image.
        psnr_mean: The mean of the dB of each pair, both rounded to bytes (half to even); only of the pairs
            that differ then; infinite if none does.
        ssim: The mean structural similarity, 1 for identical images; None for sides of less than 11 pixels.
        identical: The pairs that are identical as bytes, which ``psnr_mean`` leaves out.
        count: The pairs.
        errors: The standard errors of ``rms``, ``psnr`` and ``relative``, where they are known.
    """

    rms: float
    psnr: float
    relative: float
    worst: float
    psnr_mean: Estimate
    ssim: Estimate | None
    identical: int
    count: int
    errors: dict[str, float] = field(default_factory=dict)

    def estimates(self) -> dict[str, Estimate]:
        """Returns the means over images by name, with their standard errors."""
        found = {name: Estimate(getattr(self, name), self.errors.get(name))
                 for name in ("rms", "psnr", "relative")}  # fmt: skip
        found["psnr_mean"] = self.psnr_mean
        return found if self.ssim is None else {**found, "ssim": self.ssim}


class Pairs:
    """Compares images pair by pair as they come; four numbers of each pair are kept, and no image.

    All pairs weigh the same, whatever their size. The numbers do not depend on how they are batched.
    """

    def __init__(self) -> None:
        self._squares: list[float] = []
        self._relative: list[float] = []
        self._decibels: list[float] = []
        self._similar: list[float] = []

    def update(self, images: Tensor, reference: Tensor) -> None:
        """Adds pairs.

        Arguments:
            images: With shape (B, C, H, W): bytes, or floats in [0, 1]. Floats that are at most 0.01 outside
                are clamped, as all images are before they are scored.
            reference: The images of the reference run, with the same shape.

        Raises:
            OptionError: If the shapes differ or are not those of images, or a pixel is not finite or out of
                range; nothing is added then.
        """
        check_pairs(images, reference)
        size = max(1, CHUNK // images[0].numel())
        for ours, theirs in zip(images.split(size), reference.split(size), strict=True):
            self._add(ours, theirs.to(ours.device))

    def _add(self, images: Tensor, reference: Tensor) -> None:
        squares, relative = _errors(_doubles(images), _doubles(reference))
        self._squares += squares.tolist()
        self._relative += relative.tolist()
        self._decibels += _decibels(as_bytes(images), as_bytes(reference)).tolist()
        if min(images.shape[-2:]) >= WINDOW:
            self._similar += _similarity(to_floats(images).float(), to_floats(reference).float()).tolist()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the numbers of the pairs, float64, by name."""
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in self._lists().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Adds the pairs of another one's `state_dict`."""
        for name, values in self._lists().items():
            values += state[name].tolist()

    def _lists(self) -> dict[str, list[float]]:
        return {"squares": self._squares, "relative": self._relative, "decibels": self._decibels,
                "similar": self._similar}  # fmt: skip

    def result(self) -> Fidelity:
        """Returns the means over all pairs.

        Raises:
            OptionError: If there is no pair.
        """
        if not self._squares:
            raise OptionError("there are no images to compare; call update() first")
        square = mean_estimate(self._squares)
        relative = mean_estimate(self._relative)
        rms = math.sqrt(square.value)
        errors = {} if relative.se is None else {"relative": relative.se}
        if square.se is not None and rms:  # first order: d sqrt(v) and d 10 log10(v)
            errors |= {"rms": square.se / (2 * rms), "psnr": 10 / math.log(10) * square.se / square.value}
        differ = [value for value in self._decibels if value < math.inf]
        return Fidelity(
            rms=rms,
            psnr=-10 * math.log10(square.value) if rms else math.inf,
            relative=relative.value,
            worst=math.sqrt(max(self._squares)),
            psnr_mean=mean_estimate(differ) if differ else Estimate(math.inf),
            ssim=mean_estimate(self._similar) if len(self._similar) == len(self._squares) else None,
            identical=len(self._decibels) - len(differ),
            count=len(self._squares),
            errors=errors,
        )


def fidelity(images: Tensor, reference: Tensor) -> Fidelity:
    """Compares images pair by pair, all at once; see `Pairs`.

    Arguments:
        images: With shape (N, C, H, W): bytes, or floats in [0, 1].
        reference: The images of the reference run, with the same shape.

    Raises:
        OptionError: If shapes differ or are not those of images, or a pixel is not finite or out of range.
    """
    pairs = Pairs()
    pairs.update(images, reference)
    return pairs.result()


def check_pairs(images: Tensor, reference: Tensor) -> None:
    """Checks that two tensors are pairs of images: (B, C, H, W), bytes or floats in [0, 1].

    Raises:
        OptionError: If shapes differ or are not those of images, or a pixel is not finite or out of range.
    """
    if images.shape != reference.shape:
        raise OptionError(
            f"images {tuple(images.shape)} and reference {tuple(reference.shape)} differ in shape"
        )
    to_floats(images, "images")
    to_floats(reference, "reference")


def to_floats(images: Tensor, name: str = "images") -> Tensor:
    """Returns images as floats in [0, 1], in their own precision; float32 for bytes.

    Arguments:
        images: With shape (B, C, H, W): bytes, or floats in [0, 1], which are clamped if they are at most
            0.01 outside.
        name: What they are called in errors.

    Raises:
        OptionError: If the shape or type is not that of images, or a pixel is not finite or out of range.
    """
    if images.ndim != 4 or not images.numel():
        raise OptionError(f"{name}: shape {tuple(images.shape)}; expected (B, C, H, W), none of them 0")
    if images.dtype == torch.uint8:
        return images / 255
    if not images.is_floating_point():
        raise OptionError(f"{name}: type {images.dtype}; expected torch.uint8, or floats in [0, 1]")
    least, most = (float(value) for value in images.aminmax())
    if not math.isfinite(least) or not math.isfinite(most):
        raise OptionError(f"{name}: a pixel is not finite")
    if least < -TOLERANCE or most > 1 + TOLERANCE:
        raise OptionError(
            f"{name}: pixels from {least:.4g} to {most:.4g}; expected 0 to 1 (of [-1, 1], pass (x + 1) / 2)"
        )
    return images.clamp(0, 1)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of independent numbers with its standard error, which a single one does not tell.

    Arguments:
        values: The numbers, at least 1.
    """
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), error)


def as_bytes(images: Tensor) -> Tensor:
    """Returns images as bytes, floats in [0, 1] rounded half to even; others are not checked."""
    return images if images.dtype == torch.uint8 else quantize(images)


def _doubles(images: Tensor) -> Tensor:
    return images.double() / 255 if images.dtype == torch.uint8 else to_floats(images).double()


def _errors(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean squared difference of each pair (B) and the relative norm of the difference (B)."""
    difference, reference = (images - reference).flatten(1), reference.flatten(1)
    norm = reference.norm(dim=1).clamp_min(1e-12)
    return difference.pow(2).mean(1), difference.norm(dim=1) / norm


def _decibels(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the PSNR of each pair of bytes (B), infinite for identical ones."""
    # bytes are subtracted as float64: squares of bytes, or of their differences, wrap around at 256
    squares = (images.double() - reference.double()).pow(2).flatten(1).mean(1)
    return 10 * (255**2 / squares).log10()


def _similarity(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the structural similarity of each pair (B), means over channels and reflected borders too."""
    value = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(-1)

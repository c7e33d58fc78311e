"""From floating-point images to bytes, and from one size to another: where scores silently come to differ.

References:
    | On Aliased Resizing and Surprising Subtleties in GAN Evaluation (Parmar, Zhang, Zhu, 2021)
    | https://arxiv.org/abs/2104.11222
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError, closest

__all__ = ["QUANTIZERS", "RESIZERS", "quantize", "resize"]

QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda x: x.round(),  # half to even, as diffusers
    "trunc": lambda x: x.floor(),  # ADM, DMD2, torchmetrics
    "half_up": lambda x: (x + 0.5).floor(),  # EDM, DiT: floor(127.5 v + 128) of v in [-1, 1]
}
"""How numbers in [0, 255] become integers."""


def quantize(images: Tensor, mode: str = "round") -> Tensor:
    """Returns images as bytes; what is outside of [0, 1] is clamped before it is cast.

    Arguments:
        images: Floating-point images of any shape, in [0, 1].
        mode: One of ``QUANTIZERS``.

    Raises:
        OptionError: If the mode is unknown.
    """
    if mode not in QUANTIZERS:
        raise OptionError(f"no quantizer {mode!r}; {closest(mode, QUANTIZERS)}")
    levels = (255.0 * images.float()).clamp(0, 255)
    return QUANTIZERS[mode](levels).clamp(0, 255).to(torch.uint8)


def _keep(pixels: Tensor, size: int) -> Tensor:
    return pixels.float()


def _clean(pixels: Tensor, size: int) -> Tensor:
    """PIL's bicubic filter on floats, antialiased, clipped and not rounded (within 2e-3 of a level)."""
    return _antialias(pixels, size, "bicubic").clamp(0, 255)


def _antialias(pixels: Tensor, size: int, mode: str) -> Tensor:
    if pixels.shape[-2:] == (size, size):
        return pixels.float()
    return F.interpolate(pixels.float(), (size, size), mode=mode, antialias=True, align_corners=False)


def _bilinear(pixels: Tensor, size: int) -> Tensor:
    return F.interpolate(pixels.float(), (size, size), mode="bilinear", align_corners=False)


def _tf1_bilinear(pixels: Tensor, size: int) -> Tensor:
    """TensorFlow 1's resize: source pixel i * in / out, without half-pixel centers or antialiasing."""
    rows, columns = (_tf1_weights(n, size, pixels.device) for n in pixels.shape[-2:])
    return rows @ pixels.float() @ columns.T


def _tf1_weights(length: int, size: int, device: torch.device) -> Tensor:
    """Returns the interpolation matrix (size, length), with positions in float32 as TensorFlow's are."""
    source = torch.arange(size, dtype=torch.float32) * (length / size)
    low = source.floor().long()
    high = (low + 1).clamp(max=length - 1)
    weights = torch.zeros(size, length)
    lines = torch.arange(size)
    weights.index_put_((lines, low), 1 - (source - low), accumulate=True)
    weights.index_put_((lines, high), source - low, accumulate=True)
    return weights.to(device)


def _pil_bicubic(pixels: Tensor, size: int) -> Tensor:
    """PIL's bicubic filter on bytes, rounded to bytes after each direction."""
    arrays = pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    resized = [Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC) for array in arrays]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).movedim(-1, 1).float()


RESIZERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "none": _keep,
    "clean": _clean,
    "bicubic_antialias": lambda pixels, size: _antialias(pixels, size, "bicubic"),
    "bilinear_antialias": lambda pixels, size: _antialias(pixels, size, "bilinear"),
    "bilinear": _bilinear,
    "tf1_bilinear": _tf1_bilinear,
    "pil_bicubic": _pil_bicubic,
}
"""How images come to the size of a network."""


def resize(pixels: Tensor, size: int, mode: str) -> Tensor:
    """Returns float32 images (B, 3, size, size) in [0, 255].

    Arguments:
        pixels: Byte images (B, 3, H, W).
        size: The side of the result; "none" leaves the size alone.
        mode: One of ``RESIZERS``.

    Raises:
        OptionError: If the mode is unknown.
    """
    if mode not in RESIZERS:
        raise OptionError(f"no resizer {mode!r}; {closest(mode, RESIZERS)}")
    return RESIZERS[mode](pixels, size).to(pixels.device)

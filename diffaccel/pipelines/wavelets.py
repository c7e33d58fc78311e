r"""The wavelet transform of pictures, and the exchange of their coarse band.

Along each axis, with the orthonormal low-pass h and high-pass g[m] = (-1)^{m+1} h[7 - m] of Daubechies' db4,

    low[k]  = sum_m h[m] x[2k + 1 - m]          x[j] = sum_k h[2k + 1 - j] low[k] + g[2k + 1 - j] high[k]
    high[k] = sum_m g[m] x[2k + 1 - m]

where x goes on beyond its n pixels as a mirror image ("symmetric", edge pixels twice; floor((n + 7) / 2)
coefficients), or from the other side ("periodization", n even; n / 2 coefficients).  The mirrored transform
has more coefficients than pixels: a coarse band that is put in is, near the borders, not quite the one that
the transform of the result gives.  The periodic transform is orthogonal, and the exchange a projection.

References:
    Ten Lectures on Wavelets (Daubechies, 1992), for the coefficients of db4.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv_transpose1d

from ..errors import OptionError
from ..noise import wide

__all__ = ["HIGH_PASS", "LOW_PASS", "MODES", "Bands", "dwt", "idwt", "low_band", "with_low_band"]

MODES = ("symmetric", "periodization")

LOW_PASS = (
    -0.010597401785069032, 0.0328830116668852, 0.030841381835560764, -0.18703481171909309,
    -0.027983769416859854, 0.6308807679298589, 0.7148465705529157, 0.2303778133088965,
)  # fmt: skip
HIGH_PASS = tuple((-1) ** (m + 1) * LOW_PASS[7 - m] for m in range(8))

TAPS = len(LOW_PASS)


class Bands(NamedTuple):
    """The four bands of one level.

    Arguments:
        low: What is coarse along both axes, with shape (B, C, h, w); of a constant c it is 2 c.
        high: What is fine along the width, the height, and both, with shape (B, C, 3, h, w).
    """

    low: Tensor
    high: Tensor


def dwt(images: Tensor, mode: str = "symmetric") -> Bands:
    """Returns one level of the transform of images (B, C, H, W), in float32 or wider.

    Arguments:
        images: The images.
        mode: How they go on beyond their borders, one of `MODES`.

    Raises:
        OptionError: If the mode is unknown, or a side is odd in the mode "periodization".
    """
    low, high = (_analyzed(part, -2, mode) for part in _analyzed(wide(images), -1, mode).unbind(2))
    return Bands(low[:, :, 0], torch.stack([high[:, :, 0], low[:, :, 1], high[:, :, 1]], 2))


def idwt(bands: Bands, size: tuple[int, int], mode: str = "symmetric") -> Tensor:
    """Returns the images (B, C, H, W) of one level of the transform.

    Arguments:
        bands: The bands.
        size: The height and width of the images, which the bands alone do not tell of odd ones.
        mode: The mode of `dwt`.
    """
    wide_only, tall_only, both = bands.high.unbind(2)
    low = _synthesized(torch.stack([bands.low, tall_only], 2), -2, size[0], mode)
    high = _synthesized(torch.stack([wide_only, both], 2), -2, size[0], mode)
    return _synthesized(torch.stack([low, high], 2), -1, size[1], mode)


def low_band(images: Tensor, level: int = 1, mode: str = "symmetric") -> Tensor:
    """Returns the coarse band (B, C, h, w) after some levels of the transform of images (B, C, H, W)."""
    for _ in range(level):
        images = dwt(images, mode).low
    return images


def with_low_band(images: Tensor, low: Tensor, level: int = 1, mode: str = "symmetric") -> Tensor:
    """Returns images (B, C, H, W) with another coarse band, and their own finer ones.

    Arguments:
        images: The images.
        low: The band, as `low_band` makes it of images of the same size.
        level: The number of levels; only the coarsest band is exchanged.
        mode: How images go on beyond their borders.
    """
    bands = dwt(images, mode)
    coarse = low if level == 1 else with_low_band(bands.low, low, level - 1, mode)
    return idwt(Bands(coarse, bands.high), (images.shape[-2], images.shape[-1]), mode)


def _filters(like: Tensor) -> Tensor:
    """Returns both filters reversed, with shape (2, 1, 8): convolutions of torch are correlations."""
    return torch.tensor([LOW_PASS, HIGH_PASS], dtype=like.dtype, device=like.device).flip(1)[:, None]


def _places(length: int, mode: str, device: torch.device) -> Tensor:
    """Returns the pixels that stand at -6, -5, ... in the continuation of a row."""
    if mode == "periodization":
        if length % 2:
            raise OptionError(
                f"a side of {length} pixels is odd, which the mode 'periodization' cannot halve"
            )
        return torch.arange(2 - TAPS, length, device=device) % length
    if mode != "symmetric":
        raise OptionError(f"the mode of the wavelet transform is {mode!r}; known: {', '.join(MODES)}")
    places = torch.arange(2 - TAPS, length + TAPS - 2 + length % 2, device=device) % (2 * length)
    return torch.where(places < length, places, 2 * length - 1 - places)


def _analyzed(x: Tensor, axis: int, mode: str) -> Tensor:
    """Returns low and high along an axis of (B, C, H, W), with shape (B, C, 2, ...)."""
    rows = x.movedim(axis, -1)
    known = rows.index_select(-1, _places(rows.shape[-1], mode, x.device))
    found = conv1d(known.reshape(-1, 1, known.shape[-1]), _filters(x), stride=2)
    return found.reshape(*rows.shape[:-1], 2, -1).movedim(-2, 2).movedim(-1, axis)


def _synthesized(parts: Tensor, axis: int, length: int, mode: str) -> Tensor:
    """Returns (B, C, H, W) of low and high along an axis, with shape (B, C, 2, ...)."""
    rows = parts.movedim(axis, -1).movedim(2, -2)
    found = conv_transpose1d(rows.reshape(-1, *rows.shape[-2:]), _filters(parts), stride=2)[:, 0]
    if mode == "periodization":
        places = _places(length, mode, parts.device)
        found = torch.zeros_like(found[:, :length]).index_add(1, places, found)
    else:
        found = found[:, TAPS - 2 : TAPS - 2 + length]
    return found.reshape(*rows.shape[:-2], length).movedim(-1, axis)

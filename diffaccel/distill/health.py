"""Signs of a student that falls apart: saturated, uniform or all alike, against what the teacher makes.

References:
    Improved Distribution Matching Distillation for Fast Image Synthesis (2024), arXiv 2405.14867, reports
    such collapses; the thresholds are ours.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import OptionError

__all__ = ["Health", "examine"]

_LESS, _MORE, _SHARE = 0.4, 2.5, 0.05


@dataclass(frozen=True)
class Health:
    """What images look like, by simple numbers.

    Arguments:
        mean: The mean of the values in [0, 1].
        std: The standard deviation of the values.
        saturation: The share of values within 1/255 of 0 or 1.
        diversity: The root-mean-square difference of two images of one condition; of any two, if all
            conditions differ.
        not_finite: The share of values that are not finite; they count as 0 elsewhere.
    """

    mean: float
    std: float
    saturation: float
    diversity: float
    not_finite: float

    def to_dict(self) -> dict[str, float]:
        """Returns the numbers by name."""
        return asdict(self)

    def signs(self, teacher: "Health") -> list[str]:
        """Returns what is wrong, against the teacher's images of the same conditions: or nothing."""
        found = []
        if self.not_finite:
            found.append(f"{self.not_finite:.1%} of the values are not finite")
        for name in ("std", "diversity"):
            own, other = getattr(self, name), getattr(teacher, name)
            if own < _LESS * other:
                found.append(f"{name} {own:.3f} against the teacher's {other:.3f}: images become alike")
            elif own > _MORE * other:
                found.append(f"{name} {own:.3f} against the teacher's {other:.3f}: images become noise")
        if self.saturation > 2 * teacher.saturation + _SHARE:
            found.append(f"saturation {self.saturation:.1%} against the teacher's {teacher.saturation:.1%}")
        return found


def examine(images: Tensor, conditions: Sequence[object] = ()) -> Health:
    """Returns the health of images.

    Arguments:
        images: The images (N, C, H, W) in [0, 1], N at least 2.
        conditions: The condition of each, or nothing.

    Raises:
        OptionError: If there are less than two images.
    """
    if len(images) < 2:
        raise OptionError(f"the health of {len(images)} images cannot be told; it takes 2")
    finite = torch.isfinite(images)
    pixels = torch.where(finite, images, 0.0).double()
    names = list(conditions) or [None] * len(pixels)
    numbered = [[n for n, name in enumerate(names) if name == key] for key in dict.fromkeys(names)]
    groups = [torch.tensor(numbers) for numbers in numbered]
    groups = [group for group in groups if len(group) > 1] or [torch.arange(len(pixels))]
    spreads = [2 * pixels[group].var(0, correction=1).mean() for group in groups]  # E |a - b|^2 = 2 var
    return Health(
        mean=pixels.mean().item(), std=pixels.std().item(),
        saturation=((pixels <= 1 / 255) | (pixels >= 1 - 1 / 255)).double().mean().item(),
        diversity=torch.stack(spreads).mean().sqrt().item(),
        not_finite=1 - finite.double().mean().item(),
    )  # fmt: skip

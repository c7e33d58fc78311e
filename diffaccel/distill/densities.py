r"""The times of training: how often each t in [0, 1] is drawn, noise at 1.

A law is given by its quantile function, the inverse of P(t <= q): one number u in [0, 1) of a sample makes
its t. All is computed in float64; t leaves in float32, between 1e-5 and 1 - 1e-5, since formulas divide by t
and by 1 - t.

| name         | density p(t)                          | quantile of u                          |
|--------------|---------------------------------------|----------------------------------------|
| uniform      | 1                                     | u                                      |
| u-shaped     | a cosh(a (t - 1/2)) / (2 sinh(a / 2)) | 1/2 + asinh((2 u - 1) sinh(a / 2)) / a |
| logit-normal | N(logit t; mean, std^2) / (t (1 - t)) | sigmoid(mean + std Phi^-1(u))          |

References:
    | Improving the Training of Rectified Flows (2024), arXiv 2405.20320 (u-shaped)
    | Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (2024), arXiv 2403.03206
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .draws import Draws

__all__ = ["DENSITIES", "SMALLEST", "LogitNormal", "TimeDensity", "UShaped", "Uniform"]

SMALLEST = 1e-5
"""The smallest t, and the smallest 1 - t."""


class TimeDensity(ABC):
    """A law of the time t."""

    def sample(self, draws: Draws) -> Tensor:
        """Returns a time for each sample, with shape (B), in float32, from 1e-5 to 1 - 1e-5.

        Arguments:
            draws: The random numbers of the B samples, one of which is used.
        """
        return self.quantile(_double(draws.uniform())).clamp(SMALLEST, 1 - SMALLEST).float()

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Returns the time that is not exceeded with the probability u, in [0, 1], of any shape."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Returns p(t), in float64, for times in [0, 1] of any shape."""


@dataclass(frozen=True)
class Uniform(TimeDensity):
    """All times alike."""

    def quantile(self, u: Tensor) -> Tensor:
        """Returns u."""
        return _double(u)

    def density(self, t: Tensor) -> Tensor:
        """Returns 1."""
        return torch.ones_like(_double(t))


@dataclass(frozen=True)
class UShaped(TimeDensity):
    """Both ends more often than the middle, in proportion to cosh(a (t - 1/2)); uniform as a goes to 0.

    The paper is quoted with exp(a t) + exp(-a t), which rises only; this is the density of its code.

    Arguments:
        a: The sharpness, from 0 to 100; the ends are cosh(a / 2) times as frequent as the middle.

    Raises:
        OptionError: If it is outside of these bounds.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.a <= 100:
            raise OptionError(f"the sharpness a of the u-shaped density is {self.a}; expected 0 to 100")

    def quantile(self, u: Tensor) -> Tensor:
        """Returns 1/2 + asinh((2 u - 1) sinh(a / 2)) / a."""
        u = _double(u)
        if self.a == 0:
            return u
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def density(self, t: Tensor) -> Tensor:
        """Returns a cosh(a (t - 1/2)) / (2 sinh(a / 2))."""
        t = _double(t)
        if self.a == 0:
            return torch.ones_like(t)
        return self.a / (2 * math.sinh(self.a / 2)) * torch.cosh(self.a * (t - 0.5))


@dataclass(frozen=True)
class LogitNormal(TimeDensity):
    """The middle more often than the ends: log(t / (1 - t)) is normal.

    Arguments:
        mean: The mean of log(t / (1 - t)).
        std: Its standard deviation, above 0.

    Raises:
        OptionError: If they are not finite, or the standard deviation is not above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise OptionError(f"a logit-normal density with mean {self.mean} and std {self.std}")

    def quantile(self, u: Tensor) -> Tensor:
        """Returns sigmoid(mean + std Phi^-1(u))."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(_double(u)))

    def density(self, t: Tensor) -> Tensor:
        """Returns N(logit t; mean, std^2) / (t (1 - t)), which is 0 at both ends."""
        t = _double(t)
        inside = t.clamp(1e-300, 1 - 1e-16)  # the limits would be 0 / 0
        normal = (-0.5 * ((torch.logit(inside) - self.mean) / self.std).square()).exp()
        found = normal / (self.std * math.sqrt(2 * math.pi) * inside * (1 - inside))
        return torch.where((t > 0) & (t < 1), found, torch.zeros_like(t))


DENSITIES: Mapping[str, TimeDensity] = {
    "uniform": Uniform(),
    "u-shaped": UShaped(),
    "logit-normal": LogitNormal(),
}
"""The laws by the names that options have."""


def _double(values: Tensor) -> Tensor:
    """Returns numbers in float64, which Apple's GPUs do not have."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)

"""From data to noise along a velocity field: the noise from which its ODE makes a given sample.

References:
    Improving the Training of Rectified Flows (2024), arXiv 2405.20320 (config. G, and inversion)
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import OptionError
from ..noise import wide

__all__ = ["EARLIEST", "SOLVERS", "Velocity", "invert"]

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A velocity field on x_t = (1 - t) x0 + t noise: of x_t (B, *) and t (B), with its conditions bound."""

SOLVERS = ("heun", "euler")

EARLIEST = 1e-3
"""The t from which data are inverted: a field is stiff, and little trained, at t = 0."""

_LATEST = 1 - 1e-5
"""The largest t of an evaluation: a field that is made of a denoiser divides by 1 - t."""


@torch.no_grad()
def invert(velocity: Velocity, x0: Tensor, noise: Tensor, evaluations: int = 128,
           solver: str = "heun") -> Tensor:  # fmt: skip
    """Returns the noise, (B, *), at t = 1 of the ODE whose x_t at t = 0.001 is (1 - t) x0 + t noise.

    The steps are short at both ends, t rising as 1 - cos.

    Arguments:
        velocity: The velocity field.
        x0: The data, with shape (B, *).
        noise: Standard normal noise, with shape (B, *), that fills what t = 0.001 leaves of the data.
        evaluations: The evaluations of the field; of an odd number the last step of Heun is one of Euler.
        solver: "heun" or "euler".

    Raises:
        OptionError: If there is no such solver, or nothing is evaluated.
    """
    if solver not in SOLVERS:
        raise OptionError(f"no solver {solver!r}; known: {', '.join(SOLVERS)}")
    if evaluations < 1:
        raise OptionError(f"{evaluations} evaluations; expected at least 1")
    steps = evaluations if solver == "euler" else (evaluations + 1) // 2
    second = steps if solver == "heun" and evaluations % 2 == 0 else steps - 1 if solver == "heun" else 0
    times = [EARLIEST + (1 - EARLIEST) * (1 - math.cos(math.pi * n / steps)) / 2 for n in range(steps + 1)]
    x = (1 - EARLIEST) * wide(x0) + EARLIEST * wide(noise)

    def field(sample: Tensor, t: float) -> Tensor:
        return velocity(sample, torch.full((len(x),), min(t, _LATEST), dtype=x.dtype, device=x.device)).to(x)

    for step, (now, then) in enumerate(itertools.pairwise(times)):
        slope = field(x, now)
        if step < second:
            slope = (slope + field(x + (then - now) * slope, then)) / 2
        x = x + (then - now) * slope
    return x

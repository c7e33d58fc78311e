r"""Rectified flow: the loss of a velocity field, and the samplers that its straight paths need.

    x_t = (1 - t) x0 + t noise,    dx/dt = velocity,    t from 1 (noise) to 0 (data).

With noise that is independent of the data (1-RF) the best velocity is the mean E[noise - x0 | x_t]. With
noise that the samples were made of (pairs: 2-RF) it is noise - x0 itself, as paths of pairs hardly cross, and
one step leads from noise to data: x0 = x_t - t velocity.

References:
    | Flow Straight and Fast (2022), arXiv 2209.03003
    | Improving the Training of Rectified Flows (2024), arXiv 2405.20320 (the anchored rule, and premetrics)
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import OptionError, closest
from ..noise import wide
from .densities import SMALLEST
from .inversion import Velocity
from .premetrics import L2, Premetric, broad

__all__ = ["COUPLINGS", "Coupling", "Steps", "euler", "euler_anchored", "flow_loss", "heun", "interpolate",
           "straightness"]  # fmt: skip

Coupling = Literal["independent", "paired"]
COUPLINGS = ("independent", "paired")

Steps = int | Sequence[float]
"""A number N of steps, at the times 1 - 1e-5, (N - 1) / N, .., 1 / N, or falling times in (0, 1]; then 0."""

_SQUARED = L2()


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Returns x_t = (1 - t) x0 + t noise, (B, *), in float32 or wider.

    Arguments:
        x0: The data, with shape (B, *).
        noise: The noise, with shape (B, *).
        t: The times, with shape (B).
    """
    x0, noise = wide(x0), wide(noise)
    return (1 - broad(t, x0)) * x0 + broad(t, x0) * noise


def flow_loss(velocity: Velocity, x0: Tensor, noise: Tensor, t: Tensor, premetric: Premetric = _SQUARED, *,
              coupling: Coupling) -> Tensor:  # fmt: skip
    """Returns how far the velocity at x_t is from noise - x0, for each sample, with shape (B).

    Arguments:
        velocity: The velocity field.
        x0: The data, with shape (B, *).
        noise: The noise, with shape (B, *).
        t: The times, with shape (B), in (0, 1].
        premetric: What the distance is.
        coupling: "paired" if the samples were made of this noise; "independent" if not, or if fresh noise is
            mixed in: then only the squared distance has the right optimum.

    Raises:
        OptionError: If the coupling is unknown, or the premetric has another optimum with it.
    """
    check_coupling(premetric, coupling)
    residual = wide(velocity(interpolate(x0, noise, t), t)) - (wide(noise) - wide(x0))
    return premetric(residual, wide(x0), t)


def check_coupling(premetric: Premetric, coupling: str) -> None:
    """Checks that the optimum of a premetric is the one wanted.

    Raises:
        OptionError: If the coupling is unknown, or noise is independent and the premetric not squared L2.
    """
    if coupling not in COUPLINGS:
        raise OptionError(f"no coupling {coupling!r}; {closest(coupling, COUPLINGS)}")
    if coupling == "independent" and not premetric.finds_mean:
        raise OptionError(
            f"{type(premetric).__name__} with independent noise: its optimum is not the mean velocity, which "
            "the ODE needs; use L2, or pairs of noise and sample"
        )


@torch.no_grad()
def euler(velocity: Velocity, noise: Tensor, steps: Steps) -> Tensor:
    """Returns samples x0, (B, *), by Euler's method: x_s = x_t + (s - t) velocity.

    Arguments:
        velocity: The velocity field.
        noise: Standard normal noise, with shape (B, *).
        steps: The steps, as many as evaluations.

    Raises:
        OptionError: If there is no step, or times do not fall.
    """
    times = times_of(steps)
    x = times[0] * wide(noise)
    for t, s in _steps(times):
        x = x + (s - t) * _at(velocity, x, t)
    return x


@torch.no_grad()
def euler_anchored(velocity: Velocity, noise: Tensor, steps: Steps) -> Tensor:
    """Returns samples x0, (B, *), by x_s = (1 - s) x0_hat + s noise, x0_hat = x_t - t velocity.

    The noise is the initial one, not the one that the velocity at x_t implies: after reflow they differ by an
    error only, which so is not carried along. On curved paths the rule can be worse than Euler's method.

    Arguments:
        velocity: The velocity field.
        noise: Standard normal noise, with shape (B, *).
        steps: The steps, as many as evaluations; with one or two it is Euler's method.

    Raises:
        OptionError: If there is no step, or times do not fall.
    """
    times, noise = times_of(steps), wide(noise)
    x = times[0] * noise
    for t, s in _steps(times):
        x0 = x + (0 - t) * _at(velocity, x, t)
        x = (1 - s) * x0 + s * noise
    return x


@torch.no_grad()
def heun(velocity: Velocity, noise: Tensor, steps: Steps) -> Tensor:
    """Returns samples x0, (B, *), by Heun's method, of which the last step is one of Euler.

    Arguments:
        velocity: The velocity field.
        noise: Standard normal noise, with shape (B, *).
        steps: The N steps, in 2 N - 1 evaluations.

    Raises:
        OptionError: If there is no step, or times do not fall.
    """
    times = times_of(steps)
    x = times[0] * wide(noise)
    for t, s in _steps(times):
        slope = _at(velocity, x, t)
        if s > 0:
            slope = (slope + _at(velocity, x + (s - t) * slope, s)) / 2
        x = x + (s - t) * slope
    return x


@torch.no_grad()
def straightness(velocity: Velocity, noise: Tensor, steps: int = 128) -> Tensor:
    """Returns the mean of |x_1 - x_0 - velocity(x_t, t)|^2 over elements and t, of shape (); 0 if straight.

    Paths are those of the field itself, by Euler's method; x_1 - x_0 is the mean of its velocities, so that
    this is their variance along a path.

    Arguments:
        velocity: The velocity field.
        noise: Standard normal noise, with shape (B, *).
        steps: The steps of a path.

    Raises:
        OptionError: If there is no step.
    """
    times = times_of(steps)
    x = times[0] * wide(noise)
    mean, total, weight = torch.zeros_like(x), torch.zeros_like(x), 0.0
    for t, s in _steps(times):  # Welford's update: differences of sums of squares would cancel
        slope = _at(velocity, x, t)
        weight += t - s
        change = slope - mean
        mean = mean + change * ((t - s) / weight)
        total = total + (t - s) * change * (slope - mean)
        x = x + (s - t) * slope
    return (total / weight).mean()


def times_of(steps: Steps) -> list[float]:
    """Returns the times at which a field is evaluated.

    Raises:
        OptionError: If there is none, or they do not fall from at most 1 to above 0.
    """
    times = [float(t) for t in steps] if isinstance(steps, Sequence) else [
        min(1 - n / steps, 1 - SMALLEST) for n in range(steps)
    ]  # fmt: skip
    if not times or times[0] > 1 or any(t <= s for t, s in itertools.pairwise((*times, 0.0))):
        raise OptionError(f"steps={steps}; expected a number, or times that fall from at most 1 to above 0")
    return times


def _steps(times: Sequence[float]) -> Iterator[tuple[float, float]]:
    return itertools.pairwise((*times, 0.0))


def _at(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    return velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device)).to(x)

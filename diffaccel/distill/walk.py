"""A student's own steps, and the times at which what it makes is judged: backward simulation.

References:
    Improved Distribution Matching Distillation for Fast Image Synthesis (2024), arXiv 2405.14867
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Prediction
from .units import Units

__all__ = ["Ask", "ScoreTimes", "beginning", "move", "times_like", "walk"]

Ask = Callable[[Tensor, Tensor], Prediction]
"""A network with its conditions bound: of x_t (B, *) and t (B)."""


def times_like(t: float, x: Tensor) -> Tensor:
    """Returns a time for each of the samples x (B, *), with shape (B), in float64 where there is that."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.full((len(x),), t, dtype=dtype, device=x.device)


def beginning(noise: Tensor, t: float, flow: bool) -> Tensor:
    """Returns the first sample of a pipeline, noise (B, *) of unit variance, in units of the straight path.

    It is pure noise, though a model with a table of betas is told t < 1: not (1 - t) x0 + t noise.

    Arguments:
        noise: Standard normal noise.
        t: The first time of the grid.
        flow: Whether the pipeline's path is straight; else it is variance-preserving.
    """
    return noise if flow else math.hypot(1 - t, t) * noise


def move(said: Prediction, t: float, fresh: Tensor | None) -> Tensor:
    """Returns the sample (B, *) at a time that a step goes to.

    Arguments:
        said: What the network says of the sample before.
        t: The time, in [0, 1).
        fresh: New noise (B, *); None for the noise that the network predicts, which is Euler's step of a flow
            and DDIM's on a table of betas.
    """
    return said.x0 if t == 0 else (1 - t) * said.x0 + t * (said.eps if fresh is None else fresh)


@torch.no_grad()
def walk(networks: Sequence[Ask], x: Tensor, times: Sequence[float], fresh: Sequence[Tensor] = ()) -> Tensor:
    """Returns the sample (B, *) at the last of some times, without a gradient.

    Arguments:
        networks: The network of each step.
        x: The sample at the first time.
        times: The falling times, one more than steps.
        fresh: New noise for each step; none of it for deterministic steps.
    """
    for step, (now, then) in enumerate(itertools.pairwise(times)):
        x = move(networks[step](x, times_like(now, x)), then, fresh[step] if fresh else None)
    torch.clear_autocast_cache()  # of torch 2.6: weights that were cast here would have no gradient later
    return x


@dataclass(frozen=True)
class ScoreTimes:
    """The law of the times at which scores are compared or learned: uniform in a network's own, then shifted.

    Arguments:
        units: The network's units.
        shift: The shift k of k u / (1 + (k - 1) u), above 0; 1 for none.
    """

    units: Units
    shift: float = 1.0

    def time(self, part: Tensor) -> Tensor:
        """Returns the time t of the straight path at a part in [0, 1] of the unshifted range."""
        return self.units.time(self.shift * part / (1 + (self.shift - 1) * part))

    def part(self, t: float) -> float:
        """Returns the part at a time, the opposite of `time`; 0 or 1 beyond the network's range."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            below = float(self.time(torch.tensor([middle], dtype=torch.float64))) < t
            low, high = (middle, high) if below else (low, middle)
        return high

    def between(self, low: float, high: float, uniform: Tensor) -> Tensor:
        """Returns times, (B), at parts between two, from numbers in [0, 1)."""
        wide = uniform.to(torch.float32 if uniform.device.type == "mps" else torch.float64)
        return self.time((low + (high - low) * wide).clamp(1e-5, 1 - 1e-5))

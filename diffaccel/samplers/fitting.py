r"""Steps fitted to a model: the linear combination that leads to the teacher's sample at the next node.

A step of any solver is a linear combination of the x0 and eps at the known nodes. While the solver runs, the
difference between its sample and the fine solution's sample at the next node is fitted by least squares,

.. math:: \min_w | x_t^{teacher} - x_t - \sum_j (w_{2j} x0_j + w_{2j+1} eps_j) |^2 + \rho |w|^2

and the run goes on from the fitted sample, so that later steps correct what earlier ones have left. It costs
one run; ten numbers a step at most are fitted to all pixels of all images.

References:
    | Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models (2024), which fits the
    | same family of solvers by gradient descent: https://arxiv.org/abs/2403.01329
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schedule import Schedule
from .unified import UnifiedSolverScheduler

__all__ = ["FittingScheduler", "RecordingScheduler", "Trajectory"]

RIDGE = 1e-5
"""The weight of the squared corrections, in parts of the mean square of what they multiply."""


class Trajectory:
    """The samples of a fine solution, by half log-SNR.

    Arguments:
        positions: The half log-SNRs, rising; the last may be infinite.
        samples: The samples there.
    """

    def __init__(self, positions: list[float], samples: list[Tensor]) -> None:
        self.positions, self.samples = positions, samples

    def at(self, log_snr: float) -> Tensor:
        """Returns the sample at a half log-SNR, by the cubic through the four nearest."""
        if math.isinf(log_snr):
            return self.samples[-1]
        known = [value for value in self.positions if math.isfinite(value)]
        first = min(max(int(np.searchsorted(known, log_snr)) - 2, 0), max(len(known) - 4, 0))
        places = range(first, min(first + 4, len(known)))
        result = torch.zeros_like(self.samples[0])
        for a in places:
            weight = math.prod((log_snr - known[b]) / (known[a] - known[b]) for b in places if b != a)
            result = result + weight * self.samples[a]
        return result


class RecordingScheduler(UnifiedSolverScheduler):
    """Keeps the samples that it goes through, in float32 on the CPU; those of the last run."""

    def _reset(self) -> None:
        super()._reset()
        self.positions: list[float] = []
        self.samples: list[Tensor] = []

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Makes a step, and keeps its sample; after the last one also the result."""
        assert self.schedule is not None
        self.positions.append(self.levels[len(self.samples) + self.schedule.skipped].log_snr)
        self.samples.append(sample.detach().float().cpu())
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        if len(self.samples) == len(self.timesteps):
            self.positions.append(self.levels[-1].log_snr)
            self.samples.append(result[0].detach().float().cpu())
        return result

    @property
    def trajectory(self) -> Trajectory:
        """The samples of the last run."""
        return Trajectory(list(self.positions), list(self.samples))


class FittingScheduler(UnifiedSolverScheduler):
    """Fits each step to a teacher's trajectory while it runs."""

    teacher: Trajectory

    def _reset(self) -> None:
        super()._reset()
        self.corrections: dict[int, tuple[float, ...]] = {}

    def _predict(self, place: int, generator: Any, like: Tensor) -> Tensor:
        x = super()._predict(place, generator, like)
        target = self.levels[place + 1]
        known = [part for node in self._nodes for part in (node.x0, node.eps)]
        matrix = torch.stack([part.flatten().double() for part in known], 1)
        missing = (self.teacher.at(target.log_snr).to(x) - x).flatten()
        gram = matrix.T @ matrix
        gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
        weights = torch.linalg.solve(gram, matrix.T @ missing.double())
        self.corrections[place] = tuple((weights / target.alpha).tolist())
        return x + (matrix @ weights).reshape(x.shape).to(x.dtype)

    @property
    def fitted(self) -> Schedule:
        """The schedule with the corrections of the last run."""
        assert self.schedule is not None
        steps = [replace(step, corrections=self.corrections.get(place, ()))
                 for place, step in enumerate(self.schedule.steps)]  # fmt: skip
        return replace(self.schedule, steps=tuple(steps))

"""The two rules by which SADA decides what to skip and how to fill the gap: error control, and the paper's.

Both look at guided predictions, decide for every sample of a batch on its own, compute in float32 or better,
and know the path only by step index.  ``u`` is the half log-SNR lambda, S = sigma / alpha.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..noise import Path
from .history import History
from .run import Update

__all__ = ["ErrorRule", "Rule", "StabilityRule"]

_FARTHEST = 12.0  # log-SNR beyond this (alpha or sigma nearly 0) is one place


class Rule(Protocol):
    """What `Sada` asks of a rule."""

    def reconstruct(self, call: Update) -> Tensor:
        """Returns the x0 of a skipped update, (B, *)."""

    def plan(self, call: Update, x0: Tensor, result: Any, ran: np.ndarray) -> np.ndarray:
        """Learns from an update and returns the samples that may skip the next one, bool (B)."""


def _position(path: Path, index: int) -> float:
    return max(-_FARTHEST, min(path[index].log_snr, _FARTHEST))


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


class ErrorRule:
    """Skips as long as the extrapolation's error, foretold from the last computed prediction, is small.

    x0 is extrapolated by the polynomial through the last n computed predictions in lambda.  Where one is
    computed, the extrapolation e is known to be wrong by |x0 - e|; the error at k further skips grows as
    the node polynomial, prod_j |u_k - u_j|.  The update from S to S' is x'/alpha' = (S'/S) x/alpha +
    (1 - S'/S) x0, so that an error of x0 moves the sample by (1 - S'/S) of it.  The next k updates are
    skipped while

        |x0 - e| / |x0|  x  prod_j |u_k - u_j| / prod_j |u_0 - u_j|  x  (1 - S'/S)  <  tolerance.

    Only computed predictions are ever compared (reconstructed ones are smooth by construction), so that the
    rule does not confirm itself; it is unchanged by rotations and reflections of the data.

    Arguments:
        tolerance: The bound above.
        max_skips: The largest number of updates in a row.
        order: The number n of predictions in the polynomial.
    """

    def __init__(self, tolerance: float, max_skips: int, order: int) -> None:
        self.tolerance, self.max_skips, self.order = tolerance, max_skips, order
        self.history = History(order + 1)
        self.todo = np.zeros(0, int)

    def reconstruct(self, call: Update) -> Tensor:
        """Returns the extrapolated x0."""
        return self.history.predict(_position(call.run.path, call.index), self.order)

    def interpolate(self, newest: Tensor, call: Update, old: Update) -> Tensor:
        """Returns the x0 of an earlier update ``old``, now that the one of ``call`` has been computed."""
        path = call.run.path
        enough = int(self.history.count.min())
        order = min(self.order + 1, enough) + 1
        return self.history.interpolate(
            _position(path, old.index), order, newest, _position(path, call.index)
        )

    def plan(self, call: Update, x0: Tensor, result: Any, ran: np.ndarray) -> np.ndarray:
        """Stores the computed predictions, and counts the updates that may be skipped."""
        path, here = call.run.path, _position(call.run.path, call.index)
        if not self.todo.size:
            self.todo = np.zeros(len(x0), int)
        known = self.history.count >= self.order if self.history.nodes.size else np.zeros(len(x0), bool)
        self.todo = np.maximum(self.todo - ~ran, 0)
        errors = np.full(len(x0), np.inf)
        if ran.any() and known.any():
            wrong = _norm(self.history.predict(here, self.order) - x0) / _norm(x0).clamp_min(1e-12)
            errors = np.where(known, wrong.double().cpu().numpy(), np.inf)
            errors = errors / np.maximum(self.history.distance(here, self.order), 1e-12)
        self.history.push(x0, here, ran)
        stages = getattr(call.run.scheduler, "order", 1)
        last = call.run.num_updates + call.run.first_index - 1
        allowed, count = ran & known, np.zeros(len(x0), int)
        for index in range(call.index + 1, min(call.index + self.max_skips, last - 1) + 1):
            growth = self.history.distance(_position(path, index), self.order)
            if _position(path, index) == _position(path, index + 1) or _position(path, index) == here:
                following = self.history.distance(_position(path, index + 1), self.order)
                growth = np.maximum(growth, following)  # a repeated level is not a free one
            with np.errstate(invalid="ignore"):
                allowed &= errors * growth * _influence(path, index, stages) < self.tolerance
            if not allowed.any():
                break
            count += allowed
        self.todo = np.where(ran, count, self.todo)
        return self.todo > 0


def _influence(path: Path, index: int, stages: int) -> float:
    """Returns how far an error of x0 moves the sample: 1 - S'/S for the update from ``index`` to the next.

    In the second stage of Heun and KDPM2, which take a derivative (x - x0) / S at the middle or the end of
    the step from S_prev, it is (S_prev - S') / S.
    """
    before, here, after = (math.exp(-max(path[i].log_snr, -50.0)) for i in (index - 1, index, index + 1))
    second = stages == 2 and index % 2 == 1
    return abs((before if second else here) - after) / here


class StabilityRule:
    """The rule of the SADA paper, per sample and in the correct time scale.

    With y = dx/dt of the probability-flow ODE, after the update from t_i to t_{i+1} = t_i - Delta

        predictor   x^_{i+1} = x_i - Delta (5/6 y_i + 5/6 y_{i-1} - 2/3 y_{i-2})
        criterion   mean((x_{i+1} - x^_{i+1}) (y_i - 2 y_{i-1} + y_{i-2})) < 0  ->  the next update is skipped
        step-wise reconstruction         x0 = (x^_{i+1} - sigma_{i+1} eps_i) / alpha_{i+1}
        multistep-wise reconstruction    x0 = Lagrange polynomial in the step index through stored nodes

    Multistep-wise reconstruction takes over in the late phase, where one of every ``interval`` steps is run
    and stored.  At most ``max_skips`` updates in a row are skipped.

    References:
        SADA: Stability-guided Adaptive Diffusion Acceleration (2025), arXiv 2507.17135.

    Arguments:
        max_skips: The largest number of updates skipped in a row.
        phase: The step at which the late phase begins; infinite for none.
        interval: The distance of nodes in the late phase.
        nodes: The number of nodes.
    """

    PREDICTOR = (5 / 6, 5 / 6, -2 / 3)

    def __init__(self, max_skips: int, phase: float, interval: int, nodes: int) -> None:
        self.max_skips, self.phase, self.interval, self.nodes = max_skips, phase, interval, nodes
        self.history = History(max(nodes, 1))
        self.velocities: list[Tensor] = []
        self.eps = self.predicted = torch.empty(0)
        self.in_row = np.zeros(0, int)

    def reconstruct(self, call: Update) -> Tensor:
        """Returns the step-wise x0, or the multistep-wise one in the late phase."""
        if call.step > self.phase and int(self.history.count.min()) >= self.nodes:
            return self.history.predict(float(call.step), self.nodes)
        level, path = call.run.path[call.index], call.run.path
        scale = float(path.to_time_coordinates(call.index, torch.ones((), dtype=torch.float64)))
        return (self.predicted - scale * level.sigma * self.eps) / (scale * level.alpha)

    def plan(self, call: Update, x0: Tensor, result: Any, ran: np.ndarray) -> np.ndarray:
        """Evaluates the criterion on the solver's own result."""
        path, index, step = call.run.path, call.index, call.step
        if not self.in_row.size:
            self.in_row = np.zeros(len(x0), int)
        if step % self.interval == 1:
            self.history.push(x0, float(step), np.ones(len(x0), bool))
        level = path[index]
        eps = (call.sample.to(x0.dtype) - level.alpha * x0) / level.sigma
        self.eps = eps
        self.velocities = [*self.velocities[-2:], path.velocity(index, x0, eps)]
        stable = self._stable(call, result)
        late = step >= self.phase and len(self.history.nodes) and self.history.count.min() >= self.nodes
        if late:  # this phase is not adaptive
            stable = np.full(len(x0), step % self.interval != 0)
        self.in_row = np.where(ran, 0, self.in_row + 1)
        return stable & (self.in_row < self.max_skips)

    def _stable(self, call: Update, result: Any) -> np.ndarray:
        path, index = call.run.path, call.index
        if len(self.velocities) < 3 or index + 1 >= len(path):
            return np.zeros(len(call.sample), bool)
        y2, y1, y0 = self.velocities
        delta = path.time(index) - path.time(index + 1)
        slope = sum(c * y for c, y in zip(self.PREDICTOR, (y0, y1, y2), strict=True))
        self.predicted = path.to_time_coordinates(index, call.sample) - delta * slope
        reached = path.to_time_coordinates(index + 1, result[0])
        mean = ((reached - self.predicted) * (y0 - 2 * y1 + y2)).flatten(1).mean(1)
        return (mean < 0).cpu().numpy()

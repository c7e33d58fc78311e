"""The two rules by which SADA decides what to skip and how to fill the gap: error control, and the paper's.

Both look at guided predictions, decide for every sample of a batch on its own, compute in float32 or better,
and know the path only by step index.  ``u`` is the half log-SNR lambda, S = sigma / alpha.  Each tells by one
criterion which samples skip the next update, and which cells of the others need not be computed in it.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..noise import Path
from .cells import WHOLE, Cells
from .history import History
from .run import Update

__all__ = ["ErrorRule", "Rule", "StabilityRule", "position"]

_FARTHEST = 12.0  # log-SNR beyond this (alpha or sigma nearly 0) is one place


class Rule(Protocol):
    """What `Sada` asks of a rule."""

    fills: bool
    """Whether cells that were not computed are reconstructed, instead of taken as the network gives them."""

    def reconstruct(self, call: Update) -> Tensor:
        """Returns the x0 of a skipped update, (B, *)."""

    def plan(self, call: Update, x0: Tensor, result: Any, fresh: np.ndarray) -> np.ndarray:
        """Learns from an update and returns the samples that may skip the next one, bool (B).

        Arguments:
            call: The update.
            x0: The prediction, with shape (B, *).
            result: What the scheduler returned.
            fresh: The cells that were computed, bool (B, T).
        """

    def stable(self, call: Update, tokens: float) -> np.ndarray:
        """Returns the cells that need not be computed in the next update, bool (B, T).

        Arguments:
            call: The update that was planned after.
            tokens: How unstable a cell may be; see `Sada`.
        """


def position(path: Path, index: int) -> float:
    """Returns the coordinate of an update: its half log-SNR, within bounds."""
    return max(-_FARTHEST, min(path[index].log_snr, _FARTHEST))


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
        cells: The cells, each of which has computed predictions of its own; the error of a sample is that of
            its cells together. Whole samples by default.
    """

    fills = True

    def __init__(self, tolerance: float, max_skips: int, order: int, cells: Cells = WHOLE) -> None:
        self.tolerance, self.max_skips, self.order = tolerance, max_skips, order
        self.history = History(order + 1)
        self.cells = cells
        self.todo = np.zeros(0, int)
        self.age = np.zeros((0, 1), int)  # updates since a cell was computed
        self.rates = np.zeros((0, 1))  # the error over prod_j |u - u_j|

    def reconstruct(self, call: Update) -> Tensor:
        """Returns the extrapolated x0."""
        return self.cells.join(self.history.predict(position(call.run.path, call.index), self.order))

    def interpolate(self, newest: Tensor, call: Update, old: Update) -> Tensor:
        """Returns the x0 of an earlier update ``old``, now that the one of ``call`` has been computed."""
        path, newest = call.run.path, self.cells.split(newest)
        enough = int(self.history.count.min())
        order = min(self.order + 1, enough) + 1
        return self.cells.join(
            self.history.interpolate(position(path, old.index), order, newest, position(path, call.index))
        )

    def plan(self, call: Update, x0: Tensor, result: Any, fresh: np.ndarray) -> np.ndarray:
        """Stores the computed predictions, and counts the updates that may be skipped."""
        fresh = fresh.reshape(len(fresh), -1)
        if not self.todo.size:
            self.todo, self.age = np.zeros(len(fresh), int), np.zeros(fresh.shape, int)
            self.rates = np.full(fresh.shape, np.inf)
        here, rows, ran = position(call.run.path, call.index), fresh.ravel(), np.any(fresh, 1)
        x0, known = self.cells.split(x0), self._known
        self.todo = np.maximum(self.todo - ~ran, 0)
        self.age = np.where(fresh, 0, self.age + 1)
        if rows.any() and known.any():
            pair = torch.stack([self.history.predict(here, self.order) - x0, x0])
            wrong, size = pair.flatten(2).norm(dim=2).double().cpu().numpy().reshape(2, *fresh.shape)
            size = np.maximum(np.sqrt((size**2).sum(1, keepdims=True)), 1e-12)
            rates = wrong / size / np.maximum(self._distance(here), 1e-12)
            self.rates = np.where(fresh & known, rates, self.rates)
        self.history.push(x0, here, rows)
        last = call.run.num_updates + call.run.first_index - 1
        allowed, count = ran & known.all(1), np.zeros(len(ran), int)
        for index in range(call.index + 1, min(call.index + self.max_skips, last - 1) + 1):
            with np.errstate(invalid="ignore"):
                error = np.sqrt((self._errors(call, index) ** 2).sum(1))
                allowed &= error < self.tolerance
            if not allowed.any():
                break
            count += allowed
        self.todo = np.where(ran, count, self.todo)
        return self.todo > 0

    def stable(self, call: Update, tokens: float) -> np.ndarray:
        """Returns the cells whose error is small, relative to those of the sample together.

        No cell is left out of more than twice ``max_skips`` updates in a row.
        """
        with np.errstate(invalid="ignore"):
            errors = self._errors(call, call.index + 1) * math.sqrt(self.cells.count)
            return self._known & (self.age < 2 * self.max_skips) & (errors < tokens * self.tolerance)

    def _errors(self, call: Update, index: int) -> np.ndarray:
        """Returns how far the sample would be off, relative to x0, were a cell extrapolated, (B, T)."""
        path, stages = call.run.path, getattr(call.run.scheduler, "order", 1)
        growth = self._distance(position(path, index))
        here = position(path, call.index)
        if position(path, index) in (position(path, index + 1), here):
            following = self._distance(position(path, index + 1))
            growth = np.maximum(growth, following)  # a repeated level is not a free one
        return self.rates * growth * _influence(path, index, stages)

    @property
    def _known(self) -> np.ndarray:
        """The cells that can be extrapolated, bool (B, T)."""
        if not self.history.nodes.size:
            return np.zeros(self.rates.shape, bool)
        return (self.history.count >= self.order).reshape(self.rates.shape)

    def _distance(self, coordinate: float) -> np.ndarray:
        return self.history.distance(coordinate, self.order).reshape(self.rates.shape)


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
        cells: The cells; those whose mean above is negative need not be computed. Whole samples by default.
    """

    fills = False
    PREDICTOR = (5 / 6, 5 / 6, -2 / 3)

    def __init__(self, max_skips: int, phase: float, interval: int, nodes: int, cells: Cells = WHOLE) -> None:
        self.max_skips, self.phase, self.interval, self.nodes = max_skips, phase, interval, nodes
        self.cells = cells
        self.history = History(max(nodes, 1))
        self.velocities: list[Tensor] = []
        self.eps = self.predicted = torch.empty(0)
        self.in_row = np.zeros(0, int)
        self.since = np.zeros(0, int)  # updates since the last one that was skipped
        self.means = np.zeros((0, 1))

    def reconstruct(self, call: Update) -> Tensor:
        """Returns the step-wise x0, or the multistep-wise one in the late phase."""
        if call.step > self.phase and int(self.history.count.min()) >= self.nodes:
            return self.history.predict(float(call.step), self.nodes)
        level, path = call.run.path[call.index], call.run.path
        scale = float(path.to_time_coordinates(call.index, torch.ones((), dtype=torch.float64)))
        return (self.predicted - scale * level.sigma * self.eps) / (scale * level.alpha)

    def plan(self, call: Update, x0: Tensor, result: Any, fresh: np.ndarray) -> np.ndarray:
        """Evaluates the criterion on the solver's own result."""
        path, index, step = call.run.path, call.index, call.step
        fresh = fresh.reshape(len(fresh), -1)
        ran = np.any(fresh, 1)
        if not self.in_row.size:
            self.in_row, self.since = np.zeros(len(ran), int), np.zeros(len(ran), int)
            self.means = np.zeros(fresh.shape)
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
        self.since = np.where(ran, self.since + 1, 0)
        return stable & (self.in_row < self.max_skips)

    def stable(self, call: Update, tokens: float) -> np.ndarray:
        """Returns the cells of negative mean; none at each ``max_skips``-th update since the last skip."""
        return (self.means < 0) & ((self.since + 1) % max(self.max_skips, 1) != 0)[:, None]

    def _stable(self, call: Update, result: Any) -> np.ndarray:
        """Returns the samples whose mean is negative, bool (B)."""
        path, index = call.run.path, call.index
        self.means = np.zeros_like(self.means)
        if len(self.velocities) < 3 or index + 1 >= len(path):
            return np.zeros(len(call.sample), bool)
        y2, y1, y0 = self.velocities
        delta = path.time(index) - path.time(index + 1)
        slope = sum(c * y for c, y in zip(self.PREDICTOR, (y0, y1, y2), strict=True))
        self.predicted = path.to_time_coordinates(index, call.sample) - delta * slope
        reached = path.to_time_coordinates(index + 1, result[0])
        product = self.cells.split((reached - self.predicted) * (y0 - 2 * y1 + y2))
        self.means = product.flatten(1).mean(1).double().cpu().numpy().reshape(self.means.shape)
        return self.means.mean(1) < 0

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
from .history import History, Shared
from .run import Update

__all__ = ["ErrorRule", "Rule", "StabilityRule", "position"]

_TINY = 1e-12
_FARTHEST = 12.0  # log-SNR beyond this (alpha or sigma nearly 0) is one place


class Rule(Protocol):
    """What `Sada` asks of a rule."""

    fills: bool
    """Whether cells that were not computed are reconstructed, instead of taken as the network gives them."""

    def reconstruct(self, call: Update) -> Tensor:
        """Returns the x0 of a skipped update, (B, *)."""

    def plan(self, call: Update, x0: Tensor, result: Any, fresh: np.ndarray | None) -> np.ndarray | None:
        """Learns from an update.

        Arguments:
            call: The update.
            x0: The prediction, with shape (B, *).
            result: What the scheduler returned.
            fresh: The cells that were computed, bool (B, T); None for all.

        Returns:
            The samples that may skip the next update, bool (B); None for none.
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
        self.todo: np.ndarray | int = 0
        self.age: np.ndarray | int = 0  # updates since a cell was computed
        self.rates: np.ndarray | float = math.inf  # the error over prod_j |u - u_j|
        self.shape = (0, cells.count)

    def reconstruct(self, call: Update) -> Tensor:
        """Returns the extrapolated x0."""
        return self.cells.join(self.history.predict(position(call.run.path, call.index), self.order))

    def interpolate(self, newest: Tensor, call: Update, old: Update) -> Tensor:
        """Returns the x0 of an earlier update ``old``, now that the one of ``call`` has been computed."""
        path, newest = call.run.path, self.cells.split(newest)
        order = min(self.order + 1, int(np.min(self.history.count()))) + 1
        return self.cells.join(
            self.history.interpolate(position(path, old.index), order, newest, position(path, call.index))
        )

    def plan(self, call: Update, x0: Tensor, result: Any, fresh: np.ndarray | None) -> np.ndarray | None:
        """Stores the computed predictions, and counts the updates that may be skipped."""
        x0, here = self.cells.split(x0), position(call.run.path, call.index)
        self.shape = (len(x0) // self.cells.count, self.cells.count)
        known, span = self.history.count() >= self.order, self.history.distance(here, self.order)
        norms = self._compare(x0, here) if known is True or np.any(known) else None
        self.history.push(x0, here, None if fresh is None else fresh.ravel())
        last = call.run.num_updates + call.run.first_index - 1
        coming = range(call.index + 1, min(call.index + self.max_skips, last - 1) + 1)
        if fresh is None and (norms is None or not self._is_promising(call, norms, span, coming)):
            self.todo = self.age = 0
            return None
        fresh = np.full(self.shape, True) if fresh is None else fresh.reshape(self.shape)
        ran, known = np.any(fresh, 1), self._cellwise(known)
        self.age = np.where(fresh, 0, self.age + 1)
        if norms is not None:
            self._measure(norms, span, fresh & known)
        self.todo = np.where(ran, self._count(call, ran & known.all(1), coming), np.maximum(self.todo - 1, 0))
        return self.todo > 0

    def stable(self, call: Update, tokens: float) -> np.ndarray:
        """Returns the cells whose error is small, relative to those of the sample together.

        No cell is left out of more than twice ``max_skips`` updates in a row.
        """
        known = self._cellwise(self.history.count() >= self.order)
        errors = self._errors(call, call.index + 1) * math.sqrt(self.cells.count)
        return known & (self.age < 2 * self.max_skips) & (errors < tokens * self.tolerance)

    def _compare(self, x0: Tensor, here: float) -> list[float]:
        """Returns the norms |x0 - e| of all cells, and then the norms |x0|."""
        pair = torch.cat([self.history.predict(here, self.order).sub_(x0), x0])
        return torch.linalg.vector_norm(pair, dim=list(range(1, x0.ndim))).tolist()

    def _is_promising(self, call: Update, norms: list[float], span: Shared, coming: range) -> bool:
        """Returns whether a sample may skip: what is known at less expense than of which, and how often."""
        if not coming or self.cells.count > 1 or isinstance(span, np.ndarray):
            return bool(coming)
        factor, half = self._growth(call, coming[0]) / max(span, _TINY), len(norms) // 2
        bounds = (self.tolerance * max(size, _TINY) for size in norms[half:])
        return any(wrong * factor < bound for wrong, bound in zip(norms[:half], bounds, strict=True))

    def _measure(self, norms: list[float], span: Shared, rows: np.ndarray) -> None:
        """Learns the errors of some cells, bool (B, T)."""
        wrong, size = np.reshape(norms, (2, *self.shape))
        scale = np.maximum(_together(size), _TINY)[:, None] * np.maximum(self._cellwise(span), _TINY)
        self.rates = np.where(rows, wrong / scale, self.rates)

    def _count(self, call: Update, allowed: np.ndarray, coming: range) -> np.ndarray:
        """Returns how many of the coming updates may be skipped, for the samples that are allowed to, (B)."""
        count = np.zeros(len(allowed), int)
        for index in coming:
            if not allowed.any():
                break
            allowed &= _together(self._errors(call, index)) < self.tolerance
            count += allowed
        return count

    def _errors(self, call: Update, index: int) -> np.ndarray:
        """Returns how far the sample would be off, relative to x0, were a cell extrapolated, (B, T)."""
        with np.errstate(invalid="ignore"):  # infinite rates of cells that are not known
            return np.multiply(self.rates, self._cellwise(self._growth(call, index)))

    def _growth(self, call: Update, index: int) -> Shared:
        """Returns how an error of x0 grows until an update, times how far it moves the sample."""
        path, stages = call.run.path, getattr(call.run.scheduler, "order", 1)
        here, there, following = (position(path, i) for i in (call.index, index, index + 1))
        growth = self.history.distance(there, self.order)
        if there in (following, here):  # a repeated level is not a free one
            growth = np.maximum(growth, self.history.distance(following, self.order))
        return growth * _influence(path, index, stages)

    def _cellwise(self, values: Shared) -> np.ndarray:
        """Returns what is known of all cells in their shape, (B, T)."""
        return values.reshape(self.shape) if isinstance(values, np.ndarray) else np.full(self.shape, values)


def _together(values: np.ndarray) -> np.ndarray:
    """Returns the norm over the cells (B, T) of each sample, (B)."""
    return values[:, 0] if values.shape[1] == 1 else np.sqrt((values**2).sum(1))


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
        if call.step > self.phase and np.min(self.history.count()) >= self.nodes:
            return self.history.predict(float(call.step), self.nodes)
        level, path = call.run.path[call.index], call.run.path
        scale = float(path.to_time_coordinates(call.index, torch.ones((), dtype=torch.float64)))
        return (self.predicted - scale * level.sigma * self.eps) / (scale * level.alpha)

    def plan(self, call: Update, x0: Tensor, result: Any, fresh: np.ndarray | None) -> np.ndarray:
        """Evaluates the criterion on the solver's own result."""
        path, index, step = call.run.path, call.index, call.step
        ran = np.ones(len(x0), bool) if fresh is None else np.any(fresh.reshape(len(x0), -1), 1)
        if not self.in_row.size:
            self.in_row, self.since = np.zeros(len(ran), int), np.zeros(len(ran), int)
            self.means = np.zeros((len(x0), self.cells.count))
        if step % self.interval == 1:
            self.history.push(x0, float(step))
        level = path[index]
        eps = (call.sample.to(x0.dtype) - level.alpha * x0) / level.sigma
        self.eps = eps
        self.velocities = [*self.velocities[-2:], path.velocity(index, x0, eps)]
        stable = self._stable(call, result)
        late = step >= self.phase and np.min(self.history.count()) >= self.nodes
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

"""Correction of the past: once a skipped stretch has ended, its solver updates are done again, better.

While steps are skipped, predictions can only be extrapolated.  The next computed prediction lies beyond them,
so that they can be interpolated; the updates of the solver since then cost nothing beside the network.  They
are repeated from the state that the scheduler had, which works for any deterministic scheduler, as the
corrector of a predictor-corrector method does for one family (UniPC, arXiv 2302.04867), and at no further
evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .accelerator import Proceed
from .history import select
from .run import Update

__all__ = ["Replay"]


@dataclass
class _Moment:
    """What is needed to repeat one update: the scheduler's state before it, and the call."""

    state: dict[str, Any]
    call: Update
    proceed: Proceed
    skipped: np.ndarray


class Replay:
    """The updates since the oldest stretch that a sample is still skipping."""

    def __init__(self) -> None:
        self._moments: list[_Moment] = []
        self._returned: Tensor | None = None
        self._version = 0

    def __bool__(self) -> bool:
        """Whether there are updates that may have to be repeated."""
        return bool(self._moments)

    def clear(self) -> None:
        """Forgets all updates."""
        self._moments.clear()

    def follows(self, sample: Tensor) -> bool:
        """Returns whether the pipeline goes on with the very sample that the last update gave."""
        last = self._returned
        if last is None or last.shape != sample.shape or last._version != self._version:
            return False  # none yet, or changed in place
        return last is sample or torch.equal(last, sample)

    def step(self, call: Update, proceed: Proceed, skipped: np.ndarray | None) -> Any:
        """Makes an update, and remembers it if it may have to be repeated.

        Arguments:
            call: The update.
            proceed: What makes it.
            skipped: The samples whose prediction is extrapolated, bool (B); None for none, or where no
                repetition is wanted.
        """
        if skipped is not None and skipped.any():
            del self._moments[: self._begin(skipped)]  # before the stretches that go on
            self._moments.append(_Moment(_state(call.run.scheduler), call, proceed, skipped))
        else:
            self._moments.clear()
        result = proceed(call)
        self._returned = result[0]
        self._version = result[0]._version
        return result

    def correct(self, call: Update, due: np.ndarray, interpolated: Callable[[Update], Tensor]) -> Update:
        """Repeats the updates of a stretch that has ended.

        Arguments:
            call: The update that ends it.
            due: The samples whose stretch has ended, bool (B).
            interpolated: Gives the better x0 at an earlier update, (B, *).

        Returns:
            The update with the corrected sample; the scheduler's memory is corrected as well.
        """
        scheduler, path = call.run.scheduler, call.run.path
        moments = self._moments[self._begin(due) :]
        if not moments:
            return call
        scheduler.__dict__.update(_state_copy(moments[0].state))
        sample = moments[0].call.sample
        for offset, moment in enumerate(moments):
            rows = due.copy()
            for later in moments[offset:]:
                rows &= later.skipped
            level, old = path[moment.call.index], moment.call
            better = level.output(interpolated(old), sample).to(old.output.dtype)
            moment.state = _state(scheduler)
            moment.call = replace(old, sample=sample, output=select(rows, better, old.output))
            sample = moment.proceed(moment.call)[0]
        return replace(call, sample=select(due, sample.to(call.sample.dtype), call.sample))

    def _begin(self, samples: np.ndarray) -> int:
        """Returns where the longest stretch begins that one of the samples has been skipping until now."""
        skipping, begin = samples.copy(), len(self._moments)
        for position in reversed(range(len(self._moments))):
            skipping &= self._moments[position].skipped
            if not skipping.any():
                break
            begin = position
        return begin


def _state(scheduler: Any) -> dict[str, Any]:
    """Returns what a scheduler remembers; schedulers change lists and samples, and replace the rest."""
    return _state_copy(scheduler.__dict__)


def _state_copy(state: dict[str, Any]) -> dict[str, Any]:
    copied = dict(state)
    for key, value in state.items():
        if isinstance(value, list):
            copied[key] = list(value)
        elif isinstance(value, Tensor) and value.ndim > 1:  # PNDM adds to its sum in place
            copied[key] = value.clone()
    return copied

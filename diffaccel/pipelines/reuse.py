"""Reuse of the last prediction.  Reduces to the plain pipeline for every=1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .accelerator import Accelerator, Proceed, option
from .run import Evaluation, Run

__all__ = ["Reuse"]


@dataclass
class Reuse(Accelerator):
    """Evaluates the networks only on every ``every``-th step and reuses their last outputs in between.

    The plainest accelerator: the baseline of all others, and the example of how to write one.  It serves any
    pipeline and any solver, and does not look at what it skips.

    Arguments:
        every: Steps per evaluation, at least 1.
    """

    name: ClassVar[str] = "reuse"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fast": {"every": 3}}
    exclusive: ClassVar[str] = "skip"
    trials: ClassVar[Mapping[str, Sequence[Any]]] = {"every": (2, 3, 4)}

    every: int = option(2, low=1)

    def start(self, run: Run) -> None:
        """Forgets the outputs of the last loop."""
        self.last: dict[tuple[str, int, int], Any] = {}

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Skips the evaluation, or runs it and keeps its output."""
        key = (call.network, call.branch, call.rows)  # guidance that ends in mid-call halves the rows
        if call.step % self.every and key in self.last:
            call.log(self, "skip", range(call.run.batch))
            return self.last[key]
        self.last[key] = output = proceed(call)
        return output

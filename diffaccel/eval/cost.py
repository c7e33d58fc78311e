"""What a run costs: interleaved wall-clock times, and floating-point operations."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Timing", "count_flops", "interleave"]


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one quantity.

    Arguments:
        values: The measurements, in the order of the rounds.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile; both the value itself for a single one."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


def interleave(
    tasks: Sequence[Callable[[], Any]], rounds: int, after: Callable[[int, int, Any], None]
) -> None:
    """Runs all tasks once in each round, in an order that alternates, so that drifts hit all alike (ABBA).

    Arguments:
        tasks: The functions to run.
        rounds: The number of rounds, at least 1.
        after: Called with the round, the task's position and its result.
    """
    for turn in range(rounds):
        order = range(len(tasks)) if turn % 2 == 0 else reversed(range(len(tasks)))
        for position in order:
            after(turn, position, tasks[position]())


def count_flops(task: Callable[[], Any]) -> int:
    """Returns the floating-point operations of matrix products, convolutions and attention in one run.

    Attention is computed by its plain formula meanwhile: torch does not count its fused kernels on CPU.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task()
    return int(counter.get_total_flops())

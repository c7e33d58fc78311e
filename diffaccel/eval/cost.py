"""What a run costs: interleaved wall-clock times, and floating-point operations."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Timing", "clock_outside", "count_flops", "interleave", "order_of", "timed"]


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


def order_of(turn: int, count: int) -> list[int]:
    """Returns the order of ``count`` tasks in a round: forward and backward in turn (ABBA), also rotated.

    So drifts hit all tasks alike; and as every two rounds begin one task later, none is always at an end.
    """
    shift = turn // 2 % max(count, 1)
    order = [*range(shift, count), *range(shift)]
    return order[::-1] if turn % 2 else order


def interleave(
    tasks: Sequence[Callable[[], Any]], rounds: int, after: Callable[[int, int, Any], None]
) -> None:
    """Runs all tasks once in each round, in the order of `order_of`.

    Arguments:
        tasks: The functions to run.
        rounds: The number of rounds, at least 1.
        after: Called with the round, the task's position and its result.
    """
    for turn in range(rounds):
        for position in order_of(turn, len(tasks)):
            after(turn, position, tasks[position]())


def timed(task: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Returns a task's result and its wall-clock seconds, until the device has finished."""
    _wait(device)
    begin = time.perf_counter()
    result = task()
    _wait(device)
    return result, time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def clock_outside(pipe: Any, device: torch.device) -> Iterator[list[float]]:
    """Collects the seconds that a pipeline, accelerated or not, spends in VAE and text encoders.

    Arguments:
        pipe: The pipeline.
        device: Where it runs.
    """
    seconds: list[float] = []

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result, elapsed = timed(lambda: function(*args, **kwargs), device)
            seconds.append(elapsed)
            return result

        return call

    with ExitStack() as undo:
        for name, module in getattr(pipe, "components", {}).items():
            if not isinstance(module, nn.Module) or not name.startswith(("vae", "text_encoder")):
                continue
            for attribute in ("forward",) if name.startswith("text_encoder") else ("encode", "decode"):
                if hasattr(module, attribute):
                    undo.callback(_put_back, module, attribute, module.__dict__.get(attribute))
                    module.__dict__[attribute] = clocked(getattr(module, attribute))
        yield seconds


def _put_back(module: nn.Module, attribute: str, replaced: Any) -> None:
    if replaced is None:
        del module.__dict__[attribute]
    else:
        module.__dict__[attribute] = replaced


def count_flops(task: Callable[[], Any]) -> int:
    """Returns the floating-point operations of matrix products, convolutions and attention in one run.

    Attention is computed by its plain formula meanwhile: torch does not count its fused kernels on CPU.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task()
    return int(counter.get_total_flops())

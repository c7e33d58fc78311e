"""What a run costs: interleaved wall-clock times, calls, floating-point operations, and memory."""

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..errors import OptionError

__all__ = [
    "Calls",
    "Memory",
    "Timing",
    "bootstrap_ci",
    "clock_outside",
    "count_calls",
    "count_flops",
    "flops_by_module",
    "interleave",
    "order_of",
    "peak_memory",
    "timed",
]

DRAWS = 2000
"""Resamples of a bootstrap: 2.5 % of them, plus or minus 0.35 %, are beyond each end of a 95 % interval."""


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

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of the median; too narrow for fewer than 6 values (`bootstrap_ci`)."""
        return bootstrap_ci(self.values)


def bootstrap_ci(values: Sequence[float], statistic: Callable[[Sequence[float]], float] = statistics.median,
                 level: float = 0.95, seed: int = 0) -> tuple[float, float]:  # fmt: skip
    """Returns the percentile bootstrap interval of a statistic of independent measurements.

    Of few values it is too narrow. The median lies between the least and the largest of n values with
    probability ``1 - 2 ** (1 - n)``, so that 95 % needs 6 of them; from there on, the interval of the median
    holds 91 to 95 % in simulations. That of a mean of skewed values holds 85 % for 10 and 93 % for 40.

    References:
        Efron, Bootstrap Methods: Another Look at the Jackknife, 1979, doi 10.1214/aos/1176344552.

    Arguments:
        values: The measurements, at least 1; of ratios in pairs it is a paired interval.
        statistic: The statistic, of a list of as many values.
        level: The probability that the interval is to hold the truth, in (0, 1).
        seed: The seed of the resamples.

    Returns:
        The low and the high end; both the statistic itself for a single value.

    Raises:
        OptionError: If there is no value, or the level is out of range.
    """
    if not values or not 0 < level < 1:
        raise OptionError(f"{len(values)} values and level={level}; expected at least 1, and within (0, 1)")
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    picks = (generator.integers(len(array), size=len(array)) for _ in range(DRAWS))
    found = [statistic(array[pick].tolist()) for pick in picks]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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

    A product and its sum are two operations (a MAC). Attention is computed by its plain formula meanwhile:
    torch does not count its fused kernels on CPU. All of a causal or masked attention counts, and compiled
    modules count as they would uncompiled.
    """
    return flops_by_module(task).get("Global", 0)


def flops_by_module(task: Callable[[], Any]) -> dict[str, int]:
    """Returns what `count_flops` counts by module: ``Class.name`` from the outermost module's class on."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task()
    return {name: int(sum(found.values())) for name, found in counter.get_flop_counts().items()}


@dataclass
class Calls:
    """How often a denoiser was called.

    Arguments:
        calls: The calls: with N steps, N where guidance doubles the batch and 2 N where it calls twice.
        rows: The sizes of their batches, summed: 2 N for each image in both cases.
    """

    calls: int = 0
    rows: int = 0

    def per_image(self, images: int) -> float:
        """Returns the rows for each of so many images: a paper's NFE, or twice it with guidance."""
        return self.rows / images


@contextmanager
def count_calls(module: nn.Module) -> Iterator[Calls]:
    """Counts the calls of a denoiser, whatever calls it, without a change to it.

    A call counts when the module is entered: one that an accelerator then answers from its memory counts
    as well, in part or whole, and is told apart by `count_flops`.

    Arguments:
        module: The denoiser; its batch is the first dimension, or the length, of ``sample`` or
            ``hidden_states`` or else of its first argument.
    """
    counted = Calls()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        counted.calls += 1
        counted.rows += _batch_size(args, kwargs)

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    named = [kwargs[name] for name in ("sample", "hidden_states") if kwargs.get(name) is not None]
    inputs = [*named, *args, *(value for value in kwargs.values() if isinstance(value, torch.Tensor))]
    if not inputs:
        raise OptionError("the module is called without an input; rows are counted by the first one")
    return len(inputs[0])


@dataclass(frozen=True)
class Memory:
    """The most memory that was in use during a run, in bytes.

    Arguments:
        before: What was in use at its beginning, the weights among it.
        peak: The most that was in use at once.
        reserved: The most that torch held from the device; None on CPU.
        source: Where the numbers are from: "cuda", "VmHWM" or "ru_maxrss" (see `peak_memory`).
    """

    before: int
    peak: int
    reserved: int | None
    source: str

    @property
    def growth(self) -> int:
        """What the run took beyond what was in use before."""
        return max(self.peak - self.before, 0)


def peak_memory(task: Callable[[], Any], device: torch.device) -> tuple[Any, Memory]:
    """Returns a task's result, and the memory that it took.

    On CUDA that is the memory of torch's allocator (``max_memory_allocated``, and ``max_memory_reserved``,
    after its cache was emptied), without the context of the driver and other libraries.

    On CPU it is the resident memory of the whole process, all threads and libraries included:

    - "VmHWM", on Linux: the kernel's high-water mark, which is reset at the beginning after free memory was
      given back to the system; exact but for the kernel's own rounding (about 1 MB), and for what the task
      could take from memory that was free but could not be given back.
    - "ru_maxrss", elsewhere: the high-water mark since the process began, so that ``peak`` is too large, and
      ``growth`` too small, if an earlier peak was higher; a fresh process for each task avoids it.

    Arguments:
        task: The function to run, once; a first run also takes what is loaded only once.
        device: Where it runs: "cuda" or "cpu".

    Raises:
        OptionError: If the memory of the device cannot be told.
    """
    gc.collect()
    if device.type == "cuda":
        return _peak_on_cuda(task, device)
    if device.type != "cpu":
        raise OptionError(f"the peak memory on {device.type!r} is not known; known: 'cpu', 'cuda'")
    return _peak_of_process(task) if _reset_peak() else _peak_since_start(task)


def _peak_on_cuda(task: Callable[[], Any], device: torch.device) -> tuple[Any, Memory]:
    _wait(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = task()
    _wait(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return result, Memory(before, peak, reserved, "cuda")


def _reset_peak() -> bool:
    """Gives free memory back and resets the high-water mark; returns whether that is possible here."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _resident("VmHWM") > 0
    except (OSError, KeyError):
        return False


def _resident(name: str) -> int:
    """Returns a line of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(values[name].split()[0])


def _peak_of_process(task: Callable[[], Any]) -> tuple[Any, Memory]:
    before = _resident("VmRSS")
    result = task()
    return result, Memory(before, _resident("VmHWM"), None, "VmHWM")


def _peak_since_start(task: Callable[[], Any]) -> tuple[Any, Memory]:
    try:
        import resource
    except ImportError:
        raise OptionError("the peak memory of a process is not known on this system") from None

    unit = 1 if sys.platform == "darwin" else 1024

    def highest() -> int:
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = highest()
    result = task()
    return result, Memory(before, highest(), None, "ru_maxrss")

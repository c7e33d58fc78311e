"""What happened in one accelerated call: evaluations requested and run, who skipped what, and time spent."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

__all__ = ["Action", "Count", "Report", "Stopwatch"]


class Action(NamedTuple):
    """One intervention of an accelerator.

    Attributes:
        step: The solver update, counted from 0 in its sampling loop.
        branch: The call of this network within the step (0, or 1 for a second guidance branch).
        network: The component's name.
        accelerator: The accelerator's name.
        what: ``"skip"`` or another word of the accelerator.
        samples: The positions in the batch that are concerned.
    """

    step: int
    branch: int
    network: str
    accelerator: str
    what: str
    samples: tuple[int, ...]


@dataclass
class Count:
    """The evaluations of one network: those that the pipeline asked for, and those run (per image).

    Arguments:
        requested: Evaluations that the pipeline asked for.
        evaluated: Those that were run, per image.
        rows: Their rows.
        saved: Of those that were run the part, in evaluations, whose tokens were left out in blocks.
        omitted: Calls of the network's modules that were not made, but inherited or left out, for the whole
            batch. What is inside of such a module does not count by itself.
    """

    requested: int = 0
    evaluated: float = 0.0
    rows: int = 0
    saved: float = 0.0
    omitted: int = 0


class Stopwatch:
    """Adds up the seconds that named parts take; on CUDA with events, read once at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    def time(self, part: str, function: Callable[[], Any], device: torch.device | None = None) -> Any:
        """Calls a function and books its time under ``part``."""
        if device is not None and device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            result = function()
            last.record()
            self._events.append((part, first, last))
            return result
        begin = time.perf_counter()
        result = function()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin
        return result

    def finish(self) -> dict[str, float]:
        """Waits for the events and returns the seconds of all parts."""
        for part, begin, end in self._events:
            end.synchronize()
            self.seconds[part] = self.seconds.get(part, 0.0) + begin.elapsed_time(end) / 1000
        self._events.clear()
        return self.seconds


@dataclass
class Report:
    """The account of one pipeline call; ``pipe.accel.report`` is the last one.

    Arguments:
        stack: The one-line tags of the accelerators.
        counts: The evaluations by network, auxiliary networks included.
        actions: All interventions, in order.
        updates: The number of solver updates.
        batch: The number of samples.
        seconds: The seconds by part: ``denoiser``, ``vae``, ``text_encoder`` and ``total``.
        auxiliary: The networks that feed the denoiser, such as a ControlNet.
    """

    stack: tuple[str, ...] = ()
    counts: dict[str, Count] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    updates: int = 0
    batch: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    auxiliary: tuple[str, ...] = ()

    @property
    def requested(self) -> int:
        """Evaluations of the denoisers that the pipeline asked for."""
        return sum(count.requested for name, count in self.counts.items() if name not in self.auxiliary)

    @property
    def evaluated(self) -> float:
        """Evaluations of the denoisers that were run, per image: an average over the batch."""
        return sum(count.evaluated for name, count in self.counts.items() if name not in self.auxiliary)

    @property
    def skipped(self) -> float:
        """Evaluations of the denoisers that were not run, per image."""
        return self.requested - self.evaluated

    @property
    def tokens(self) -> float:
        """The part of the tokens that was computed in the evaluations that were run, in [0, 1]."""
        saved = sum(count.saved for name, count in self.counts.items() if name not in self.auxiliary)
        return 1 - saved / self.evaluated if saved else 1.0

    @property
    def omitted(self) -> int:
        """Calls of the denoisers' modules that were not made in the evaluations that were run."""
        return sum(count.omitted for name, count in self.counts.items() if name not in self.auxiliary)

    def skipped_steps(self, sample: int = 0) -> list[int]:
        """Returns the steps whose denoiser was skipped for one sample of the batch."""
        steps = {
            action.step
            for action in self.actions
            if action.what == "skip" and action.network not in self.auxiliary and sample in action.samples
        }
        return sorted(steps)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data, for JSON."""
        return {
            "stack": list(self.stack),
            "requested": self.requested,
            "evaluated": self.evaluated,
            "skipped": self.skipped,
            "tokens": self.tokens,
            "omitted": self.omitted,
            "updates": self.updates,
            "batch": self.batch,
            "seconds": self.seconds,
            "networks": {name: vars(count) for name, count in self.counts.items()},
            "actions": [action._asdict() for action in self.actions],
        }

    def __str__(self) -> str:
        what = f"{self.evaluated:.4g} of {self.requested} evaluations per image, {self.updates} updates"
        if self.tokens < 1:
            what += f", {100 * self.tokens:.3g} % of the tokens"
        if self.omitted:
            what += f", {self.omitted} calls of modules omitted"
        parts = ", ".join(f"{part} {value:.2f} s" for part, value in self.seconds.items())
        skippers: dict[str, set[int]] = {}
        for action in self.actions:
            skippers.setdefault(f"{action.accelerator} {action.what}", set()).add(action.step)
        lines = [f"{who} at steps {', '.join(map(str, sorted(steps)))}" for who, steps in skippers.items()]
        return "\n".join([what, *lines, *([parts] if parts else [])])

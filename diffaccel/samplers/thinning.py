"""Searched timesteps with thinner networks: ``pipe.to(accel="autodiffusion:FILE")``.

References:
    | AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model
    | Acceleration (2023), https://arxiv.org/abs/2309.10438
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from ..errors import DiffaccelError, UnsupportedPipeline
from ..pipelines.accelerator import Accelerator, Proceed, option
from ..pipelines.identity import differs_from
from ..pipelines.layers import residual_layers, skip_path
from ..pipelines.run import BlockCall, Evaluation, Run, denoisers_of
from .family import solver_of
from .schedule import Schedule, ScheduleError

__all__ = ["AutoDiffusion", "ThinnedSchedule"]

VERSION = 1


@dataclass(frozen=True)
class ThinnedSchedule:
    """A solver's schedule, and the layers that are left out at each of its evaluations.

    Arguments:
        schedule: The nodes and steps; with no analytic first step.
        dropped: For each evaluation the sorted names of the denoiser's layers that are left out, of those
            that `pipelines.layers.residual_layers` knows.
        facts: What is known of it, such as the model that it was searched for.
    """

    schedule: Schedule
    dropped: tuple[tuple[str, ...], ...]
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Checks the schedule.

        Raises:
            ScheduleError: If it is not one set of layers an evaluation.
        """
        names = tuple(tuple(sorted(layers)) for layers in self.dropped)
        if not all(isinstance(name, str) for layers in names for name in layers):
            raise ScheduleError(f"dropped layers are {self.dropped!r}; expected names")
        if len(names) != len(self.schedule.steps) or self.schedule.skipped:
            raise ScheduleError(
                f"{len(names)} sets of dropped layers for {self.schedule.evaluations} evaluations"
            )
        object.__setattr__(self, "dropped", names)

    def to_dict(self) -> dict[str, Any]:
        """Returns the schedule as plain data."""
        return {"version": VERSION, "schedule": self.schedule.to_dict(),
                "dropped": [list(layers) for layers in self.dropped], "facts": self.facts}  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> "ThinnedSchedule":
        """Returns a schedule from plain data.

        Raises:
            ScheduleError: If it is of another version, or no such schedule.
        """
        if not isinstance(data, Mapping) or data.get("version") != VERSION or "dropped" not in data:
            raise ScheduleError(f"no schedule of `diffaccel search autodiffusion`, version {VERSION}")
        try:
            schedule = Schedule.from_dict(data["schedule"])
            return cls(schedule, tuple(tuple(names) for names in data["dropped"]), dict(data["facts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ScheduleError(f"no schedule: {error}") from None

    @classmethod
    def load(cls, file: Path) -> "ThinnedSchedule":
        """Reads a schedule from a JSON file.

        Raises:
            ScheduleError: If the file cannot be read, or holds something else.
        """
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # a ScheduleError is a ValueError
            raise ScheduleError(f"cannot read the schedule {str(file)!r}: {error}") from None


@dataclass
class AutoDiffusion(Accelerator):
    """Samples at searched timesteps, and leaves layers of the denoiser out at some of them.

    For the length of a call the pipeline has a `UnifiedSolverScheduler` with the schedule, and a dropped
    layer's call gives what its skip path gives. num_inference_steps of the call is the schedule's number of
    evaluations. Both halves of guidance have the same layers.

    Arguments:
        file: What ``diffaccel search autodiffusion`` has written.

    References:
        | AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion
        | Model Acceleration (2023), https://arxiv.org/abs/2309.10438
    """

    name: ClassVar[str] = "autodiffusion"
    exclusive: ClassVar[str] = "solver"
    shorthand: ClassVar[str] = "file"

    file: str = option("")

    def __post_init__(self) -> None:
        """Checks the options, and reads the file when it is first needed."""
        super().__post_init__()
        self._known: ThinnedSchedule | None = None

    @classmethod
    def of(cls, thinned: ThinnedSchedule) -> Self:
        """Returns the accelerator of a schedule that is in no file."""
        made = cls()
        made._known = thinned
        return made

    @property
    def thinned(self) -> ThinnedSchedule:
        """The schedule.

        Raises:
            ScheduleError: If the file cannot be read.
        """
        if self._known is None:
            self._known = ThinnedSchedule.load(Path(self.file).expanduser())
        return self._known

    def check(self, pipe: Any) -> str | None:
        """Returns why the schedule does not fit the pipeline."""
        if self._known is None and not self.file:
            return "it needs a schedule: `diffaccel search autodiffusion MODEL` makes one; give its file"
        try:
            self.scheduler(pipe, {})
            self._layers(pipe)
        except DiffaccelError as error:
            return str(error)
        return None

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns the solver with the schedule."""
        return solver_of(pipe.scheduler, schedules=[self.thinned.schedule.to_dict()])

    def _layers(self, pipe: Any) -> dict[nn.Module, str]:
        """Returns the layers that are dropped at some evaluation, with their names.

        Raises:
            UnsupportedPipeline: If the denoiser is another one, or has no such layers.
        """
        networks = list(denoisers_of(pipe).values())
        wanted = {name for names in self.thinned.dropped for name in names}
        if not wanted:
            return {}
        if reason := differs_from(pipe, self.thinned.facts.get("family", {})):
            raise UnsupportedPipeline(reason)
        found = [residual_layers(network) for network in networks]
        if missing := sorted(wanted - set(found[0])):
            raise UnsupportedPipeline(f"the denoiser has no layer {missing[0]!r} that can be left out")
        return {layer: name for layers in found for name, layer in layers.items() if name in wanted}

    def start(self, run: Run) -> None:
        """Begins a loop."""
        self._names = self._layers(run.pipe)
        self._dropped: frozenset[str] = frozenset()

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Chooses the layers of this evaluation."""
        self._dropped = frozenset(self.thinned.dropped[call.index])
        if self._dropped:
            call.log(self, "thin", range(call.run.batch))
        return proceed(call)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Its own kind, and that of what works on blocks."""
        return (self.exclusive, "blocks")

    def blocks(self, pipe: Any) -> list[nn.Module]:
        """Returns the layers that are dropped at some evaluation."""
        return list(self._layers(pipe))

    def block(self, call: BlockCall, proceed: Proceed) -> Any:
        """Leaves the layer's body out, or runs it."""
        if self._names[call.module] in self._dropped:
            return skip_path(call.module, call.args, call.kwargs)
        return proceed(call)

"""The decisions of a solver, step by step, as plain data that is checked when it is made.

The nodes are noise-to-signal ratios sigma / alpha, so that a schedule means the same for every kind of model.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import DiffaccelError, closest

__all__ = ["PREDICTIONS", "SCALINGS", "Schedule", "ScheduleError", "Step", "load_schedules"]

VERSION = 1
PREDICTIONS = ("sample", "epsilon", "theta")
SCALINGS = ("none", "bh1", "bh2")
ANALYTIC = ("none", "noise", "mean")
MAX_ORDER = 4
KEPT = 5
"""The nodes that are remembered."""


class ScheduleError(DiffaccelError, ValueError):
    """A schedule that no solver can follow, or a schedule file that is damaged or of another version."""


@dataclass(frozen=True)
class Step:
    """The decisions of one step.

    Arguments:
        order: The Taylor order, 1 to 4; at the beginning as many as there are nodes.
        prediction: What is extrapolated: "sample" (x0), "epsilon", or "theta" (see `exponential`).
        scaling: The factor of the first derivative: "none", or "bh1" / "bh2" of UniPC; bh2 makes order 2 the
            midpoint rule of DPM-Solver.
        relaxation: Without a scaling, the factor 1 + relaxation h.
        damping: The factor of the second derivative; 0.5 is what DPM-Solver's code does at order 3.
        estimate: The nodes beside the start that estimate the first derivative; 0 for one less than the
            order.
        points: The nodes of the stencil, counted back from the newest, which is 0; None for the newest ones.
        start: The node that the step starts from, counted likewise.
        corrector: Whether the next evaluation corrects the step, at no cost.
        corrections: What is added to the step's x / alpha: factors of x0 and eps of the newest nodes, in
            turn, as `fitting` finds them for a model.
    """

    order: int = 1
    prediction: Literal["sample", "epsilon", "theta"] = "sample"
    scaling: Literal["none", "bh1", "bh2"] = "none"
    relaxation: float = 0.0
    damping: float = 1.0
    estimate: int = 0
    points: tuple[int, ...] | None = None
    start: int = 0
    corrector: bool = False
    corrections: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Checks the decisions.

        Raises:
            ScheduleError: Naming the one that is impossible.
        """
        if self.prediction not in PREDICTIONS:
            raise ScheduleError(
                f"no prediction {self.prediction!r}; {closest(str(self.prediction), PREDICTIONS)}"
            )
        if self.scaling not in SCALINGS:
            raise ScheduleError(f"no scaling {self.scaling!r}; {closest(str(self.scaling), SCALINGS)}")
        for name, low, high in (("order", 1, MAX_ORDER), ("estimate", 0, MAX_ORDER), ("start", 0, KEPT)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ScheduleError(f"{name} is {value!r}; expected {low} to {high}")
        for name in ("relaxation", "damping"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ScheduleError(f"{name} is {value!r}; expected a finite number")
        self._check_corrections()
        if type(self.corrector) is not bool:
            raise ScheduleError(f"corrector is {self.corrector!r}; expected true or false")
        if self.points is not None:
            points = tuple(self.points)
            object.__setattr__(self, "points", points)
            whole = all(type(j) is int and j >= 0 for j in points)
            if not whole or len(set(points)) < len(points):
                raise ScheduleError(f"points are {points!r}; expected different numbers of nodes")

    def at(self, number: int, to_zero: bool, last: bool) -> "Step":
        """Returns the step with what is possible at its place in a schedule.

        Arguments:
            number: The steps before it.
            to_zero: Whether it ends at S = 0.
            last: Whether no evaluation follows it.
        """
        order = min(self.order, number + 1)
        if to_zero and self.prediction != "theta":
            order = 1
        same = order == 1 and self.prediction == "epsilon"  # the same step, also from pure noise
        prediction = "sample" if same else self.prediction
        corrector = self.corrector and not last and not to_zero
        return dataclasses.replace(self, order=order, prediction=prediction, corrector=corrector)

    def _check_corrections(self) -> None:
        object.__setattr__(self, "corrections", tuple(self.corrections))
        good = all(isinstance(value, float) and math.isfinite(value) for value in self.corrections)
        if not good or len(self.corrections) % 2:
            raise ScheduleError(f"corrections are {self.corrections!r}; expected pairs of finite numbers")
        if self.corrections and self.corrector:
            raise ScheduleError("a step with corrections cannot have a corrector, which would undo them")

    def to_dict(self) -> dict[str, Any]:
        """Returns the decisions that differ from the defaults."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                 if getattr(self, f.name) != f.default}  # fmt: skip
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


@dataclass(frozen=True)
class Schedule:
    """The nodes of a solver and its steps between them.

    Arguments:
        sigmas: The ratios sigma / alpha of the nodes, falling, N + 1 of them; the last may be 0.
        steps: The N steps.
        analytic_first: "none"; or what stands for the first evaluation, which saves it: "noise" (eps is the
            sample) or "mean" (x0 is 0).
        std: The data's standard deviation of the prediction "theta".
        unit_scale: Whether the result is x / alpha, for decoders that take the noise of a last node above 0.
        facts: What is known of it, such as the model that it was searched for.
    """

    sigmas: tuple[float, ...]
    steps: tuple[Step, ...]
    analytic_first: Literal["none", "noise", "mean"] = "none"
    std: float = 0.5
    unit_scale: bool = False
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Checks the schedule.

        Raises:
            ScheduleError: Naming what no solver could follow.
        """
        try:
            object.__setattr__(self, "sigmas", tuple(float(sigma) for sigma in self.sigmas))
        except (TypeError, ValueError):
            raise ScheduleError(f"sigmas are {self.sigmas!r}; expected numbers") from None
        object.__setattr__(self, "steps", tuple(self.steps))
        if len(self.sigmas) != len(self.steps) + 1 or not self.steps:
            raise ScheduleError(
                f"{len(self.sigmas)} nodes and {len(self.steps)} steps; expected one node more"
            )
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if not falling or not all(math.isfinite(s) for s in self.sigmas) or self.sigmas[-1] < 0:
            raise ScheduleError(
                f"sigmas are {list(self.sigmas)}; expected falling numbers, the last at least 0"
            )
        if self.analytic_first not in ANALYTIC:
            raise ScheduleError(
                f"no analytic_first {self.analytic_first!r}; {closest(self.analytic_first, ANALYTIC)}"
            )
        if self.analytic_first != "none" and len(self.steps) < 2:
            raise ScheduleError("an analytic first step needs a second one")
        if not self.std > 0 or not math.isfinite(self.std):
            raise ScheduleError(f"std is {self.std}; expected a positive number")
        if type(self.unit_scale) is not bool or not isinstance(self.facts, dict):
            raise ScheduleError("unit_scale must be true or false, and facts a mapping")
        for number, step in enumerate(self.steps):
            self._check_step(number, step)

    def _check_step(self, number: int, step: Step) -> None:
        if step.order > number + 1:
            raise ScheduleError(
                f"step {number} has order {step.order}, and only {number + 1} nodes are known"
            )
        if max(step.start, step.estimate, *(step.points or (0,))) > number:
            raise ScheduleError(f"step {number} uses nodes that are not known; there are {number + 1}")
        if max(step.start, *(step.points or (0,))) >= KEPT:
            raise ScheduleError(f"step {number} uses nodes that are forgotten; the last {KEPT} are known")
        if step.points is not None and len({*step.points} - {step.start}) < max(
            step.order - 1, step.estimate
        ):
            raise ScheduleError(
                f"step {number} has order {step.order}, for which the points {step.points} are too few"
            )
        if len(step.corrections) > 2 * min(number + 1, KEPT):
            raise ScheduleError(f"step {number} has corrections of nodes that are not known")
        if self.sigmas[number + 1] == 0 and step.order > 1 and step.prediction != "theta":
            raise ScheduleError(
                f"step {number} ends at 0, where {step.prediction!r} has order 1, not {step.order}"
            )
        last = number == len(self.steps) - 1
        if step.corrector and last:
            raise ScheduleError("the last step cannot have a corrector: no evaluation follows it")
        if step.corrector and number < self.skipped:
            raise ScheduleError("an analytic first step cannot have a corrector")
        if step.corrector and self.sigmas[number + 1] == 0:
            raise ScheduleError(f"step {number} ends at 0 and cannot have a corrector")

    @property
    def skipped(self) -> int:
        """The evaluations that an analytic first step saves: 1, or 0 without one."""
        return int(self.analytic_first != "none")

    @property
    def evaluations(self) -> int:
        """The evaluations of the network."""
        return len(self.steps) - self.skipped

    def to_dict(self) -> dict[str, Any]:
        """Returns the schedule as plain data."""
        return {
            "version": VERSION, "sigmas": list(self.sigmas), "steps": [step.to_dict() for step in self.steps],
            "analytic_first": self.analytic_first, "std": self.std, "unit_scale": self.unit_scale,
            "facts": self.facts,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Schedule":
        """Returns a schedule from plain data.

        Raises:
            ScheduleError: If it is of another version, or no schedule.
        """
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, Mapping) else None
            raise ScheduleError(f"a schedule of version {version!r}; this diffaccel reads version {VERSION}")
        known = {"version", *(f.name for f in dataclasses.fields(cls))}
        if unknown := sorted(set(data) - known):
            raise ScheduleError(f"a schedule with {unknown[0]!r}; {closest(unknown[0], known)}")
        try:
            steps = [_step(part) for part in data["steps"]]
            rest = {
                name: data[name] for name in ("analytic_first", "std", "unit_scale", "facts") if name in data
            }
            return cls(tuple(data["sigmas"]), tuple(steps), **rest)
        except (KeyError, TypeError) as error:
            raise ScheduleError(f"no schedule: {error}") from None


def _step(data: Mapping[str, Any]) -> Step:
    known = [f.name for f in dataclasses.fields(Step)]
    if unknown := sorted(set(data) - set(known)):
        raise ScheduleError(f"a step with {unknown[0]!r}; {closest(unknown[0], known)}")
    points = data.get("points")
    return Step(**{**data, "points": None if points is None else tuple(points)})


def load_schedules(path: Path) -> list[Schedule]:
    """Reads schedules from a JSON file: one, or a list of them for several numbers of evaluations.

    Raises:
        ScheduleError: If the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScheduleError(f"cannot read the schedules {str(path)!r}: {error}") from None
    parts: Sequence[Any] = data if isinstance(data, list) else [data]
    try:
        return [Schedule.from_dict(part) for part in parts]
    except ScheduleError as error:
        raise ScheduleError(f"{str(path)!r}: {error}") from None

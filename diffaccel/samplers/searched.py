"""Searched schedules as an accelerator: ``pipe.to(accel="s3")`` or ``pipe.to(accel="s3:FILE")``."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UnsupportedPipeline
from ..pipelines.accelerator import option
from ..pipelines.branches import guidance_of
from ..pipelines.identity import STEPS_KEY
from .family import SolverAccelerator, family_of, solver_of
from .schedule import Schedule, ScheduleError, load_schedules

__all__ = ["S3", "fitting", "shipped"]

TABLES = Path(__file__).parent / "tables"


@functools.cache
def shipped() -> tuple[Schedule, ...]:
    """Returns the schedules that ship with the package, all models together."""
    return tuple(schedule for file in sorted(TABLES.glob("*.json")) for schedule in load_schedules(file))


def fitting(pipe: Any, file: str = "", guidance: float | None = None) -> list[Schedule]:
    """Returns the schedules that fit a pipeline's model, one for each number of evaluations.

    Arguments:
        pipe: The pipeline.
        file: A file of schedules, which must be for the model's path, and for the model where they have
            corrections; the shipped ones if it is empty, which must be for the model.
        guidance: The guidance scale; None for the pipeline's own. Of several schedules of one number of
            evaluations, the one is taken that was searched for the nearest.

    Raises:
        ScheduleError: If the file cannot be read, none of its schedules is for the model's path, or several
            are for the same number of evaluations and the same guidance scale.
        UnsupportedPipeline: If no shipped schedule is for the model, as none is for a distilled one.
    """
    trained = getattr(pipe.scheduler, "config", {}).get(STEPS_KEY)
    if trained and not file:
        raise UnsupportedPipeline(
            f"this {type(pipe).__name__} is a student, trained for {', '.join(map(str, trained))} steps of "
            "its own; the schedules that ship are for the teachers of such"
        )
    family = family_of(pipe)
    known = load_schedules(Path(file).expanduser()) if file else list(shipped())
    families = [schedule.facts.get("family", {}) for schedule in known]
    found = [schedule for schedule, made_for in zip(known, families, strict=True)
             if all(made_for.get(key) == family[key] for key in _needed(schedule, file))]  # fmt: skip
    if not found and file and family["path"] in [made_for.get("path") for made_for in families]:
        raise ScheduleError(
            f"{file!r} has steps with corrections, which were fitted to another model than this "
            f"{type(pipe).__name__}'s"
        )
    if not found and file:
        paths = sorted({str(made_for.get("path")) for made_for in families})
        raise ScheduleError(
            f"{file!r} has schedules for the path {', '.join(paths)}; this model's is {family['path']}: "
            "it is one of another family"
        )
    if not found:
        models = sorted({schedule.facts.get("settings", {}).get("model") for schedule in known} - {None})
        raise UnsupportedPipeline(
            f"no schedule for this {type(pipe).__name__} ships with diffaccel (there are some for "
            f"{', '.join(models) or 'no model'}); make one with `diffaccel search s3 MODEL`, and give its "
            "file: accel='s3:FILE'"
        )
    return _nearest(found, pipe, guidance)


def _nearest(schedules: Sequence[Schedule], pipe: Any, guidance: float | None) -> list[Schedule]:
    """Returns one schedule for each number of evaluations.

    Raises:
        ScheduleError: If several have the same number and the same guidance scale.
    """
    own = guidance_of(pipe, {})
    wanted = own if guidance is None else guidance
    known = [(schedule.evaluations, schedule.facts.get("guidance")) for schedule in schedules]
    if twice := [pair for pair in known if known.count(pair) > 1]:
        count, scale = twice[0]
        raise ScheduleError(f"several schedules of {count} evaluations for the guidance scale {scale}")

    def far(schedule: Schedule) -> float:
        scale = schedule.facts.get("guidance")
        scale = own if scale is None else scale
        return abs(scale - wanted) if isinstance(scale, (int, float)) and wanted is not None else math.inf

    counts = sorted({count for count, _ in known})
    return [min((s for s in schedules if s.evaluations == count), key=far) for count in counts]


def _needed(schedule: Schedule, file: str) -> tuple[str, ...]:
    """Returns what must be that of the model: for a file of plain decisions, the path alone."""
    plain = file and not any(step.corrections for step in schedule.steps)
    return ("path",) if plain else ("denoiser", "config", "path")


@dataclass
class S3(SolverAccelerator):
    """Samples with a searched schedule; num_inference_steps of the call is its number of evaluations.

    For the length of a call, the pipeline has a `UnifiedSolverScheduler` with the schedules that fit its
    model. A call with a number of steps that none of them has is an error that names the numbers. Where
    there are some for several guidance scales, the call has those of the scale nearest to its own.

    Arguments:
        file: What ``diffaccel search s3`` has written; empty for the schedules that ship with the package.

    References:
        | A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (2024)
        | https://arxiv.org/abs/2312.07243
    """

    name: ClassVar[str] = "s3"
    shorthand: ClassVar[str] = "file"
    trials: ClassVar[Mapping[str, Sequence[Any]]] = {"file": ("",)}

    file: str = option("")

    def step_counts(self, pipe: Any) -> Sequence[int]:
        """Returns the numbers of evaluations that there is a schedule for."""
        return [schedule.evaluations for schedule in fitting(pipe, self.file)]

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns the solver with the schedules that fit."""
        schedules = [schedule.to_dict() for schedule in fitting(pipe, self.file, guidance_of(pipe, given))]
        return solver_of(pipe.scheduler, schedules=schedules)

"""What a search minimizes: a score of the images that a candidate makes, on fixed conditions and noise.

The distance to the model's fine solution is some hundred times cheaper and smoother than a Fréchet distance,
and needs no reference images; `FrechetScore` is for those who want the latter.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..eval import Extractor, Statistics, collect, open_images
from ..eval.sampler import Sampler
from ..pipelines import attached
from .family import solver_of
from .fitting import FittingScheduler, RecordingScheduler, Trajectory
from .grids import grid
from .presets import solver_schedule
from .schedule import Schedule
from .thinning import AutoDiffusion, ThinnedSchedule
from .unified import UnifiedSolverScheduler

__all__ = ["FrechetScore", "Objective", "Score", "distance", "fine_schedule", "name_of"]

Score = Callable[[Tensor], float]
"""Scores images (N, 3, H, W) in [0, 1]; less is better."""


def distance(images: Tensor, fine: Tensor) -> float:
    """Returns the root mean square distance of images to the fine solution's."""
    return float((images - fine).double().square().mean().sqrt())


def name_of(score: Score | None) -> str:
    """Returns the name that a score has in records."""
    known = score or distance
    return str(getattr(known, "__name__", type(known).__name__))


class FrechetScore:
    """The Fréchet distance of images to a reference; there is no need of a fine solution.

    It is biased by the number of images, equally for all candidates. Compare with the reference of the final
    report only if that is another one.

    Arguments:
        extractor: What makes features of images.
        reference: The statistics of the reference, made by the same protocol.
    """

    def __init__(self, extractor: Extractor, reference: Statistics) -> None:
        self.extractor, self.reference = extractor, reference.reference

    def __call__(self, images: Tensor) -> float:
        """Returns the distance."""
        found = collect(open_images(images.clamp(0, 1)), self.extractor)
        return float(found.frechet(self.reference).distance)


def fine_schedule(pipe: Any, steps: int) -> Schedule:
    """Returns the schedule of a model's fine solution: UniPC of order 3, on the grid that suits its path."""
    path = solver_of(pipe.scheduler).path
    return solver_schedule("unipc3", grid("trailing" if path.is_flow else "log_snr", steps, path))


class Objective:
    """The score of a candidate's images; of all candidates on the same conditions and noise.

    Arguments:
        pipe: The pipeline, plain.
        conditions: Prompts or labels; nothing for an unconditional pipeline.
        guidance: The guidance scale; None for the pipeline's own.
        seed: The seed of the first image's noise.
        count: The number of images.
        batch: Images a call; those that steps are fitted to must go through the network at once, the default.
        steps: The steps of the fine solution.
        score: What scores the images; None for their distance to the fine solution.
    """

    def __init__(self, pipe: Any, conditions: Sequence[str], guidance: float | None, seed: int, count: int,
                 batch: int | None = None, steps: int = 100, score: Score | None = None) -> None:  # fmt: skip
        self.pipe, self.batch = pipe, batch or count
        self.sampler = Sampler(pipe, conditions[:count], steps, guidance, seed, count)
        self.score = score or functools.partial(distance, fine=self.fine())

    def fine(self) -> Tensor:
        """Returns the images of the fine solution, with shape (N, 3, H, W)."""
        return self._solution[0]

    @property
    def trajectory(self) -> Trajectory:
        """The samples that the fine solution goes through."""
        return self._solution[1]

    @functools.cached_property
    def _solution(self) -> tuple[Tensor, Trajectory]:
        steps = self.sampler.steps
        solver = self._solver(fine_schedule(self.pipe, steps), RecordingScheduler)
        return self._images(solver, steps), solver.trajectory

    def images(self, schedule: Schedule) -> Tensor:
        """Returns the images of a schedule, with shape (N, 3, H, W)."""
        return self._images(self._solver(schedule), schedule.evaluations)

    def _solver(self, schedule: Schedule, cls: Any = UnifiedSolverScheduler) -> Any:
        return solver_of(self.pipe.scheduler, cls, schedules=[schedule.to_dict()])

    def _images(self, solver: Any, evaluations: int) -> Tensor:
        """Returns the images of a solver, with shape (N, 3, H, W)."""
        before = self.pipe.scheduler
        self.pipe.scheduler = solver
        try:
            return self.sampler(evaluations, self.batch)
        finally:
            self.pipe.scheduler = before

    def first(self, count: int, batch: int | None = None) -> "Objective":
        """Returns the distance to the fine solution, of the first images only.

        Arguments:
            count: The number of images.
            batch: Images a call; all of them by default.
        """
        known = self.sampler
        return Objective(self.pipe, known.conditions, known.guidance, known.seed, count, batch)

    def scored(self, images: Tensor) -> float:
        """Returns the score of images; infinite if they, or it, are not finite."""
        if not bool(images.isfinite().all()):
            return math.inf
        score = self.score(images)
        return score if math.isfinite(score) else math.inf

    def __call__(self, candidate: Schedule | ThinnedSchedule) -> float:
        """Returns the score of a candidate's images; infinite if they are not finite."""
        if isinstance(candidate, Schedule):
            return self.scored(self.images(candidate))
        with attached(self.pipe, AutoDiffusion.of(candidate)):
            return self.scored(self.sampler(candidate.schedule.evaluations, self.batch))

    def fit(self, schedule: Schedule) -> tuple[float, Schedule]:
        """Fits the steps of a schedule to the fine solution; returns the score then, and the schedule."""
        solver = self._solver(schedule, FittingScheduler)
        solver.teacher = self.trajectory
        score = self.scored(self._images(solver, schedule.evaluations))
        return score, (solver.fitted if math.isfinite(score) else schedule)

"""S3: the search for the schedule of a model and a number of evaluations.

The objective is the distance of the images to those of the model's fine solution on the same noise: some
hundred times cheaper and smoother than a Fréchet distance, and no reference images are needed. All candidates
see the same conditions and noise; the best are scored again on others, and the winner is reported on a third
set.

The first part of the budget goes to the published search over decisions. The second part is ours: the nodes
of the best schedules are moved by CMA-ES, and each candidate's steps are fitted to the model (`fitting`).

Left out of the published method: the starting node and the stencil's points are not searched (they are data
of a `Schedule` and can be given by hand); the network's skip connections are not scaled.

References:
    | A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (2024)
    | https://arxiv.org/abs/2312.07243
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import OptionError
from ..eval.sampler import Sampler
from ..files import whole
from ..search import Evolution
from .family import family_of, solver_of
from .fitting import FittingScheduler, RecordingScheduler
from .grids import grid
from .presets import solver_schedule
from .schedule import Schedule
from .space import ScheduleSpace

__all__ = ["Search", "TeacherDistance", "fine_schedule"]

Share = Callable[[list[Schedule], Callable[[Schedule], Any]], list[Any]]
"""What applies a function to candidates, in one process or in several."""

TOP = 6
"""The candidates of either part that are scored again."""
WIDTH = 0.25
"""The first standard deviation of CMA-ES, of the nodes' half log-SNR."""
CLASSIC = ("dpm++2m", "unipc2", "deis2", "theta2")
"""The known solvers that a report compares with, each on its best grid."""


def fine_schedule(pipe: Any, steps: int) -> Schedule:
    """Returns the schedule of a model's fine solution: UniPC of order 3, on the grid that suits its path."""
    path = solver_of(pipe.scheduler).path
    return solver_schedule("unipc3", grid("trailing" if path.is_flow else "log_snr", steps, path))


class TeacherDistance:
    """The root mean square distance of images to the fine solution on the same noise.

    Arguments:
        pipe: The pipeline, plain.
        conditions: Prompts or labels; nothing for an unconditional pipeline.
        guidance: The guidance scale; None for the pipeline's own.
        seed: The seed of the first image's noise.
        count: The number of images.
        batch: Images a call; those that steps are fitted to must go through the network at once, the default.
        steps: The steps of the fine solution.
    """

    def __init__(self, pipe: Any, conditions: Sequence[str], guidance: float | None, seed: int, count: int,
                 batch: int | None = None, steps: int = 100) -> None:  # fmt: skip
        self.pipe, self.batch = pipe, batch or count
        self.sampler = Sampler(pipe, conditions[:count], steps, guidance, seed, count)
        solver = self._solver(fine_schedule(pipe, steps), RecordingScheduler)
        self.fine = self._images(solver, steps)
        self.trajectory = solver.trajectory

    def _solver(self, schedule: Schedule, cls: Any) -> Any:
        return solver_of(self.pipe.scheduler, cls, schedules=[schedule.to_dict()])

    def _images(self, solver: Any, evaluations: int) -> Tensor:
        """Returns the images of a solver, with shape (N, 3, H, W)."""
        before = self.pipe.scheduler
        self.pipe.scheduler = solver
        try:
            return self.sampler(evaluations, self.batch)
        finally:
            self.pipe.scheduler = before

    def _distance(self, images: Tensor) -> float:
        distance = float((images - self.fine).double().square().mean().sqrt())
        return distance if math.isfinite(distance) else math.inf

    def __call__(self, schedule: Schedule) -> float:
        """Returns the distance of a schedule's images; infinite if they are not finite."""
        solver = solver_of(self.pipe.scheduler, schedules=[schedule.to_dict()])
        return self._distance(self._images(solver, schedule.evaluations))

    def fit(self, schedule: Schedule) -> tuple[float, Schedule]:
        """Fits the steps of a schedule to the fine solution; returns the distance then, and the schedule."""
        solver = self._solver(schedule, FittingScheduler)
        solver.teacher = self.trajectory
        distance = self._distance(self._images(solver, schedule.evaluations))
        return distance, (solver.fitted if math.isfinite(distance) else schedule)


@dataclass
class Search:
    """One search, which can be stopped and goes on from its file.

    Arguments:
        pipe: The pipeline, plain.
        evaluations: The number of the network's evaluations.
        conditions: Prompts or labels of all images.
        guidance: The guidance scale; None for the pipeline's own.
        images: Images of the objective, which go through the network at once; a second and a third set of
            others have twice as many.
        budget: Candidates to score.
        seed: Decides everything.
        batch: Candidates between two trainings of the ranking, and in a generation of CMA-ES.
        fitting: The part of the budget for moved nodes and fitted steps.
        file: Where the state is kept; None keeps none.
        writes: Whether this process keeps it; of several, one does.
        objectives: Objectives that a search with other evaluations but the same images has made, by number.
    """

    pipe: Any
    evaluations: int
    conditions: Sequence[str]
    guidance: float | None = None
    images: int = 32
    budget: int = 300
    seed: int = 0
    batch: int = 8
    fitting: float = 0.6
    file: Path | None = None
    writes: bool = True
    objectives: dict[int, TeacherDistance] = field(default_factory=dict, repr=False)
    polished: list[tuple[float, Schedule]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Makes the space and the engine.

        Raises:
            OptionError: If a number makes no sense, or the library of CMA-ES is missing.
        """
        if self.images < 1 or self.budget < 1 or self.batch < 1 or not 0 <= self.fitting <= 1:
            raise OptionError("a search needs at least 1 image, 1 candidate, a batch of 1, and a part to fit")
        if self.fitting:
            _cma()
        self.space = ScheduleSpace(solver_of(self.pipe.scheduler).path, self.evaluations)
        self.evolution: Evolution[Schedule] = Evolution(self.space, self.seed)

    def _objective(self, part: int) -> TeacherDistance:
        """Returns the objective on the first, second or third set of conditions and noise."""
        sizes = (self.images, 2 * self.images, 2 * self.images)
        start, count = sum(sizes[:part]), sizes[part]
        numbers = range(start, start + count)
        conditions = self.conditions and [self.conditions[n % len(self.conditions)] for n in numbers]
        seed = self.seed * 1_000_003 + 7_000_000 + start
        if part not in self.objectives:
            made = TeacherDistance(self.pipe, conditions, self.guidance, seed, count, self.images)
            self.objectives[part] = made
        return self.objectives[part]

    def run(
        self, advance: Callable[[int], None] = lambda count: None, share: Share | None = None
    ) -> Schedule:
        """Searches, scores the best again, and returns the winner with a report in its facts.

        Arguments:
            advance: Told the number of candidates that were scored.
            share: Scores candidates in several processes; by default this one scores them all.
        """
        share = share or (lambda candidates, function: [function(candidate) for candidate in candidates])
        self._load()
        advance(len(self.evolution.scored) + len(self.polished))
        objective = self._objective(0)
        decisions = self.budget - round(self.fitting * self.budget)
        while len(self.evolution.scored) < decisions:
            candidates = self.evolution.ask(min(self.batch, decisions - len(self.evolution.scored)))
            if not candidates:
                break
            self.evolution.tell(candidates, share(candidates, objective))
            self._save()
            advance(len(candidates))
        self._polish(objective, self.budget - decisions, share, advance)
        return self._winner(share)

    def _polish(
        self, objective: TeacherDistance, budget: int, share: Share, advance: Callable[[int], None]
    ) -> None:
        """Moves the nodes of the best schedules and fits their steps.

        What a former run has scored is told to CMA-ES again, which makes the same candidates again.
        """
        starts = self._starts(min(TOP, budget))
        results = self.polished[: len(starts)]
        if starts and len(results) < len(starts):
            results = share(starts, objective.fit)
            self._keep(results, advance)
        left = budget - len(starts)
        if not results or left < self.batch:
            return
        best = min(results, key=lambda result: result[0])[1]
        strategy = _cma().CMAEvolutionStrategy(
            [0.0] * (len(best.sigmas) - 2), WIDTH,
            {"seed": self.seed + 1, "popsize": self.batch, "verbose": -9},
        )  # fmt: skip
        done = len(starts)
        for _ in range(left // self.batch):
            moves = strategy.ask()
            known = self.polished[done : done + len(moves)]
            if len(known) < len(moves):
                known = share([self.space.moved(best, move) for move in moves], objective.fit)
                self._keep(known, advance)
            strategy.tell(moves, [min(distance, 1e3) for distance, _ in known])
            done += len(moves)

    def _starts(self, count: int) -> list[Schedule]:
        """Returns the best schedules with different nodes, and a plain solver on them."""
        found: dict[tuple[float, ...], Schedule] = {}
        for entry in self.evolution.best:
            nodes = tuple(round(sigma, 3) for sigma in entry.candidate.sigmas)
            if len(found) < count and entry.candidate.analytic_first == "none":
                found.setdefault(nodes, solver_schedule("dpm++2m", entry.candidate.sigmas))
        return list(found.values())

    def _keep(self, results: list[tuple[float, Schedule]], advance: Callable[[int], None]) -> None:
        self.polished += results
        self._save()
        advance(len(results))

    def _winner(self, share: Share) -> Schedule:
        scored = [(entry.score, entry.candidate) for entry in self.evolution.best[:TOP]]
        scored += sorted(self.polished, key=lambda result: result[0])[:TOP]
        again = share([schedule for _, schedule in scored], self._objective(1))
        place = min(range(len(scored)), key=again.__getitem__)
        held_out, classics = self._objective(2), self._classics()
        report = dict(zip(classics, share(list(classics.values()), held_out), strict=True))
        distance, winner = scored[place]
        facts = {
            "family": family_of(self.pipe), "guidance": self.guidance, "images": self.images,
            "seed": self.seed, "candidates": len(self.evolution.scored) + len(self.polished),
            "distance": distance, "again": again[place], "held_out": share([winner], held_out)[0],
            "held_out_of_known_solvers": report,
        }  # fmt: skip
        return replace(winner, facts=facts)

    def _classics(self) -> dict[str, Schedule]:
        """Returns the known solvers on the grid that was best in the search."""
        scored = {entry.candidate: entry.score for entry in self.evolution.scored}
        return {name: min(self.space.known(name), key=lambda schedule: scored.get(schedule, math.inf))
                for name in CLASSIC}  # fmt: skip

    def _facts(self) -> dict[str, Any]:
        names = ("evaluations", "guidance", "images", "seed", "budget", "batch", "fitting")
        chosen = {name: getattr(self, name) for name in names}
        return {**chosen, "family": family_of(self.pipe), "conditions": list(self.conditions)}

    def _save(self) -> None:
        if self.file is None or not self.writes:
            return
        polished = [[distance, schedule.to_dict()] for distance, schedule in self.polished]
        state = {"facts": self._facts(), **self.evolution.state_dict(), "polished": polished}
        with whole(self.file) as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")

    def _load(self) -> None:
        """Goes on from the file.

        Raises:
            OptionError: If it is that of another search.
        """
        if self.file is None or not self.file.exists():
            return
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
            facts, polished = state.pop("facts"), state.pop("polished")
        except (OSError, ValueError, KeyError) as error:
            raise OptionError(
                f"cannot read the search {str(self.file)!r}: {error}; remove it to begin anew"
            ) from None
        ours = json.loads(json.dumps(self._facts()))
        if different := [key for key in ours if facts.get(key) != ours[key]]:
            raise OptionError(
                f"{str(self.file)!r} is another search: {different[0]} is {facts.get(different[0])!r}, "
                f"now {ours[different[0]]!r}"
            )
        self.evolution.load_state_dict(state)
        self.polished = [(distance, Schedule.from_dict(data)) for distance, data in polished]


def _cma() -> Any:
    try:
        import cma
    except ImportError:
        raise OptionError("the search needs the package cma: pip install diffaccel[search]") from None
    return cma

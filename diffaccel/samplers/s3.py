"""S3: the search for the schedule of a model and a number of evaluations.

The first part of the budget goes to the published search over decisions. The second part is ours: the nodes
of the best schedules are moved by CMA-ES, and each candidate's steps are fitted to the model (`fitting`).

Left out of the published method: the starting node and the stencil's points are not searched (they are data
of a `Schedule` and can be given by hand); the network's skip connections are not scaled; the scaling
1 +- expm1(h) / 2 of the first derivative, whose place 1 + relaxation h takes; and an inner evolution by the
predictor's scores, which here rank children of scored parents.

References:
    | A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (2024)
    | https://arxiv.org/abs/2312.07243
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..cma_engine import cma_library, generations
from ..errors import OptionError
from .family import scales_input, solver_of
from .gits import gits_grids
from .objective import Objective
from .presets import solver_schedule
from .schedule import Schedule
from .searching import TOP, PipelineSearch, Share
from .space import ScheduleSpace

__all__ = ["Search"]

WIDTH = 0.25
"""The first standard deviation of CMA-ES, of the nodes' half log-SNR."""
CLASSIC = ("dpm++2m", "unipc2", "deis2", "theta2")
"""The known solvers that a report compares with, each on its best grid."""


@dataclass
class Search(PipelineSearch[Schedule, ScheduleSpace]):
    """One search; its other arguments are those of `PipelineSearch`.

    Arguments:
        fitting: The part of the budget for moved nodes and fitted steps, in generations of ``batch``. With a
            ``score`` of one's own, steps are fitted to the fine solution of the first images only.
    """

    RECORDED: ClassVar[tuple[str, ...]] = (*PipelineSearch.RECORDED, "fitting")

    fitting: float = 0.6
    polished: list[tuple[float, Schedule]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            OptionError: If a number makes no sense, or a library is missing.
        """
        if not 0 <= self.fitting <= 1:
            raise OptionError(f"fitting is {self.fitting}; expected a part from 0 to 1")
        if self.fitting:
            cma_library()
        super().__post_init__()

    def make_space(self) -> ScheduleSpace:
        """Returns the schedules of this number of evaluations, grids of GITS among the seeds."""
        path = solver_of(self.pipe.scheduler).path
        grids = gits_grids(self._teacher.trajectory, path, self.evaluations)
        return ScheduleSpace(path, self.evaluations, scales_input(self.pipe), warm=grids)

    @functools.cached_property
    def _teacher(self) -> Objective:
        """What has the fine solution that steps are fitted to."""
        if self.score is None:
            return self.objective(0)
        return self.objective(0).first(self.at_once)

    def _fitted(self, schedule: Schedule) -> tuple[float, Schedule]:
        """Returns the score of a schedule with fitted steps, and the schedule."""
        score, fitted = self._teacher.fit(schedule)
        return (score if self.score is None else self.objective(0)(fitted)), fitted

    @property
    def searched(self) -> int:
        """What is left by the generations of CMA-ES, which are whole."""
        polished = round(self.fitting * self.budget)
        starts = min(TOP, polished)
        return self.budget - starts - (polished - starts) // self.batch * self.batch

    @property
    def done(self) -> int:
        """The number of candidates that were scored."""
        return super().done + len(self.polished)

    def refine(self, share: Share, advance: Callable[[int], None]) -> list[tuple[float, Schedule]]:
        """Moves the nodes of the best schedules and fits their steps.

        What a former run has scored is told to CMA-ES again, which makes the same candidates again.
        """
        budget = self.budget - self.searched
        starts = self._starts(min(TOP, budget))
        results = self.polished[: len(starts)]
        if starts and len(results) < len(starts):
            results = share(starts, self._fitted)
            self._keep(results, advance)
        left = budget - len(starts)
        if not results or left < self.batch:
            return self.polished
        best = min(results, key=lambda result: result[0])[1]
        self._move(best, len(starts), left // self.batch, share, advance)
        return self.polished

    def _move(self, best: Schedule, done: int, count: int, share: Share,
              advance: Callable[[int], None]) -> None:  # fmt: skip
        """Moves the nodes of a schedule; ``done`` candidates were polished before."""

        def score(moves: list[list[float]]) -> list[tuple[float, Schedule]]:
            results = share([self.space.moved(best, move) for move in moves], self._fitted)
            self._keep(results, advance)
            return results

        start = [0.0] * (len(best.sigmas) - 2)
        generations(start, WIDTH, self.seed + 1, self.batch, count, self.polished[done:], score)

    def _starts(self, count: int) -> list[Schedule]:
        """Returns the best schedules with different nodes, and a plain solver on them."""
        found: dict[tuple[float, ...], Schedule] = {}
        for entry in self.candidates.best:
            nodes = tuple(round(sigma, 3) for sigma in entry.candidate.sigmas)
            if len(found) < count and entry.candidate.analytic_first == "none":
                found.setdefault(nodes, solver_schedule("dpm++2m", entry.candidate.sigmas))
        return list(found.values())

    def _keep(self, results: list[tuple[float, Schedule]], advance: Callable[[int], None]) -> None:
        self.polished += results
        self.save()
        advance(len(results))

    def known(self) -> dict[str, Schedule]:
        """Returns the known solvers on the grid that was best in the search."""
        return {name: self.best_of(self.space.known(name)) for name in CLASSIC}

    def with_facts(self, winner: Schedule, facts: dict[str, Any]) -> Schedule:
        """Returns the schedule with the report in its facts."""
        return replace(winner, facts=facts)

    def state(self) -> dict[str, Any]:
        """Returns what the search goes on from."""
        polished = [[distance, schedule.to_dict()] for distance, schedule in self.polished]
        return {**super().state(), "polished": polished}

    def load_state(self, state: dict[str, Any]) -> None:
        """Returns to a saved state."""
        self.polished = [(distance, Schedule.from_dict(data)) for distance, data in state.pop("polished")]
        super().load_state(state)

"""What the search of S3 changes: nodes, orders, predictions, scalings, correctors, the analytic first step.

References:
    | A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (2024)
    | https://arxiv.org/abs/2312.07243
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import OptionError
from ..search import Choices, Space
from .grids import GRIDS, grid
from .paths import TrainingPath
from .presets import solver_schedule
from .schedule import PREDICTIONS, SCALINGS, Schedule, ScheduleError, Step

__all__ = ["WARM", "ScheduleSpace"]

SMALLEST_GAP = 1.02
"""Neighboring nodes have ratios at least this factor apart."""
RATE = 0.12
"""The chance of each decision to change."""

CHANGES: tuple[dict[str, Any], ...] = (
    {}, *({"order": order} for order in (1, 2, 3)), *({"prediction": kind} for kind in PREDICTIONS),
    *({"scaling": kind} for kind in SCALINGS), {"corrector": True}, {"corrector": False},
    {"relaxation": 0.1}, {"relaxation": -0.1},
)  # fmt: skip
"""What an engine that chooses decisions one by one can do to a step."""

WARM = {
    5: (1.0, 0.735, 0.523, 0.316, 0.204),
    4: (1.0, 0.718, 0.5005, 0.2857),
}
"""Training times in parts of the noisiest, of S3's and AutoDiffusion's schedules for Stable Diffusion; known
solvers stand on them. Those of other models (EDM, ScoreSDE) are for other paths or noise schedules."""


class ScheduleSpace(Space[Schedule]):
    """Schedules of a fixed number of evaluations for one model's path.

    Arguments:
        path: The model's path.
        evaluations: The number of the network's evaluations, at least 2.
        analytic: Whether the first evaluation may be replaced, which pipelines that do not scale the
            network's input cannot do.
        std: The data's standard deviation, of the prediction "theta".
        warm: Further grids of nodes that the search begins with.
    """

    def __init__(self, path: TrainingPath, evaluations: int, analytic: bool = True, std: float = 0.5,
                 warm: Sequence[tuple[float, ...]] = ()) -> None:  # fmt: skip
        if evaluations < 2:
            raise OptionError(f"a search needs at least 2 evaluations, not {evaluations}")
        self.path, self.evaluations, self.analytic, self.std = path, evaluations, analytic, std
        self.warm = list(warm)
        if evaluations in WARM:
            times = [part * path.last_time for part in WARM[evaluations]]
            self.warm.append((*(path.ratio(time) for time in times), 0.0))

    def seeds(self) -> list[Schedule]:
        """Returns the known solvers on the known grids, those of published searches, and warm ones."""
        solvers = ("dpm++2m", "unipc2", "deis2", "theta2", "dpm++3m")
        found = [schedule for solver in solvers for schedule in self.known(solver)]
        return found + [solver_schedule(solver, sigmas) for sigmas in self.warm for solver in solvers[:2]]

    def known(self, solver: str) -> list[Schedule]:
        """Returns a known solver on each of the grids."""
        grids = [grid(name, self.evaluations, self.path) for name in GRIDS]
        return [replace(solver_schedule(solver, sigmas), std=self.std) for sigmas in grids]

    def mutate(self, candidate: Schedule, rng: random.Random) -> Schedule:
        """Returns a schedule with some nodes moved and some decisions changed."""
        analytic, std = candidate.analytic_first, candidate.std
        logs, steps = self._logs(candidate), list(candidate.steps)
        if self.analytic and rng.random() < RATE / 2:
            analytic = rng.choice(("none", "noise", "mean"))
        logs, steps = self._resize(logs, steps, self.evaluations + (analytic != "none"), rng)
        width = (logs[0] - logs[-1]) / max(len(logs), 2)
        spread = rng.choice((0.05, 0.15, 0.4))
        logs = [logs[0], *(log + rng.gauss(0, spread * width) * (rng.random() < 0.5) for log in logs[1:])]
        if rng.random() < RATE:
            std *= math.exp(rng.gauss(0, 0.2))
        steps = [self._changed(step, rng) for step in steps]
        return self._legal(logs, steps, analytic, std)

    def _changed(self, step: Step, rng: random.Random) -> Step:
        """Returns a step with some decisions changed; `_legal` repairs what cannot be."""
        changes: dict[str, Any] = {}
        if rng.random() < RATE:
            changes["order"] = rng.choices((1, 2, 3, 4), (0.2, 0.4, 0.3, 0.1))[0]
        if rng.random() < RATE:
            changes["prediction"] = rng.choice(PREDICTIONS)
        if rng.random() < RATE:
            changes["scaling"] = rng.choice(SCALINGS)
        if rng.random() < RATE:
            changes["relaxation"] = step.relaxation + rng.gauss(0, 0.05)
        if rng.random() < RATE:
            changes["corrector"] = not step.corrector
        if rng.random() < RATE / 2:
            changes["damping"] = rng.choice((0.0, 0.5, 1.0))
        if rng.random() < RATE / 2:
            changes["estimate"] = rng.choice((0, 1, 2))
        return replace(step, **changes)

    def cross(self, first: Schedule, second: Schedule, rng: random.Random) -> Schedule:
        """Returns a schedule with nodes of one, and each step's decisions of either."""
        a, b = (first, second) if rng.random() < 0.5 else (second, first)
        logs, steps = self._logs(a), list(a.steps)
        others = list(b.steps)
        if len(others) == len(steps):
            steps = [rng.choice(pair) for pair in zip(steps, others, strict=True)]
            if rng.random() < 0.5:
                share = rng.random()
                logs = [share * x + (1 - share) * y for x, y in zip(logs, self._logs(b), strict=True)]
        return self._legal(logs, steps, a.analytic_first, rng.choice((a.std, b.std)))

    def choose(self, choices: Choices) -> Schedule:
        """Returns one of the seeds, its nodes moved and one decision or none changed at each step."""
        seeds = self.seeds()
        seed = seeds[choices.choice("seed", len(seeds))]
        logs = self._logs(seed)
        width = (logs[0] - logs[-1]) / max(len(logs), 2)
        moved = [logs[0], *(log + choices.number(f"move {n}", -width, width)
                            for n, log in enumerate(logs[1:], 1))]  # fmt: skip
        steps = [replace(step, **CHANGES[choices.choice(f"change {n}", len(CHANGES))])
                 for n, step in enumerate(seed.steps)]  # fmt: skip
        if moved == logs and steps == list(seed.steps):
            return seed  # to the last digit, so that a report finds it
        return self._legal(moved, steps, seed.analytic_first, seed.std)

    def moved(self, schedule: Schedule, moves: Sequence[float]) -> Schedule:
        """Returns a schedule whose nodes but the first and the last are moved.

        Arguments:
            schedule: The schedule.
            moves: What is added to the logarithms of the ratios.
        """
        first, *logs = self._logs(schedule)
        moved = [first, *(log + float(move) for log, move in zip(logs, moves, strict=True))]
        return self._legal(moved, list(schedule.steps), schedule.analytic_first, schedule.std)

    def _logs(self, schedule: Schedule) -> list[float]:
        """Returns the logarithms of the nodes' ratios but for the last."""
        return [math.log(min(sigma, self.path.noisiest)) for sigma in schedule.sigmas[:-1]]

    def _resize(self, logs: list[float], steps: list[Step], count: int, rng: random.Random) -> Any:
        """Returns nodes and steps of another number: one is put between two others, or taken out."""
        logs, steps = list(logs), list(steps)
        while len(logs) > count:
            place = rng.randrange(1, len(logs))
            del logs[place], steps[place]
        while len(logs) < count:
            place = rng.randrange(1, len(logs))
            logs.insert(place, 0.5 * (logs[place - 1] + logs[place]))
            steps.insert(place, steps[place - 1])
        return logs, steps

    def _legal(self, logs: list[float], steps: list[Step], analytic: Any, std: float) -> Schedule:
        """Returns a schedule that a solver can follow."""
        top, gap = math.log(self.path.noisiest), math.log(SMALLEST_GAP)
        low = math.log(self.path.smallest)
        ordered = [top, *sorted((min(log, top - gap) for log in logs[1:]), reverse=True)]
        for place in range(1, len(ordered)):
            ordered[place] = min(ordered[place], ordered[place - 1] - gap)
        lift = low - ordered[-1]
        if lift > 0:  # squeeze those that are below the table
            ordered = np.interp(ordered, [ordered[-1], top], [low, top]).tolist()
        repaired = []
        for place, step in enumerate(steps):
            last = place == len(steps) - 1
            possible = step.at(place, to_zero=last, last=last)
            estimate = min(step.estimate, possible.order - 1)
            corrector = possible.corrector and (place > 0 or analytic == "none")
            repaired.append(replace(possible, estimate=estimate, points=None, start=0, corrections=(),
                                    corrector=corrector))  # fmt: skip
        sigmas = (*(math.exp(log) for log in ordered), 0.0)
        return Schedule(sigmas, tuple(repaired), analytic, std)

    def encode(self, candidate: Schedule) -> list[float]:
        """Returns nodes and decisions as numbers, padded by one step."""
        count = self.evaluations + 1
        logs = self._logs(candidate)
        numbers = [*(log / 3 for log in logs), *[0.0] * (count - len(logs)), math.log(candidate.std)]
        numbers += [float(candidate.analytic_first == kind) for kind in ("noise", "mean")]
        for step in [*candidate.steps, *[Step()] * (count - len(candidate.steps))]:
            numbers += [step.order / 2, float(step.corrector), 5 * step.relaxation, step.damping]
            numbers += [step.estimate / 2, *(float(step.prediction == kind) for kind in PREDICTIONS)]
            numbers += [float(step.scaling == kind) for kind in SCALINGS]
        return numbers

    def to_plain(self, candidate: Schedule) -> Any:
        """Returns a schedule as plain data."""
        return candidate.to_dict()

    def from_plain(self, data: Any) -> Schedule:
        """Returns a schedule from plain data.

        Raises:
            ScheduleError: If it is none, or one of another number of evaluations.
        """
        schedule = Schedule.from_dict(data)
        if schedule.evaluations != self.evaluations:
            raise ScheduleError(f"a schedule of {schedule.evaluations} evaluations, not {self.evaluations}")
        return schedule

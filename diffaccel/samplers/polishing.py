"""Steps of a fitted schedule, moved for a score of the images such as the Fréchet distance.

Steps are fitted one after another, to the fine solution's latents (`fitting`).  What is wanted of images
depends on the same numbers: CMA-ES moves those of the last step, then those of the last two, and so on.  What
the network has returned before the first step that changes is kept, so that a candidate for the last k steps
costs k - 1 evaluations, and none for k = 1.  The distance to the fine solution may grow by a bounded factor.

References:
    | Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models (2024), which fits the
    | same numbers by gradient descent, to the fine solution: https://arxiv.org/abs/2403.01329
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..cma_engine import cma_library, generations
from ..errors import OptionError
from ..pipelines import Accelerator, attached
from ..pipelines.accelerator import Proceed
from ..pipelines.run import Evaluation, Run
from ..search import read_state, write_state
from .family import family_of
from .objective import Objective, Score, distance, name_of
from .schedule import Schedule
from .searching import AT_ONCE, Share, alone

__all__ = ["Polish"]

WIDTH = 0.15
"""The first standard deviation of CMA-ES, in parts of the relative distance to the fine solution."""
STRICTNESS = 10.0
"""The factor of the squared relative excess over the bound, in parts of the score at the start."""


class Tape(Accelerator):
    """Keeps what the network returned in the first steps, and returns it again.

    Arguments:
        outputs: What was kept, by loop, step, network and branch.
        loops: The number of loops since the beginning, in a list that copies share.
        replayed: The steps whose evaluations are replayed.
    """

    exclusive: ClassVar[str] = "skip"

    def __init__(self, outputs: dict[Any, Any], loops: list[int], replayed: int) -> None:
        self.outputs, self.loops, self.replayed = outputs, loops, replayed

    def start(self, run: Run) -> None:
        """Counts the loop."""
        self.loops[0] += 1

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Returns what is kept of an early step, and keeps what is not."""
        if call.step >= self.replayed:
            return proceed(call)
        key = (self.loops[0], call.step, call.network, call.branch)
        if key not in self.outputs:
            self.outputs[key] = proceed(call)
        return self.outputs[key]


@dataclass
class Polish:
    """The search for the numbers of one schedule's last steps.

    Arguments:
        pipe: The pipeline, plain.
        schedule: A schedule whose last steps are fitted, with an evaluation at each step.
        conditions: Prompts or labels of all images.
        score: What scores a candidate's images; None for their distance to the fine solution.
        guidance: The guidance scale; None for the pipeline's own.
        images: Images that are scored; the result is compared with the start on as many others.
        bound: By what factor the distance to the fine solution may grow, at least 1.
        near: The first images, whose distance it is: more of them hold the bound better on other noise.
        depth: The most steps that are changed.
        budget: Candidates to score, an equal part for each depth.
        seed: Decides everything.
        batch: Candidates of a generation.
        part: How much of the change that was found is made, above 0 and at most 1: near the best the score
            grows with the square of what is left out, and the distance falls with that of what is made.
        file: Where the state is kept; None keeps none.
        writes: Whether this process keeps it.
    """

    RECORDED: ClassVar[tuple[str, ...]] = (
        "guidance", "images", "bound", "near", "depth", "budget", "seed", "batch",
    )  # fmt: skip

    pipe: Any
    schedule: Schedule
    conditions: Sequence[str]
    score: Score | None = None
    guidance: float | None = None
    images: int = 1000
    bound: float = 1.15
    near: int = 96
    depth: int = 3
    budget: int = 240
    seed: int = 0
    batch: int = 10
    part: float = 1.0
    file: Path | None = None
    writes: bool = True
    scored: list[tuple[float, list[float]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            OptionError: If a number makes no sense, or the schedule's last steps are not fitted.
        """
        cma_library()
        schedule = self.schedule
        if not self.bound >= 1 or min(self.images, self.near) < 1 or self.batch < 2:
            raise OptionError("polishing needs a bound of at least 1, 1 image, and 2 candidates at once")
        if not 0 < self.part <= 1:
            raise OptionError(f"part is {self.part}; expected a number above 0, at most 1")
        if not 1 <= self.depth < schedule.evaluations:
            raise OptionError(f"depth is {self.depth}; expected 1 to {schedule.evaluations - 1}")
        if self.budget < self.depth * self.batch:
            raise OptionError(f"a budget of {self.budget} is no generation of {self.batch} for each depth")
        if schedule.analytic_first != "none" or not all(s.corrections for s in schedule.steps[-self.depth :]):
            raise OptionError(
                "only schedules whose last steps are fitted, with an evaluation at each step, are polished; "
                "`diffaccel search s3` makes such"
            )

    def run(
        self, advance: Callable[[int], None] = lambda count: None, share: Share | None = None
    ) -> Schedule:
        """Polishes, and returns the schedule with a report in its facts.

        Arguments:
            advance: Told the number of candidates that were scored.
            share: Scores candidates in several processes; by default this one scores them all.
        """
        share = share or alone
        state = None if self.file is None else read_state(self.file, self._facts())
        self.scored = [] if state is None else [(value, numbers) for value, numbers in state["scored"]]
        advance(len(self.scored))
        self._begin(0)
        best, done = self.schedule, 0
        for depth in range(1, self.depth + 1):
            best = self._deepen(best, depth, done, share, advance)
            done += self.budget // self.depth // self.batch * self.batch
        best = self._shortened(best)
        return replace(best, facts={**self.schedule.facts, "polished": self._report(best)})

    def _begin(self, part: int) -> None:
        """Takes the first or the second set of conditions and noise."""
        numbers = range(part * self.images, (part + 1) * self.images)
        conditions = self.conditions and [self.conditions[n % len(self.conditions)] for n in numbers]
        seed, batch = self.seed * 1_000_003 + 17_000_000 + numbers.start, min(self.images, AT_ONCE)
        self.objective = Objective(self.pipe, conditions, self.guidance, seed, self.images, batch,
                                   score=self.score)  # fmt: skip
        if self.score is None:
            self.fine = self.objective.fine()
        else:
            self.fine = self.objective.first(min(self.images, self.near), batch).fine()
        self._record(0)
        self.at_start = self._measured(self.schedule)

    def _record(self, steps: int) -> None:
        """Forgets what was kept, and keeps what the network returns in the first steps from now on."""
        self.outputs: dict[Any, Any] = {}
        self.replayed = steps

    def _measured(self, schedule: Schedule) -> tuple[float, float]:
        """Returns the score of a schedule's images, and the first ones' distance to the fine solution."""
        with attached(self.pipe, Tape(self.outputs, [0], self.replayed)):
            images = self.objective.images(schedule)
        score = self.objective.scored(images)
        return score, distance(images[: len(self.fine)], self.fine) if math.isfinite(score) else math.inf

    def _deepen(self, best: Schedule, depth: int, done: int, share: Share,
                advance: Callable[[int], None]) -> Schedule:  # fmt: skip
        """Moves the last steps of a schedule; returns the best, itself if none is better.

        What a former run has scored, ``done`` candidates before these, is told to CMA-ES again.
        """
        self._record(len(best.steps) - depth + 1)
        tail = best.steps[-depth:]
        numbers = np.concatenate([step.corrections for step in tail])
        start = self._value(best)

        def moved(values: Sequence[float]) -> Schedule:
            parts = np.split(np.asarray(values), np.cumsum([len(step.corrections) for step in tail])[:-1])
            steps = [replace(step, corrections=tuple(part.tolist()))
                     for step, part in zip(tail, parts, strict=True)]  # fmt: skip
            return replace(best, steps=(*best.steps[:-depth], *steps))

        def score(asked: list[list[float]]) -> list[tuple[float, list[float]]]:
            results = list(zip(share(asked, lambda values: self._value(moved(values))), asked, strict=True))
            self._keep(results, advance)
            return results

        width = WIDTH * self.at_start[1] / float(self.fine.double().square().mean().sqrt())
        tried = generations(numbers.tolist(), width, self.seed + depth, self.batch,
                            self.budget // self.depth // self.batch, self.scored[done:], score)  # fmt: skip
        value, values = min(tried, key=lambda result: result[0])
        return moved(values) if value < start else best

    def _shortened(self, best: Schedule) -> Schedule:
        """Returns the schedule at a part of the way from the start to the best one."""
        if self.part == 1:
            return best
        steps = []
        for old, new in zip(self.schedule.steps, best.steps, strict=True):
            pairs = zip(old.corrections, new.corrections, strict=True)
            steps.append(replace(new, corrections=tuple(a + self.part * (b - a) for a, b in pairs)))
        return replace(best, steps=tuple(steps))

    def _value(self, schedule: Schedule) -> float:
        """Returns the score, and more where the distance is beyond the bound."""
        (score, far), (unit, near) = self._measured(schedule), self.at_start
        return score + STRICTNESS * abs(unit) * max(0.0, far / (self.bound * near) - 1) ** 2

    def _report(self, best: Schedule) -> dict[str, Any]:
        """Returns how the schedule compares with the start, on conditions and noise it has not seen."""
        at_start = self.at_start
        self._begin(1)
        names, before = ("score", "distance"), self.schedule.facts.get("polished")
        return {
            "score": name_of(self.score), "images": self.images, "bound": self.bound, "near": self.near,
            "depth": self.depth, "candidates": len(self.scored), "seed": self.seed, "part": self.part,
            "start": dict(zip(names, at_start, strict=True)),
            "held_out_start": dict(zip(names, self.at_start, strict=True)),
            "held_out": dict(zip(names, self._measured(best), strict=True)),
            **({} if before is None else {"before": before}),
        }  # fmt: skip

    def _keep(self, results: list[tuple[float, list[float]]], advance: Callable[[int], None]) -> None:
        self.scored += results
        if self.file is not None and self.writes:
            write_state(self.file, self._facts(), {"scored": self.scored})
        advance(len(results))

    def _facts(self) -> dict[str, Any]:
        chosen = {name: getattr(self, name) for name in self.RECORDED}
        return {**chosen, "family": family_of(self.pipe), "conditions": list(self.conditions),
                "score": name_of(self.score), "schedule": self.schedule.to_dict()}  # fmt: skip

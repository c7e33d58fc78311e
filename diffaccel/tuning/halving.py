"""The search: candidates of the engine on few images, the best of them on more, and what is best of all.

References:
    | Non-stochastic Best Arm Identification and Hyperparameter Optimization (2016), successive halving
    | https://arxiv.org/abs/1502.07943
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from ..eval.budget import SPEED, Budget
from ..search import Evolution
from .candidate import Candidate
from .measurements import Measured
from .space import CandidateSpace

__all__ = ["Objective", "Trial", "front", "halve"]

ASKED = 8
"""Candidates between two trainings of the engine's ranking."""
RUNGS = ((4, 1), (2, 3), (1, 8))
"""For each rung, the part of the images, and the part of the candidates that reach it."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate that was measured.

    Arguments:
        candidate: The candidate.
        measured: What is known of it.
        cost: Its floating-point operations, in parts of the plain run's.
        loss: The largest loss that is expected of as many images as the final test has.
        score: Less is better, for the budget; below 2 where it seems to be met.
    """

    candidate: Candidate
    measured: Measured
    cost: float
    loss: float
    score: float


class Objective:
    """What a search minimizes: the cost within a limit of loss, or the loss within a limit of cost.

    Arguments:
        budget: The limit.
        plain: The plain run.
        images: The images of the final test.
    """

    def __init__(self, budget: Budget, plain: Measured, images: int) -> None:
        self.budget, self.plain = budget, plain
        self.tail = sum(1 / place for place in range(2, images + 1))

    def trial(self, candidate: Candidate, measured: Measured) -> Trial:
        """Returns a candidate with its cost, loss and score; all infinite where it has failed."""
        if measured.failure:
            return Trial(candidate, measured, math.inf, math.inf, math.inf)
        cost, loss = measured.flops / self.plain.flops, self._expected(measured)
        return Trial(candidate, measured, cost, loss, self._score(cost, loss))

    def _expected(self, measured: Measured) -> float:
        """Returns the largest loss to expect, from mean and deviation; not less than what was seen.

        It is exact for an exponential distribution, and within 10 % for lognormal ones of deviations from
        0.3 to 0.8. Losses of 0, of images for which nothing was skipped, do no harm.
        """
        losses = self.budget.losses(measured.values)
        spread = float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
        return max(float(losses.mean()) + self.tail * spread, float(losses.max()))

    def _score(self, cost: float, loss: float) -> float:
        if self.budget.metric == SPEED:
            excess, value = cost * self.budget.limit, loss / (1 + loss)
        else:
            excess, value = loss / self.budget.largest, min(cost, 1.0)
        return value if excess <= 1 else 2 + math.log(excess)


def halve(space: CandidateSpace, measure: Callable[[Candidate, range], Measured], objective: Objective,
          numbers: range, candidates: int, seed: int) -> list[Trial]:  # fmt: skip
    """Returns all candidates that were tried, each with all that was measured of it.

    On a quarter of the images all candidates are tried, which the engine makes; on half of them the best
    third; on all of them the best eighth, and those that no other beats in both cost and loss.

    Arguments:
        space: The candidates.
        measure: Measures a candidate on some images.
        objective: What is minimized.
        numbers: The images' numbers.
        candidates: How many candidates the engine is asked for.
        seed: The seed of the engine.
    """
    engine = Evolution(space, seed, parents=max(2, min(12, candidates // 4)))
    ends = [numbers.start + math.ceil(len(numbers) / part) for part, _ in RUNGS]
    trials: list[Trial] = []
    while len(trials) < candidates:
        asked = engine.ask(min(ASKED, candidates - len(trials)))
        if not asked:
            break
        first = range(numbers.start, ends[0])
        scored = [objective.trial(candidate, measure(candidate, first)) for candidate in asked]
        engine.tell(asked, [trial.score for trial in scored])
        trials += scored
    for rung in range(1, len(RUNGS)):
        chosen = sorted(trials, key=lambda trial: trial.score)[: math.ceil(len(trials) / RUNGS[rung][1])]
        if rung == len(RUNGS) - 1:
            chosen += [trial for trial in front(trials) if trial not in chosen]
        for trial in chosen:
            more = range(numbers.start + trial.measured.count, ends[rung])
            if trial.measured.failure or not more:
                continue
            known = trial.measured + measure(trial.candidate, more)
            trials[trials.index(trial)] = objective.trial(trial.candidate, known)
    return trials


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Returns the trials that no other beats in both cost and loss, the cheapest first."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.cost, trial.loss)):
        if trial.loss < (best[-1].loss if best else math.inf):
            best.append(trial)
    return best

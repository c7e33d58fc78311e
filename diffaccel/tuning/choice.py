"""From a search to a plan that keeps its promise: candidates are tested on images that it has not seen.

A search picks what happened to look good. So the finalists, ordered beforehand from the safest to the most
rewarding, are tested one after the other on other images, up to the first that fails; the last that passed
is chosen. However many are tested, the probability that one passes which should not is that of a single test.

References:
    | Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control (2021), fixed sequences
    | https://arxiv.org/abs/2110.01052
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ..eval.budget import SPEED, Budget
from ..eval.cost import Timing, interleave
from ..eval.tolerance import allowed_violations, needed, tolerance_bound
from .candidate import Candidate
from .halving import Trial, front
from .measurements import Measured, Measurements

__all__ = ["Choice", "Claim", "check_claim", "choose", "finalists", "low_median"]

LOSSES = (0.15, 0.3, 0.5, 0.75, 1.05, 1.5)
"""The expected losses of finalists for a limit of quality, in parts of it."""
SPEEDS = (1.6, 1.35, 1.15, 1.02)
"""The expected speed-ups of finalists for a limit of speed, in parts of it."""
TIMED = 3
"""The finalists for a limit of quality whose times are taken: the last that passed."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is to be shown.

    Arguments:
        budget: The limit.
        coverage: The share of all images that is to meet it; half of all calls for a speed-up, its median.
        confidence: The probability that the claim is right.
        rounds: The interleaved rounds of timing.
    """

    budget: Budget
    coverage: float = 0.95
    confidence: float = 0.95
    rounds: int = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Arguments:
        winner: The candidate; None if no finalist passed.
        measured: What is known of it on the images of the test.
        speedups: The speed-ups of those that were timed, in the order of the rounds.
        tests: The tests in their order, as plain data.
    """

    winner: Candidate | None
    measured: Measured | None
    speedups: dict[Candidate, Timing]
    tests: list[dict[str, object]]


def check_claim(claim: Claim, images: int) -> None:
    """Checks that a claim can be shown with so many images and rounds.

    Raises:
        OptionError: If it cannot, with the number that can.
    """
    allowed_violations(images, claim.coverage, claim.confidence)
    if claim.budget.metric == SPEED:
        allowed_violations(claim.rounds, 0.5, claim.confidence)


def finalists(trials: Sequence[Trial], budget: Budget) -> list[Trial]:
    """Returns what is tested for a budget, the safest first.

    Arguments:
        trials: All that the search has tried.
        budget: The limit.
    """
    best = [trial for trial in front(trials) if trial.cost < 1]
    found: list[Trial] = []
    if budget.metric == SPEED:
        for part in SPEEDS:
            fast = [trial for trial in best if trial.cost * budget.limit * part <= 1]
            found += fast[-1:]  # the front's last is its most accurate
    else:
        for part in LOSSES:
            near = [trial for trial in best if trial.loss <= part * budget.largest]
            found += near[:1]
    return list({trial.candidate: trial for trial in found}.values())


def choose(trials: Sequence[Trial], claim: Claim, measurements: Measurements, numbers: range) -> Choice:
    """Returns the last finalist that passes.

    Arguments:
        trials: All that the search has tried.
        claim: What is to be shown.
        measurements: What measures.
        numbers: The images of the test, none of which the search has seen.

    Raises:
        OptionError: If there are too few images or rounds.
    """
    check_claim(claim, len(numbers))
    walk = _walk_speed if claim.budget.metric == SPEED else _walk_quality
    return walk([trial.candidate for trial in finalists(trials, claim.budget)], claim, measurements, numbers)


def _walk_quality(candidates: list[Candidate], claim: Claim, measurements: Measurements,
                  numbers: range) -> Choice:  # fmt: skip
    """Tests losses, and takes the fastest of those that passed."""
    limit = claim.budget.largest
    allowed = allowed_violations(len(numbers), claim.coverage, claim.confidence)
    passed: dict[Candidate, Measured] = {}
    tests: list[dict[str, object]] = []
    for candidate in candidates:
        known, violations = _until(candidate, measurements, numbers, claim.budget, limit, allowed)
        tests.append({"label": candidate.label, "images": known.count, "violations": violations,
                      "failure": known.failure, "passed": violations <= allowed})  # fmt: skip
        if violations > allowed:
            break
        passed[candidate] = known
    timed = list(passed)[-TIMED:]
    speedups = speeds(timed, measurements, claim.rounds) if timed else {}
    winner = max(timed, key=lambda candidate: speedups[candidate].median, default=None)
    return Choice(winner, None if winner is None else passed[winner], speedups, tests)


def _until(candidate: Candidate, measurements: Measurements, numbers: range, budget: Budget, limit: float,
           allowed: int) -> tuple[Measured, int]:  # fmt: skip
    """Measures a candidate batch by batch until there are too many violations; a failure is too many."""
    known: Measured | None = None
    violations = 0
    for start in range(numbers.start, numbers.stop, measurements.batch):
        part = range(start, min(start + measurements.batch, numbers.stop))
        found = measurements(candidate, part)
        known = found if known is None else known + found
        if found.failure:
            return found, allowed + 1
        violations += int(np.sum(budget.losses(found.values) > limit))
        if violations > allowed:
            break
    assert known is not None
    return known, violations


def _walk_speed(candidates: list[Candidate], claim: Claim, measurements: Measurements,
                numbers: range) -> Choice:  # fmt: skip
    """Tests speed-ups, and takes the last that passed, the most accurate."""
    budget, passed = claim.budget, list[Candidate]()
    tests: list[dict[str, object]] = []
    speedups = speeds(candidates, measurements, claim.rounds) if candidates else {}
    for candidate in candidates:
        bound = low_median(speedups[candidate], claim.confidence)
        tests.append({"label": candidate.label, "speedup": speedups[candidate].median, "bound": bound,
                      "passed": bound >= budget.limit})  # fmt: skip
        if bound < budget.limit:
            break
        passed.append(candidate)
    if not passed:
        return Choice(None, None, speedups, tests)
    known, _ = _until(passed[-1], measurements, numbers, budget, np.inf, len(numbers))
    if known.failure:
        tests.append({"label": passed[-1].label, "failure": known.failure, "passed": False})
        return Choice(None, None, speedups, tests)
    return Choice(passed[-1], known, speedups, tests)


def speeds(candidates: Sequence[Candidate], measurements: Measurements,
           rounds: int) -> dict[Candidate, Timing]:  # fmt: skip
    """Returns the speed-ups of candidates over the plain run, each by the plain run of its round.

    Arguments:
        candidates: The candidates.
        measurements: What runs them, one batch at a time.
        rounds: The interleaved rounds.
    """
    count = measurements.batch
    runs: list[Candidate | None] = [None, *candidates]
    taken: list[list[float]] = [[] for _ in runs]
    tasks = [functools.partial(measurements.seconds, candidate, count) for candidate in runs]
    interleave(tasks, rounds, lambda turn, position, seconds: taken[position].append(seconds))
    return {candidate: Timing(tuple(a / b for a, b in zip(taken[0], own, strict=True)))
            for candidate, own in zip(candidates, taken[1:], strict=True)}  # fmt: skip


def low_median(timing: Timing, confidence: float) -> float:
    """Returns what the median is not below, with a confidence; the least value if they are too few."""
    if len(timing.values) < needed(0.5, confidence):
        return min(timing.values)
    return -tolerance_bound([-value for value in timing.values], 0.5, confidence)

"""LCSC: the search for the linear combination of saved checkpoints whose samples have the best metric.

The search was never published as code; this one follows the description of it. Known averages are scored
first: the last checkpoint, the mean, moving averages, and where the checkpoints' own metrics are measured the
averages that these weight, and the flat part of their curve. Then children of the best ("lcsc-ga", as
published), or CMA-ES from the best one over the directions that keep the sum ("lcsc", ours: some three times
fewer evaluations). All are scored on the same noise; the best few are scored again on fresh noise, and the
best of these wins.

References:
    | Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better (2024)
    | https://arxiv.org/abs/2404.02241
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..cma_engine import CmaEngine
from ..errors import OptionError, closest
from ..search import Engine, Evolution, read_state, write_state
from . import averages
from .coefficients import Coefficients, CoefficientSpace

__all__ = ["METHODS", "Combination", "Evaluate", "Found"]

Evaluate = Callable[[np.ndarray, int], float]
"""Scores coefficients (G, K), less being better, on the noise of the search (0) or on fresh noise (1)."""

METHODS = ("lcsc", "lcsc-ga", "ema", "mwa", "swad", "uniform")
"""What can be done with checkpoints; the last four are cheap siblings."""

PARENTS = 10
"""The best candidates that have children."""

PENALTIES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""How strongly metrics weight."""

_SINGLES = ("mwa", "swad")
_RATES, _MANY = 9, 60


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Arguments:
        coefficients: With shape (G, K), float64.
        search: Its score on the noise of the search.
        fresh: Its score on fresh noise.
        evaluations: The numbers of candidates scored in the search, and again.
        origin: Which known average it is, or "" if it was searched.
    """

    coefficients: np.ndarray
    search: float
    fresh: float
    evaluations: tuple[int, int]
    origin: str


@dataclass
class Combination:
    """One search.

    Arguments:
        count: The number K of checkpoints.
        evaluate: What scores coefficients.
        method: One of `METHODS`.
        groups: The number G of groups of tensors with coefficients of their own.
        budget: Evaluations of the search; those on fresh noise come besides.
        seed: Decides everything.
        singles: Whether each checkpoint is scored first (K of the budget), for the averages that need it;
            "mwa" and "swad" always do.
        cap: The largest sum of absolute coefficients of a group: 1 allows no negative ones, 0 is no limit.
        top: The candidates that are scored again.
        file: Where the state is kept, so that the search goes on; None keeps none.
        facts: What else a search that goes on must have the same; the budget may grow.

    Raises:
        OptionError: If an option makes no sense.
    """

    count: int
    evaluate: Evaluate
    method: str = "lcsc"
    groups: int = 1
    budget: int = 300
    seed: int = 0
    singles: bool = False
    cap: float = 0.0
    top: int = 5
    file: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes the space and the engine, and goes on from the file."""
        if self.method not in METHODS:
            raise OptionError(f"no method {self.method!r}; {closest(self.method, METHODS)}")
        if self.budget < 1 or self.top < 1 or self.seed < 0:
            raise OptionError(
                f"budget {self.budget}, top {self.top}, seed {self.seed}; expected 1, 1, 0 or more"
            )
        self.singles = self.singles or self.method in _SINGLES
        self.known: dict[Coefficients, str] = {}
        """The names of known averages."""
        self.space = CoefficientSpace(self.count, groups=self.groups, cap=self.cap)
        starts = [self.space.legal(point) for point in self._first()]
        self.space = CoefficientSpace(self.count, starts, self.groups, self.cap)
        self.engine: Engine[Coefficients] = CmaEngine(self.space, self.seed)
        if self.method != "lcsc":
            self.engine = Evolution(self.space, self.seed, PARENTS, children=1, crossing=1.0, blind=1.0)
        state = None if self.file is None else read_state(self.file, self._facts())
        if state is not None:
            self.engine.load_state_dict(state)

    def _named(self, name: str, point: np.ndarray) -> np.ndarray:
        self.known.setdefault(self.space.legal(point), name)
        return point

    def _first(self) -> list[np.ndarray]:
        """Returns the known averages that need no metrics, and the single checkpoints if they are scored."""
        own = [self._named("uniform", averages.uniform(self.count))]
        if self.method.startswith("lcsc") or self.method == "ema":
            own.insert(0, self._named("last", averages.one_hot(self.count)))
            number = max(1, min(self.budget - 2, _MANY)) if self.method == "ema" else _RATES
            rates = averages.ema_rates(self.count, number)
            own += [self._named(f"ema {gamma:.4g}", averages.ema(self.count, gamma)) for gamma in rates]
        if self.singles:
            alone = [averages.one_hot(self.count, place) for place in range(self.count)]
            singles = [self._named(f"checkpoint {place}", point) for place, point in enumerate(alone)]
            own = singles if self.method in _SINGLES else own + singles
        return own

    def _second(self) -> list[np.ndarray]:
        """Returns the averages that the metrics of single checkpoints tell."""
        scores = {entry.candidate: entry.score for entry in self.engine.scored}
        metrics = [scores.get(self.space.legal(averages.one_hot(self.count, place)), math.inf)
                   for place in range(self.count)]  # fmt: skip
        if not self.singles or not np.isfinite(metrics).all():
            return []
        found = []
        if self.method != "swad":
            found += [self._named(f"mwa {p:g}", averages.mwa(metrics, p)) for p in PENALTIES]
        if self.method != "mwa" and self.count >= 3 and min(metrics) > 0:
            start, end = averages.swad_window(metrics)
            found.append(self._named(f"swad {start} to {end}", averages.swad(metrics)))
        return found

    def _facts(self) -> dict[str, Any]:
        names = ("count", "method", "groups", "seed", "singles", "cap")
        return {**self.facts, **{name: getattr(self, name) for name in names}}

    @property
    def done(self) -> int:
        """The number of candidates that were scored in the search."""
        return len(self.engine.scored)

    def search(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Scores candidates until the budget is spent, or there are no new ones.

        Arguments:
            advance: Told the number of candidates that were scored.
        """
        advance(self.done)
        for candidates in (self.space.seeds, lambda: list(map(self.space.legal, self._second()))):
            known = {entry.candidate for entry in self.engine.scored}
            self._score([point for point in dict.fromkeys(candidates()) if point not in known], advance)
        while self.method.startswith("lcsc") and self.done < self.budget:
            asked = self.engine.ask(1)
            if not asked:
                break
            self._score(asked, advance)

    def _score(self, candidates: list[Coefficients], advance: Callable[[int], None]) -> None:
        for candidate in candidates[: self.budget - self.done]:
            self.engine.tell([candidate], [float(self.evaluate(self.space.rows(candidate), 0))])
            if self.file is not None:
                write_state(self.file, self._facts(), self.engine.state_dict())
            advance(1)

    def winner(self, limit: int | None = None) -> Found:
        """Scores the best again on fresh noise, and returns the best of these.

        Arguments:
            limit: Only the first so many evaluations of the search count, as if that had been the budget.

        Raises:
            OptionError: If no candidate has a finite score.
        """
        considered = self.engine.scored[:limit]
        best = sorted(considered, key=lambda entry: entry.score)[: self.top]
        if not best or not math.isfinite(best[0].score):
            raise OptionError("no candidate has a finite score; are the metric and the checkpoints right?")
        again = [float(self.evaluate(self.space.rows(entry.candidate), 1)) for entry in best]
        place = min(range(len(best)), key=lambda n: again[n] if again[n] == again[n] else math.inf)
        entry = best[place]
        return Found(self.space.rows(entry.candidate), entry.score, again[place],
                     (len(considered), len(best)), self.known.get(entry.candidate, ""))  # fmt: skip

    def averages(self, limit: int | None = None) -> dict[str, tuple[np.ndarray, float]]:
        """Returns the best known averages of each kind that were scored, with their search scores.

        Arguments:
            limit: As of `winner`.
        """
        found: dict[str, tuple[np.ndarray, float]] = {}
        for entry in sorted(self.engine.scored[:limit], key=lambda entry: entry.score):
            kind = self.known.get(entry.candidate, "").partition(" ")[0]
            if kind:
                found.setdefault(kind, (self.space.rows(entry.candidate), entry.score))
        return found

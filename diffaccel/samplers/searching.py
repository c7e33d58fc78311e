"""A search on a pipeline, from its first candidate to a winner that is reported on noise it has not seen.

All candidates see the same conditions and noise; the best are scored again on others, and the winner is
reported on a third set. A search can be stopped and goes on from its file.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ..errors import OptionError, closest
from ..search import Engine, Evolution, Space, read_state, write_state
from .family import family_of
from .objective import Objective, Score, name_of

__all__ = ["AT_ONCE", "ENGINES", "PipelineSearch", "Share", "alone"]

G = TypeVar("G")
S = TypeVar("S", bound=Space[Any])

Share = Callable[[list[Any], Callable[[Any], Any]], list[Any]]
"""What applies a function to candidates, in one process or in several."""

ENGINES = ("evolution", "optuna")
TOP = 6
"""The candidates that are scored again."""
AT_ONCE = 32
"""The most images that go through the network at once, for a score that needs many."""


def alone(candidates: list[Any], function: Callable[[Any], Any]) -> list[Any]:
    """Applies a function to candidates in this process."""
    return [function(candidate) for candidate in candidates]


@dataclass
class PipelineSearch(ABC, Generic[G, S]):
    """One search.

    Arguments:
        pipe: The pipeline, plain.
        evaluations: The number of the network's evaluations.
        conditions: Prompts or labels of all images.
        guidance: The guidance scale; None for the pipeline's own.
        images: Images of the objective; a second and a third set of others have twice as many.
        budget: Candidates to score.
        seed: Decides everything.
        batch: Candidates between two trainings of the ranking.
        file: Where the state is kept; None keeps none.
        writes: Whether this process keeps it; of several, one does.
        objectives: Objectives that a search with other evaluations but the same images has made, by number.
        score: What scores a candidate's images; None for their distance to the fine solution.
        engine: "evolution", or "optuna" (its sampler of trees of Parzen estimators), which is an extra.
    """

    RECORDED: ClassVar[tuple[str, ...]] = (
        "evaluations", "guidance", "images", "seed", "budget", "batch", "engine",
    )  # fmt: skip
    """The settings that a search goes on with only if they are the same."""

    pipe: Any
    evaluations: int
    conditions: Sequence[str]
    guidance: float | None = None
    images: int = 32
    budget: int = 300
    seed: int = 0
    batch: int = 8
    file: Path | None = None
    writes: bool = True
    objectives: dict[int, Objective] = field(default_factory=dict, repr=False)
    score: Score | None = None
    engine: str = "evolution"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            OptionError: If a number makes no sense, or a library is missing.
        """
        if self.images < 1 or self.budget < 1 or self.batch < 1:
            raise OptionError("a search needs at least 1 image, 1 candidate and a batch of 1")
        if self.engine not in ENGINES:
            raise OptionError(f"no engine {self.engine!r}; {closest(self.engine, ENGINES)}")
        if self.engine == "optuna":
            from ..optuna_engine import optuna_library

            optuna_library()

    def _begin(self) -> None:
        """Makes the space and the engine, and goes on from the file."""
        state = self.load()
        self.space = self.make_space()
        self.candidates: Engine[G] = Evolution(self.space, self.seed)
        if self.engine == "optuna":
            from ..optuna_engine import OptunaEngine

            self.candidates = OptunaEngine(self.space, self.seed)
        if state is not None:
            self.load_state(state)

    @abstractmethod
    def make_space(self) -> S:
        """Returns what is searched."""

    @abstractmethod
    def known(self) -> dict[str, G]:
        """Returns the candidates that the report compares the winner with."""

    def best_of(self, known: Sequence[G]) -> G:
        """Returns the one of some candidates that was best in the search; the first if none was scored."""
        scored = {entry.candidate: entry.score for entry in self.candidates.scored}
        return min(known, key=lambda candidate: scored.get(candidate, math.inf))

    @abstractmethod
    def with_facts(self, winner: G, facts: dict[str, Any]) -> G:
        """Returns the winner with the report in its facts."""

    def prepare(self) -> None:
        """Is called before the engine is asked for candidates."""

    def refine(self, share: Share, advance: Callable[[int], None]) -> list[tuple[float, G]]:
        """Goes on where the engine ends; returns further scored candidates."""
        return []

    @property
    def searched(self) -> int:
        """The part of the budget that the engine has."""
        return self.budget

    def objective(self, part: int) -> Objective:
        """Returns the objective on the first, second or third set of conditions and noise."""
        sizes = (self.images, 2 * self.images, 2 * self.images)
        start, count = sum(sizes[:part]), sizes[part]
        numbers = range(start, start + count)
        conditions = self.conditions and [self.conditions[n % len(self.conditions)] for n in numbers]
        seed = self.seed * 1_000_003 + 7_000_000 + start
        if part not in self.objectives:
            self.objectives[part] = self.make_objective(conditions, seed, count)
        return self.objectives[part]

    @property
    def at_once(self) -> int:
        """The images that go through the network at once: all that steps are fitted to."""
        return self.images if self.score is None else min(self.images, AT_ONCE)

    def make_objective(self, conditions: Sequence[str], seed: int, count: int) -> Objective:
        """Returns the objective on some conditions and noise.

        Arguments:
            conditions: The conditions of the images.
            seed: The seed of the first image's noise.
            count: The number of images.
        """
        return Objective(self.pipe, conditions, self.guidance, seed, count, self.at_once, score=self.score)

    def run(self, advance: Callable[[int], None] = lambda count: None, share: Share | None = None) -> G:
        """Searches, scores the best again, and returns the winner with a report in its facts.

        Arguments:
            advance: Told the number of candidates that were scored.
            share: Scores candidates in several processes; by default this one scores them all.
        """
        share = share or alone
        self._begin()
        advance(self.done)
        objective = self.objective(0)
        while len(self.candidates.scored) < self.searched:
            self.prepare()
            candidates = self.candidates.ask(min(self.batch, self.searched - len(self.candidates.scored)))
            if not candidates:
                break
            self.candidates.tell(candidates, share(candidates, objective))
            self.save()
            advance(len(candidates))
        return self._winner(self.refine(share, advance), share)

    def _winner(self, refined: list[tuple[float, G]], share: Share) -> G:
        scored = [(entry.score, entry.candidate) for entry in self.candidates.best[:TOP]]
        scored += sorted(refined, key=lambda result: result[0])[:TOP]
        again = share([candidate for _, candidate in scored], self.objective(1))
        place = min(range(len(scored)), key=again.__getitem__)
        held_out, known = self.objective(2), self.known()
        report = dict(zip(known, share(list(known.values()), held_out), strict=True))
        value, winner = scored[place]
        facts = {
            "family": family_of(self.pipe), "guidance": self.guidance, "images": self.images,
            "seed": self.seed, "engine": self.engine, "candidates": self.done, "distance": value,
            "again": again[place], "held_out": share([winner], held_out)[0],
            "held_out_of_known_solvers": report,
        }  # fmt: skip
        return self.with_facts(winner, facts)

    @property
    def done(self) -> int:
        """The number of candidates that were scored."""
        return len(self.candidates.scored)

    def state(self) -> dict[str, Any]:
        """Returns what the search goes on from, as plain data."""
        return self.candidates.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Returns to a saved state."""
        self.candidates.load_state_dict(state)

    def _facts(self) -> dict[str, Any]:
        chosen = {name: getattr(self, name) for name in self.RECORDED}
        return {**chosen, "family": family_of(self.pipe), "conditions": list(self.conditions),
                "score": name_of(self.score)}  # fmt: skip

    def save(self) -> None:
        """Writes the state, if there is a file for it."""
        if self.file is not None and self.writes:
            write_state(self.file, self._facts(), self.state())

    def load(self) -> dict[str, Any] | None:
        """Returns the state in the file, if there is one.

        Raises:
            OptionError: If it is that of another search.
        """
        return None if self.file is None else read_state(self.file, self._facts())

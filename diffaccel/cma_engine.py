"""CMA-ES as an engine of `diffaccel.search`; needs the extra ``search``.

References:
    | The CMA Evolution Strategy: A Tutorial (2016), arXiv 1604.00772
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .extras import extra_package
from .search import Engine, Space

__all__ = ["CmaEngine", "VectorSpace", "cma_library", "generations"]

G = TypeVar("G")
R = TypeVar("R")

WORST = 1e9
"""What CMA-ES is told for a larger or infinite score; only the ranks matter to it."""


def cma_library() -> Any:
    """Returns the library.

    Raises:
        OptionError: If it is not installed.
    """
    return extra_package("cma", "search", "the search needs")


def generations(
    start: Sequence[float], width: float, seed: int, size: int, count: int, known: Sequence[tuple[float, R]],
    score: Callable[[list[list[float]]], list[tuple[float, R]]],
) -> list[tuple[float, R]]:  # fmt: skip
    """Returns the results of some generations of CMA-ES, in their order.

    Arguments:
        start: The first mean.
        width: The first standard deviation.
        seed: Decides everything.
        size: Vectors of a generation.
        count: The number of generations.
        known: Results of a former run, which are told again instead of being scored again.
        score: Scores the vectors of a generation; a result begins with the score.
    """
    options = {"seed": seed, "popsize": size, "verbose": -9}
    strategy = cma_library().CMAEvolutionStrategy(list(start), width, options)
    found: list[tuple[float, R]] = []
    for _ in range(count):
        vectors = [[float(number) for number in vector] for vector in strategy.ask()]
        results = list(known[len(found) : len(found) + size])
        if len(results) < size:
            results = score(vectors)
        strategy.tell(vectors, [min(result[0], WORST) for result in results])
        found += results
    return found


class VectorSpace(Space[G]):
    """A space in which one goes from a candidate to others by vectors, of steps of the order of 1."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """The length of a vector."""

    @abstractmethod
    def moved(self, start: G, move: Sequence[float]) -> G:
        """Returns the legal candidate at a vector from another one; at 0 that one."""


class CmaEngine(Engine[G]):
    """Moves from the best of the candidates that it was told before it was asked.

    What a former run has scored is told to the strategy again, which makes the same candidates again.

    Arguments:
        space: What is searched.
        seed: Decides everything.
        width: The first standard deviation.
    """

    space: VectorSpace[G]

    def __init__(self, space: VectorSpace[G], seed: int = 0, width: float = 1.0) -> None:
        super().__init__(space)
        self.seed, self.width = seed, width
        cma_library()
        self.given = 0
        """The candidates that were known before the strategy began."""
        self._strategy: Any = None
        self._moves: list[Any] = []
        self._asked = 0

    def _begin(self) -> None:
        self.given = len(self.scored)
        seeds = self.space.seeds()
        self._start = self.best[0].candidate if self.scored else seeds[0]
        self._strategy = cma_library().CMAEvolutionStrategy(
            [0.0] * self.space.dimension, self.width, {"seed": self.seed + 1, "verbose": -9}
        )
        self._generate()

    def _generate(self) -> None:
        self._moves = [] if self._strategy.stop() else list(self._strategy.ask())
        self._asked = 0

    def ask(self, count: int = 8) -> list[G]:
        """Returns the next candidates of a generation; none once the strategy has converged."""
        if self._strategy is None:
            self._begin()
        moves = self._moves[self._asked : self._asked + count]
        self._asked += len(moves)
        return [self.space.moved(self._start, move) for move in moves]

    def tell(self, candidates: Sequence[G], scores: Sequence[float]) -> None:
        """Takes the scores of candidates, those that were asked for in their order."""
        for candidate, score in zip(candidates, scores, strict=True):
            self._enter(candidate, score)
        if self._strategy is not None and self._moves:
            self._turn()

    def _turn(self) -> None:
        """Goes on to the next generation if this one is scored."""
        size = len(self._moves)
        done = (len(self.scored) - self.given) % size
        if done or len(self.scored) == self.given:
            return
        scores = [entry.score for entry in self.scored[-size:]]
        finite = [score for score in scores if math.isfinite(score)]
        worst = max(finite, default=0.0) + 1
        self._strategy.tell(self._moves, [score if math.isfinite(score) else worst for score in scores])
        self._generate()

    def state_dict(self) -> dict[str, Any]:
        """Returns what was scored, as plain data."""
        scored = [[self.space.to_plain(entry.candidate), entry.score] for entry in self.scored]
        return {"scored": scored, "given": self.given if self._strategy is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a saved state."""
        pairs = [(self.space.from_plain(data), score) for data, score in state["scored"]]
        self.scored, self._strategy = [], None
        given = len(pairs) if state["given"] is None else state["given"]
        for candidate, score in pairs[:given]:
            self._enter(candidate, score)
        if state["given"] is None:
            return
        self._begin()
        for candidate, score in pairs[given:]:
            self._asked += 1
            self.tell([candidate], [score])

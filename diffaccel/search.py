"""Evolutionary search with a learned ranking of candidates: one engine for schedules, layers and checkpoints.

A space tells how a candidate is made, changed, mixed and described by numbers; the engine asks for candidates
and is told their scores, less being better. After a first population of known candidates, children of the
best are ranked by a small network, trained on pairs of what has been scored, and only the most promising are
asked for.

References:
    | A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (2024)
    | https://arxiv.org/abs/2312.07243

    | OMS-DPM: Optimizing the Model Schedule for Diffusion Probabilistic Models (2023), the ranking loss
    | https://arxiv.org/abs/2306.08860
"""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .errors import OptionError
from .files import whole

__all__ = ["Choices", "Engine", "Evolution", "Ranking", "Scored", "Space", "read_state", "write_state"]

G = TypeVar("G")


class Choices(Protocol):
    """Who decides, when a space makes a candidate out of decisions."""

    def choice(self, name: str, options: int) -> int:
        """Returns one of the numbers from 0 to options - 1."""

    def number(self, name: str, low: float, high: float) -> float:
        """Returns a number between two others."""


class Space(ABC, Generic[G]):
    """What can be searched; candidates are never changed in place."""

    @abstractmethod
    def seeds(self) -> list[G]:
        """Returns known candidates, which are scored first."""

    @abstractmethod
    def mutate(self, candidate: G, rng: random.Random) -> G:
        """Returns a changed candidate, a legal one."""

    @abstractmethod
    def cross(self, first: G, second: G, rng: random.Random) -> G:
        """Returns a legal mixture of two candidates."""

    @abstractmethod
    def choose(self, choices: Choices) -> G:
        """Returns a legal candidate out of decisions; choice "seed" with all else 0 is that seed."""

    @abstractmethod
    def encode(self, candidate: G) -> list[float]:
        """Returns a candidate as numbers of the order of 1, equally many for all."""

    @abstractmethod
    def to_plain(self, candidate: G) -> Any:
        """Returns a candidate as plain data."""

    @abstractmethod
    def from_plain(self, data: Any) -> G:
        """Returns a candidate from plain data."""


class Ranking:
    """A network that ranks candidates, trained on pairs of scored ones by a hinge loss of margin 1.

    Arguments:
        seed: Decides its first weights and the pairs.
        steps: Updates of a training.
        width: The width of its two hidden layers.
    """

    def __init__(self, seed: int = 0, steps: int = 150, width: int = 64) -> None:
        self.seed, self.steps, self.width = seed, steps, width
        self.network: nn.Module | None = None

    def fit(self, features: Sequence[Sequence[float]], scores: Sequence[float]) -> None:
        """Trains the network anew.

        Arguments:
            features: The candidates' numbers (N, d).
            scores: Their scores (N), less being better.
        """
        x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32)
        self.mean, self.scale = x.mean(0), x.std(0).clamp_min(1e-3)
        x = (x - self.mean) / self.scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = nn.Sequential(
                nn.Linear(x.shape[1], self.width), nn.SiLU(), nn.Linear(self.width, self.width), nn.SiLU(),
                nn.Linear(self.width, 1),
            )  # fmt: skip
            optimizer = torch.optim.Adam(self.network.parameters(), 3e-3, weight_decay=1e-4)
            for _ in range(self.steps):
                loss = self._loss(x, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.network is not None
        first, second = torch.randint(len(x), (2, 256))
        predicted = self.network(x).flatten()
        sign = torch.sign(y[first] - y[second])
        return torch.relu(1 - sign * (predicted[first] - predicted[second]))[sign != 0].mean()

    @torch.no_grad()
    def __call__(self, features: Sequence[Sequence[float]]) -> list[float]:
        """Returns the predicted ranks of candidates, less being better."""
        if self.network is None:
            return [0.0] * len(features)
        x = (torch.tensor(features, dtype=torch.float32) - self.mean) / self.scale
        values: list[float] = self.network(x).flatten().tolist()
        return values


@dataclass
class Scored(Generic[G]):
    """A candidate and its score."""

    candidate: G
    score: float


class Engine(ABC, Generic[G]):
    """Asks for candidates, and is told their scores.

    Arguments:
        space: What is searched.
    """

    def __init__(self, space: Space[G]) -> None:
        self.space = space
        self.scored: list[Scored[G]] = []

    @property
    def best(self) -> list[Scored[G]]:
        """The scored candidates, the best first."""
        return sorted(self.scored, key=lambda entry: entry.score)

    def _key(self, candidate: G) -> str:
        return json.dumps(self.space.to_plain(candidate), sort_keys=True)

    def _enter(self, candidate: G, score: float) -> Scored[G]:
        """Keeps a candidate with its score, NaN as the worst."""
        self.scored.append(Scored(candidate, score if score == score else float("inf")))
        return self.scored[-1]

    @abstractmethod
    def ask(self, count: int = 8) -> list[G]:
        """Returns candidates that have not been asked for; fewer than ``count`` only if it finds no more."""

    @abstractmethod
    def tell(self, candidates: Sequence[G], scores: Sequence[float]) -> None:
        """Takes the scores of candidates; one that is not finite is the worst."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the search depends on, as plain data."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a saved state."""


class Evolution(Engine[G]):
    """Asks for candidates and is told their scores.

    Arguments:
        space: What is searched.
        seed: Decides everything.
        parents: The best candidates that have children.
        children: Children a candidate that is asked for, of which the ranking chooses the most promising; 1
            leaves it nothing to choose, and it is not trained.
        crossing: The share of children that have two parents.
        blind: The share of candidates that the ranking does not choose.

    Raises:
        OptionError: If a number makes no sense.
    """

    def __init__(self, space: Space[G], seed: int = 0, parents: int = 12, children: int = 12,
                 crossing: float = 0.4, blind: float = 0.2) -> None:  # fmt: skip
        if parents < 2 or children < 1 or not 0 <= crossing <= 1 or not 0 <= blind <= 1:
            raise OptionError("a search needs 2 parents, 1 child and shares from 0 to 1")
        super().__init__(space)
        self.parents, self.children = parents, children
        self.crossing, self.blind = crossing, blind
        self.rng = random.Random(seed)
        self.ranking = Ranking(seed)
        self._known: set[str] = set()
        self._waiting = list(space.seeds())

    def ask(self, count: int = 8) -> list[G]:
        """Returns candidates that have not been asked for.

        Arguments:
            count: Their number; fewer only if no new one was found.
        """
        chosen: list[G] = []
        while self._waiting and len(chosen) < count:
            self._take(self._waiting.pop(0), chosen)
        if len(chosen) == count or not self.scored:
            return chosen
        missing = count - len(chosen)
        pool = self._pool(missing * self.children)
        values = self.ranking([self.space.encode(candidate) for candidate in pool])
        order = sorted(range(len(pool)), key=values.__getitem__)
        blind = sum(self.rng.random() < self.blind for _ in range(missing))
        promising = [pool[place] for place in order[: missing - blind]]
        for candidate in [*promising, *self.rng.sample(pool, len(pool))]:
            if len(chosen) < count:
                self._take(candidate, chosen)
        return chosen

    def _pool(self, size: int) -> list[G]:
        parents = [entry.candidate for entry in self.best[: self.parents]]
        pool = []
        for _ in range(size):
            if len(parents) > 1 and self.rng.random() < self.crossing:
                first, second = self.rng.sample(parents, 2)
                child = self.space.cross(first, second, self.rng)
            else:
                child = self._parent(parents)
            pool.append(self.space.mutate(child, self.rng))
        return pool

    def _parent(self, parents: list[G]) -> G:
        """Returns the better of two of the ordered parents."""
        return parents[min(self.rng.randrange(len(parents)) for _ in range(2))]

    def _take(self, candidate: G, chosen: list[G]) -> None:
        key = self._key(candidate)
        if key not in self._known:
            self._known.add(key)
            chosen.append(candidate)

    def tell(self, candidates: Sequence[G], scores: Sequence[float]) -> None:
        """Takes the scores of candidates, and trains the ranking.

        Arguments:
            candidates: The candidates.
            scores: Their scores; one that is not finite is the worst.
        """
        for candidate, score in zip(candidates, scores, strict=True):
            self._known.add(self._key(candidate))
            self._enter(candidate, score)
        finite = [entry for entry in self.scored if entry.score < float("inf")]
        if self.children > 1 and len(finite) >= 2 * self.parents:
            self.ranking.fit([self.space.encode(e.candidate) for e in finite], [e.score for e in finite])

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the search depends on, as plain data."""
        version, internal, gauss = self.rng.getstate()
        return {
            "scored": [[self.space.to_plain(entry.candidate), entry.score] for entry in self.scored],
            "waiting": [self.space.to_plain(candidate) for candidate in self._waiting],
            "rng": [version, list(internal), gauss],
            "seed": self.ranking.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a saved state."""
        self.scored, self._known = [], set()
        self._waiting = [self.space.from_plain(data) for data in state["waiting"]]
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.ranking = Ranking(state.get("seed", self.ranking.seed))
        pairs = [(self.space.from_plain(data), score) for data, score in state["scored"]]
        self.tell([candidate for candidate, _ in pairs], [score for _, score in pairs])


def write_state(file: Path, facts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes what a search goes on from, whole or not at all.

    Arguments:
        file: The file.
        facts: What a search that goes on must have the same, as plain data.
        state: The state.
    """
    with whole(file) as temporary:
        temporary.write_text(json.dumps({"facts": facts, **state}), encoding="utf-8")


def read_state(file: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the state that `write_state` has written, or None if there is no file.

    Arguments:
        file: The file.
        facts: The facts of the search that is to go on.

    Raises:
        OptionError: If the file cannot be read, or is that of another search.
    """
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = state.pop("facts")
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(f"cannot read the search {str(file)!r}: {error}; remove it to begin anew") from None
    ours = json.loads(json.dumps(facts))
    if different := [key for key in ours if found.get(key) != ours[key]]:
        key = different[0]
        raise OptionError(f"{str(file)!r} is another search: {key} is {found.get(key)!r}, now {ours[key]!r}")
    return state

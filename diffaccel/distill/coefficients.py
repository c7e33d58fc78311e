r"""Coefficients of a combination of checkpoints as a space that can be searched.

A candidate has K numbers for each of G groups of tensors, and those of a group sum to 1, whatever happens to
them: what is left over is shared equally, :math:`\alpha \leftarrow \alpha + (1 - \sum \alpha) / K`. To divide
by the sum would blow up where negative coefficients bring it near 0.

References:
    | Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better (2024)
    | https://arxiv.org/abs/2404.02241
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.linalg import helmert

from ..cma_engine import VectorSpace
from ..errors import OptionError
from ..search import Choices

__all__ = ["CoefficientSpace", "Coefficients"]

Coefficients = tuple[float, ...]
"""G K numbers, group by group, rounded to `DIGITS`."""

DIGITS = 9
"""The digits of a coefficient, by which candidates are known again."""

_SHARES = (0.1, 0.3, 1.0)
"""The parts of the coefficients that a mutation changes."""

_STEPS = (-2.0, 0.5)
"""The decadic logarithms of the least and the largest step of a mutation, of the mean coefficient."""


class CoefficientSpace(VectorSpace[Coefficients]):
    """Creates the space.

    Arguments:
        count: The number K of checkpoints.
        starts: Known points, with shape (K) or (G, K).
        groups: The number G of groups.
        cap: The largest sum of the absolute values in a group: 1 allows no negative ones, 0 is no limit.

    Raises:
        OptionError: If the cap is below 1, or there are fewer than 2 checkpoints.
    """

    def __init__(self, count: int, starts: Sequence[Any] = (), groups: int = 1, cap: float = 0.0) -> None:
        if count < 2 or groups < 1 or (cap and not cap >= 1):
            raise OptionError(
                f"{count} checkpoints, {groups} groups, cap {cap}; expected 2, 1, and 1 or none"
            )
        self.count, self.groups, self.cap = count, groups, cap
        self._starts = [self.legal(start) for start in starts]
        self._basis = helmert(count) * (2 / count)  # (K - 1, K) rows that sum to 0

    def legal(self, values: Any) -> Coefficients:
        """Returns the legal candidate that numbers of shape (K), (G, K) or (G K) stand for."""
        rows = np.asarray(values, dtype=np.float64).reshape(-1, self.count)
        rows = np.broadcast_to(rows, (self.groups, self.count))
        rows = rows + (1 - rows.sum(1, keepdims=True)) / self.count
        if self.cap:
            negative = np.minimum(rows, 0)
            excess, allowed = -negative.sum(1, keepdims=True), (self.cap - 1) / 2
            shrunk = allowed / np.maximum(excess, 1e-300) * negative
            shrunk += (1 + allowed) / (1 + excess) * np.maximum(rows, 0)
            rows = np.where(excess > allowed, shrunk, rows)
        return tuple(np.round(rows, DIGITS).ravel().tolist())

    def rows(self, candidate: Coefficients) -> np.ndarray:
        """Returns a candidate with shape (G, K), float64."""
        return np.array(candidate).reshape(self.groups, self.count)

    def seeds(self) -> list[Coefficients]:
        """Returns the known points."""
        return list(self._starts)

    def mutate(self, candidate: Coefficients, rng: random.Random) -> Coefficients:
        """Returns a candidate with normal noise on some of the coefficients."""
        share, step = rng.choice(_SHARES), 10 ** rng.uniform(*_STEPS)
        size = step * sum(map(abs, candidate)) / len(candidate)
        changed, number = np.array(candidate), max(1, round(share * len(candidate)))
        for place in rng.sample(range(len(candidate)), number):
            changed[place] += size * rng.gauss(0, 1)
        return self.legal(changed)

    def cross(self, first: Coefficients, second: Coefficients, rng: random.Random) -> Coefficients:
        """Returns a candidate with each coefficient of one of two others, or a mean of them."""
        if rng.random() < 0.5:
            return self.legal([a if rng.random() < 0.5 else b for a, b in zip(first, second, strict=True)])
        part = rng.random()
        return self.legal(part * np.array(first) + (1 - part) * np.array(second))

    def choose(self, choices: Choices) -> Coefficients:
        """Returns a seed, or the mean if there is none, that is moved in each direction."""
        starts = self._starts or [self.legal(np.full(self.count, 1 / self.count))]
        start = starts[choices.choice("seed", len(starts))]
        return self.moved(start, [choices.number(f"move {n}", -3.0, 3.0) for n in range(self.dimension)])

    def encode(self, candidate: Coefficients) -> list[float]:
        """Returns the coefficients in units of the mean one."""
        return [self.count * value for value in candidate]

    def to_plain(self, candidate: Coefficients) -> Any:
        """Returns the coefficients as a list."""
        return list(candidate)

    def from_plain(self, data: Any) -> Coefficients:
        """Returns coefficients from a list."""
        return tuple(map(float, data))

    @property
    def dimension(self) -> int:
        """The number of directions in which the sums stay 1: G (K - 1)."""
        return self.groups * (self.count - 1)

    def moved(self, start: Coefficients, move: Sequence[float]) -> Coefficients:
        """Returns a candidate moved along orthonormal directions, in units of twice the mean coefficient."""
        moves = np.asarray(move).reshape(self.groups, self.count - 1)
        return self.legal(self.rows(start) + moves @ self._basis)

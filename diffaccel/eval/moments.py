r"""Mean and covariance of feature vectors in one pass, mergeable.

Two parts with counts n_a, n_b, means m_a, m_b and sums of squares M_a, M_b of centered vectors combine to

.. math::
    m = m_a + \delta n_b / n, \quad M = M_a + M_b + \delta \delta^T n_a n_b / n, \quad \delta = m_b - m_a

References:
    | Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (Chan, Golub, LeVeque, 1979)
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.linalg import blas

from ..errors import OptionError
from .features import Rows, blocks

__all__ = ["Gaussian", "Moments"]


@dataclass(frozen=True)
class Gaussian:
    """What a Fréchet distance needs to know of a set of feature vectors.

    Arguments:
        mean: The mean (d), float64.
        covariance: The covariance (d, d) with divisor n - 1, float64.
        count: The number n of vectors; None where it is not known or the distribution is exact.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    @property
    def dim(self) -> int:
        """The length d of a vector."""
        return len(self.mean)

    @classmethod
    def of(cls, features: Rows) -> "Gaussian":
        """Returns mean and covariance of feature vectors (N, d)."""
        moments = Moments(features.shape[1])
        for block in blocks(features):
            moments.update(block)
        return moments.gaussian()


class Moments:
    """Count, mean and centered sum of squares of the vectors seen so far, in float64.

    Arguments:
        dim: The length d of a vector; the state has 8 d^2 bytes.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self._squares = np.zeros((dim, dim), order="F")  # the lower triangle

    def update(self, vectors: np.ndarray) -> None:
        """Adds vectors (B, d).

        Raises:
            OptionError: If they have another length, or are not finite.
        """
        block = np.array(vectors, dtype=np.float64, ndmin=2)  # a copy, centered in place below
        self._check(block.shape[1])
        if not np.isfinite(block).all():
            raise OptionError("features are not finite")
        if len(block):
            mean = block.mean(0)
            block -= mean
            self._add(len(block), mean)
            self._squares = blas.dsyrk(1.0, block.T, 1.0, self._squares, lower=1, overwrite_c=1)

    def merge(self, other: Self) -> None:
        """Adds the vectors that another one has seen.

        Raises:
            OptionError: If they have another length.
        """
        self._check(len(other.mean))
        if other.count:
            self._add(other.count, other.mean)
            self._squares += other._squares

    def _check(self, dim: int) -> None:
        if dim != len(self.mean):
            raise OptionError(f"features have {dim} numbers; expected {len(self.mean)}")

    def _add(self, count: int, mean: np.ndarray) -> None:
        """Moves the mean, and adds the squares between the two parts."""
        total = self.count + count
        delta = mean - self.mean
        weight = self.count * (count / total)
        self._squares = blas.dsyr(weight, delta, lower=1, a=self._squares, overwrite_a=1)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Returns mean and covariance.

        Raises:
            OptionError: If fewer than two vectors were seen.
        """
        if self.count < 2:
            raise OptionError(f"{self.count} image{'s'[: self.count != 1]}; statistics need at least 2")
        covariance = self._squares / (self.count - 1)
        covariance += np.tril(covariance, -1).T
        return Gaussian(self.mean.copy(), covariance, self.count)

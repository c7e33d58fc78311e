r"""The kernel distance of two sets of features (squared maximum mean discrepancy), with its standard error.

With :math:`N` features :math:`x`, :math:`M` features :math:`y` and a kernel :math:`k`, the unbiased estimate
is

.. math:: \frac{1}{N(N-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{M(M-1)} \sum_{i \ne j} k(y_i, y_j)
          - \frac{2}{NM} \sum_{ij} k(x_i, y_j),

and by Hoeffding's decomposition its variance is

.. math:: \frac{4}{N} \operatorname{Var} h(x) + \frac{4}{M} \operatorname{Var} g(y)
          + \frac{2 \zeta_{xx}}{N(N-1)} + \frac{2 \zeta_{yy}}{M(M-1)} + \frac{4 \zeta_{xy}}{NM}

with :math:`h(x) = E k(x, X) - E k(x, Y)`, :math:`g(y) = E k(y, Y) - E k(y, X)`, and :math:`\zeta` the mean
square of the kernel less the means of its rows and columns. If the distributions coincide, `h` and `g` are
constant and only the terms in :math:`\zeta` are left. All parts are estimated without bias from sums of rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from .estimate import Estimate
from .features import Rows, check_rows, placed

__all__ = ["cmmd", "kid", "kid_difference", "kid_subsets"]

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The kernel of every row of a block (A, d) with every row of another (B, d), with shape (A, B)."""


def kid(x: Rows, y: Rows) -> Estimate:
    """Returns the kernel inception distance: that of the cubic kernel (a.b / d + 1)^3, over all pairs.

    An unbiased distance can be negative, and is about as often as not if the distributions coincide. The
    features are read in blocks, and time grows with (N + M)^2 d.

    References:
        Binkowski et al., Demystifying MMD GANs, 2018, arXiv 1801.01401.
        Sutherland and Deka, Unbiased estimators for the variance of MMD estimators, 2019, arXiv 1906.02104.

    Arguments:
        x: The features of generated images, with shape (N, d).
        y: The features of reference images, with shape (M, d).

    Returns:
        The distance. Its standard error counts both samples, and is None if N or M is below 4; as parts that
        are estimated as negative count as 0, it is some 10 to 20 % too large if the distributions coincide.

    Raises:
        OptionError: If a set has fewer than 2 rows, holds NaN or infinity, or the lengths differ.
    """
    return _distance(x, y, _cubic)


def cmmd(x: Rows, y: Rows, sigma: float = 10.0, scale: float = 1000.0) -> Estimate:
    """Returns the CMMD of CLIP embeddings: the distance of the kernel exp(-|a - b|^2 / 2 sigma^2).

    The paper's estimate keeps the pairs of an image with itself, so its value is larger: by
    (1 - mean k(x_i, x_j)) / N + (1 - mean k(y_i, y_j)) / M, means over i != j, times ``scale``.

    References:
        Jayasumana et al., Rethinking FID: Towards a Better Evaluation Metric for Image Generation, 2024,
        arXiv 2401.09603.

    Arguments:
        x: The embeddings of generated images, with shape (N, d), of unit length in the authors' code.
        y: The embeddings of reference images, with shape (M, d).
        sigma: The width of the kernel.
        scale: The factor of the result.

    Returns:
        The distance, which may be negative; its standard error is None if N or M is below 4.

    Raises:
        OptionError: As `kid`, and if ``sigma`` or ``scale`` is not positive.
    """
    if not (sigma > 0 and scale > 0):
        raise OptionError(f"sigma={sigma!r} and scale={scale!r} must be positive")

    def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
        return np.exp(np.maximum(squared, 0) / (-2 * sigma**2))

    distance = _distance(x, y, gaussian)
    return Estimate(scale * distance.value, None if distance.se is None else scale * distance.se)


def kid_difference(a: Rows, b: Rows, reference: Rows) -> Estimate:
    """Returns KID(b) - KID(a) for two samplers that used the same seeds: row n of each has seed n.

    The standard error keeps the pairing: what both samplers share cancels, as does much of what the reference
    set adds, so it is smaller than that of two unpaired distances. It counts all three samples.

    References:
        Binkowski et al., Demystifying MMD GANs, 2018, arXiv 1801.01401.

    Arguments:
        a: The features of the first sampler, with shape (N, d).
        b: The features of the second, with shape (N, d), row by row from the same seeds.
        reference: The features of reference images, with shape (M, d).

    Returns:
        The difference, negative if ``b`` is closer; its standard error is None if N or M is below 4.

    Raises:
        OptionError: As `kid`, and if ``a`` and ``b`` differ in their number of rows.
    """
    count, dim = check_rows(a, "a", 2)
    if check_rows(b, "b", 2, dim)[0] != count:
        raise OptionError(f"a has {count} rows but b {b.shape[0]}; row n of both must come from one seed")
    check_rows(reference, "reference", 2, dim)

    def pairs(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return _cubic(p[:, dim:], q[:, dim:]) - _cubic(p[:, :dim], q[:, :dim])

    def cross(p: np.ndarray, y: np.ndarray) -> np.ndarray:
        return _cubic(p[:, dim:], y) - _cubic(p[:, :dim], y)

    # a pair (a_n, b_n) is one draw; the reference's own term is in both distances and cancels
    both, zeros = _Pairs(a, b), np.zeros(reference.shape[0])
    return _combine(
        _within(both, pairs, 0.0), _Sums(zeros, zeros, 0.0), _between(both, reference, cross, 0.0)
    )


def kid_subsets(x: Rows, y: Rows, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Returns what other libraries print as KID: its mean over random subsets, and their standard deviation.

    The mean has the expectation of `kid` but more noise. The deviation is that of one subset: it is *not* the
    error of the mean, which does not fall with the number of subsets, and which `kid` reports.

    References:
        Binkowski et al., Demystifying MMD GANs, 2018, arXiv 1801.01401.

    Arguments:
        x: The features of generated images, with shape (N, d).
        y: The features of reference images, with shape (M, d).
        subsets: The number of subsets.
        size: The rows of a subset, drawn without replacement from either set.
        seed: The seed of the draw.

    Returns:
        The mean, and the standard deviation with divisor ``subsets``.

    Raises:
        OptionError: As `kid`, and if ``size`` exceeds N or M: smaller subsets spread more.
    """
    count, dim = check_rows(x, "x", 2)
    least = min(count, check_rows(y, "y", 2, dim)[0])
    if not 2 <= size <= least:
        raise OptionError(
            f"size={size} is outside 2..{least}, the rows of the smaller set; pass size={least}"
        )
    if subsets < 1:
        raise OptionError(f"subsets={subsets} must be at least 1")
    rng = np.random.default_rng(seed)
    values = [_value(*_sums(_draw(x, size, rng), _draw(y, size, rng), _cubic)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


class _Pairs:
    """The rows of two sets side by side, with shape (N, 2d)."""

    def __init__(self, a: Rows, b: Rows) -> None:
        self.a, self.b = a, b
        self.shape = (a.shape[0], 2 * a.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.concatenate([self.a[rows], self.b[rows]], 1)


@dataclass(frozen=True)
class _Sums:
    """Sums of a kernel by row (A,) and by column (B,), and of its square; within a set without i = j."""

    rows: np.ndarray
    columns: np.ndarray
    squares: float

    @property
    def total(self) -> float:
        return float(self.rows.sum())


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    base = a @ b.T / a.shape[1] + 1
    return base * base * base


def _draw(features: Rows, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns random rows without replacement, in the set's order; no more than a block is read at once."""
    chosen = np.sort(rng.choice(features.shape[0], size, replace=False))
    parts = []
    for place, block in placed(features):
        low, high = np.searchsorted(chosen, (place.start, place.stop))
        parts.append(block[chosen[low:high] - place.start])
    return np.concatenate(parts)


def _within(x: Rows, kernel: Kernel, shift: float) -> _Sums:
    rows, squares = np.zeros(x.shape[0]), 0.0
    for here, a in placed(x):
        for there, b in placed(x, here.start):
            values = kernel(a, b) - shift
            if here == there:
                np.fill_diagonal(values, 0)
                squares += float(np.vdot(values, values))
            else:
                rows[there] += values.sum(0)
                squares += 2 * float(np.vdot(values, values))
            rows[here] += values.sum(1)
    return _Sums(rows, rows, squares)


def _between(x: Rows, y: Rows, kernel: Kernel, shift: float) -> _Sums:
    rows, columns, squares = np.zeros(x.shape[0]), np.zeros(y.shape[0]), 0.0
    for here, a in placed(x):
        for there, b in placed(y):
            values = kernel(a, b) - shift
            rows[here] += values.sum(1)
            columns[there] += values.sum(0)
            squares += float(np.vdot(values, values))
    return _Sums(rows, columns, squares)


def _sums(x: Rows, y: Rows, kernel: Kernel) -> tuple[_Sums, _Sums, _Sums]:
    # a constant cancels in the distance; without it the squares lose fewer digits
    first, second = (np.asarray(features[:64], np.float64) for features in (x, y))
    shift = float(kernel(first, second).mean())
    return _within(x, kernel, shift), _within(y, kernel, shift), _between(x, y, kernel, shift)


def _distance(x: Rows, y: Rows, kernel: Kernel) -> Estimate:
    _, dim = check_rows(x, "x", 2)
    check_rows(y, "y", 2, dim)
    return _combine(*_sums(x, y, kernel))


def _value(xx: _Sums, yy: _Sums, xy: _Sums) -> float:
    n, m = len(xy.rows), len(xy.columns)
    return xx.total / (n * (n - 1)) + yy.total / (m * (m - 1)) - 2 * xy.total / (n * m)


def _combine(xx: _Sums, yy: _Sums, xy: _Sums) -> Estimate:
    n, m = len(xy.rows), len(xy.columns)
    value = _value(xx, yy, xy)
    if min(n, m) < 4:
        return Estimate(value)
    zeta_xx, projected_xx = _variances_within(xx)
    zeta_yy, projected_yy = _variances_within(yy)
    zeta_xy, projected_x, projected_y = _variances_between(xy)
    h = projected_xx + projected_x - 2 * _covariance(xx, xy.rows, m)
    g = projected_yy + projected_y - 2 * _covariance(yy, xy.columns, n)
    second = 2 * zeta_xx / (n * (n - 1)) + 2 * zeta_yy / (m * (m - 1)) + 4 * zeta_xy / (n * m)
    # both are unbiased, hence of either sign near 0
    return Estimate(value, math.sqrt(max(4 * h / n + 4 * g / m, 0) + max(second, 0)))


def _variances_within(sums: _Sums) -> tuple[float, float]:
    """Returns zeta, and the variance of E k(x, X), from means over pairs that share one element or none."""
    n, pairs = len(sums.rows), len(sums.rows) * (len(sums.rows) - 1)
    power = float(np.vdot(sums.rows, sums.rows))
    shared = (power - sums.squares) / (pairs * (n - 2))
    apart = (sums.total**2 - 4 * power + 2 * sums.squares) / (pairs * (n - 2) * (n - 3))
    return sums.squares / pairs - 2 * shared + apart, shared - apart


def _variances_between(sums: _Sums) -> tuple[float, float, float]:
    """Returns zeta, and the variances of E k(x, Y) and E k(X, y)."""
    n, m = len(sums.rows), len(sums.columns)
    by_row, by_column = (float(np.vdot(vector, vector)) for vector in (sums.rows, sums.columns))
    shared_x = (by_row - sums.squares) / (n * m * (m - 1))
    shared_y = (by_column - sums.squares) / (n * m * (n - 1))
    apart = (sums.total**2 - by_row - by_column + sums.squares) / (n * m * (n - 1) * (m - 1))
    return sums.squares / (n * m) - shared_x - shared_y + apart, shared_x - apart, shared_y - apart


def _covariance(within: _Sums, cross: np.ndarray, others: int) -> float:
    """Returns the covariance of E k(x, X) and E k(x, Y), from the sums of either by x."""
    n = len(cross)
    product = float(np.vdot(within.rows, cross))
    shared = product / (n * (n - 1) * others)
    apart = (within.total * float(cross.sum()) - 2 * product) / (n * (n - 1) * (n - 2) * others)
    return shared - apart

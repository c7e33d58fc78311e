r"""Fréchet distance of two Gaussians, with its bias, its standard error and its limit of many samples.

With factors :math:`S_r = L L^T` and :math:`L^T S_g L = U \mathrm{diag}(s^2) U^T`,

.. math::
    FD = |\mu_g - \mu_r|^2 + tr S_g + tr S_r - 2 \sum_i s_i

No matrix root, no complex numbers, nothing added to the diagonal: s^2 are eigenvalues of a symmetric
matrix. For fewer samples than dimensions they are those of the N x N matrix :math:`C_g S_r C_g^T`, and where
both sets are small s are the singular values of :math:`C_g C_r^T`, with centered features C over sqrt(N - 1).

References:
    | GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017)
    | https://arxiv.org/abs/1706.08500

    | Effectively Unbiased FID and Inception Score and Where to Find Them (Chong & Forsyth, 2019)
    | https://arxiv.org/abs/1911.07023
"""

import functools

import numpy as np
from scipy import linalg

from ..errors import OptionError
from .estimate import Estimate
from .features import Rows, blocks, placed
from .moments import Gaussian, Moments

__all__ = ["Frechet", "Reference", "factor", "fid_infinity", "frechet_distance"]

CUT = 1e-6
"""Standard deviations s below this part of the largest one are null directions."""

ENOUGH = 8
"""Samples per dimension from which on the first-order bias is all of it."""


def factor(covariance: np.ndarray) -> np.ndarray:
    """Returns L (d, d) or (d, rank) with L L^T = ``covariance``, by Cholesky where it is definite."""
    lower, failed = linalg.lapack.dpotrf(_columns(covariance), lower=1, clean=1)
    if not failed:
        return lower
    values, vectors = linalg.eigh(covariance, check_finite=False)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return np.asfortranarray(vectors[:, kept] * np.sqrt(values[kept]))


def _columns(symmetric: np.ndarray) -> np.ndarray:
    """Returns a symmetric matrix in the order of LAPACK, without a copy."""
    return symmetric if symmetric.flags.f_contiguous else symmetric.T


def _sandwich(lower: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Returns the lower triangle of L^T S L; for a triangular L with half the operations."""
    if lower.shape[0] != lower.shape[1]:
        return lower.T @ covariance @ lower
    return linalg.lapack.dsygst(_columns(covariance), lower, itype=2, lower=1)[0]


def _sum_of_roots(values: np.ndarray) -> float:
    """Returns the sum of s, without the null directions, of which rounding would leave 1e-8 each."""
    noise = len(values) * np.finfo(np.float64).eps * values.max(initial=0.0)
    return float(np.sqrt(values[values > noise]).sum())


class Reference:
    """The reference of Fréchet distances, whose factor is computed once.

    Arguments:
        gaussian: Its mean and covariance.
        lower: The factor, if it is known.
    """

    def __init__(self, gaussian: Gaussian, lower: np.ndarray | None = None) -> None:
        self.gaussian = gaussian
        self._lower = lower

    @functools.cached_property
    def lower(self) -> np.ndarray:
        """A factor L of the covariance; triangular if it has d columns."""
        return factor(self.gaussian.covariance) if self._lower is None else self._lower

    def distance(self, other: Gaussian) -> float:
        """Returns the distance of another set.

        Raises:
            OptionError: If the features have another length.
        """
        mine = self.gaussian
        _check(other.dim, mine.dim)
        values = linalg.eigvalsh(_sandwich(self.lower, other.covariance), check_finite=False, driver="evr")
        traces = other.covariance.trace(), mine.covariance.trace()
        return _assemble(other.mean - mine.mean, *traces, _sum_of_roots(values))

    def distance_of_few(self, features: Rows) -> float:
        """Returns the distance of a set (N, d) of fewer vectors than dimensions, by an N x N matrix."""
        _check(features.shape[1], self.gaussian.dim)
        centered, mean = _centered(features)
        values = linalg.eigvalsh(centered @ self.gaussian.covariance @ centered.T, check_finite=False)
        traces = float((centered**2).sum()), self.gaussian.covariance.trace()
        return _assemble(mean - self.gaussian.mean, *traces, _sum_of_roots(values))


def _check(dim: int, expected: int) -> None:
    if dim != expected:
        raise OptionError(f"features have {dim} numbers and those of the reference {expected}")


def _assemble(shift: np.ndarray, trace: float, other: float, roots: float) -> float:
    return float(shift @ shift + trace + other - 2 * roots)


def _centered(features: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Returns centered vectors over sqrt(N - 1), and the mean."""
    rows = np.array(features[0 : features.shape[0]], dtype=np.float64)
    if len(rows) < 2:
        raise OptionError(f"{len(rows)} image(s); a Fréchet distance needs at least 2")
    if not np.isfinite(rows).all():
        raise OptionError("features are not finite")
    mean = rows.mean(0)
    return (rows - mean) / np.sqrt(len(rows) - 1), mean


def frechet_distance(generated: Rows | Gaussian, reference: Rows | Gaussian) -> float:
    """Returns the Fréchet distance, by the route that suits the numbers of vectors.

    Arguments:
        generated: Feature vectors (N, d), or their mean and covariance.
        reference: The same of the reference.

    Raises:
        OptionError: If the lengths differ, there are fewer than two vectors, or they are not finite.
    """
    few = [x for x in (generated, reference) if not isinstance(x, Gaussian) and x.shape[0] < x.shape[1]]
    if len(few) == 2:
        _check(few[0].shape[1], few[1].shape[1])
        (c_g, mu_g), (c_r, mu_r) = map(_centered, few)
        roots = linalg.svdvals(c_g @ c_r.T, check_finite=False)
        return _assemble(mu_g - mu_r, float((c_g**2).sum()), float((c_r**2).sum()), float(roots.sum()))
    if few:  # the distance is symmetric
        other = reference if few[0] is generated else generated
        return Reference(_gaussian(other)).distance_of_few(few[0])
    return Reference(_gaussian(reference)).distance(_gaussian(generated))


def _gaussian(x: Rows | Gaussian) -> Gaussian:
    return x if isinstance(x, Gaussian) else Gaussian.of(x)


class Frechet:
    """One Fréchet distance and all that follows from its eigenvectors.

    Arguments:
        generated: Mean and covariance of the generated set.
        reference: The reference, or its mean and covariance.
    """

    def __init__(self, generated: Gaussian, reference: Reference | Gaussian) -> None:
        self.reference = reference if isinstance(reference, Reference) else Reference(reference)
        self.generated, target = generated, self.reference.gaussian
        _check(generated.dim, target.dim)
        values, vectors = linalg.eigh(
            _sandwich(self.reference.lower, generated.covariance), check_finite=False
        )
        self.shift = generated.mean - target.mean
        traces = generated.covariance.trace(), target.covariance.trace()
        self.distance = _assemble(self.shift, *traces, _sum_of_roots(values))
        roots = np.sqrt(values.clip(min=0))
        kept = roots > CUT * roots.max(initial=0.0)
        self.roots = roots[kept]  # s
        self.whitener = self.reference.lower @ vectors[:, kept]  # z = whitener^T (x - mu_g) has variances s^2

    def influence(self, features: Rows) -> np.ndarray:
        r"""Returns how much each generated vector moves the distance (N), with mean 0 over the set.

        h(x) = 2 (mu_g - mu_r) . c + c^T (I - T) c - mean, c = x - mu_g, with the transport map T.
        """
        parts = []
        for block in blocks(features):
            c = block - self.generated.mean
            moved = ((c @ self.whitener) ** 2 / self.roots).sum(1)  # c^T T c
            parts.append(2 * c @ self.shift + (c**2).sum(1) - moved)
        values = np.concatenate(parts)
        return values - values.mean()

    def standard_error(self, features: Rows) -> float:
        """Returns the standard error from the sampling of the generated vectors, by the delta method.

        With fewer vectors than about 8 d it is too wide, by up to half of it around N = d.
        """
        values = self.influence(features)
        return float(values.std(ddof=1) / np.sqrt(len(values)))

    def bias(self, features: Rows | None = None, reference: Rows | None = None) -> float:
        """Returns the first-order bias that finite samples give the distance.

        Arguments:
            features: The generated vectors; without them Gaussian fourth moments are assumed.
            reference: The reference vectors, likewise.
        """
        total = 0.0
        target = self.reference.gaussian
        if self.generated.count:
            moment = self._gaussian_term() if features is None else self._moment_term(features)
            total += (self.generated.covariance.trace() + moment) / self.generated.count
        if target.count:
            moment = self._gaussian_term()
            if reference is not None:  # the roles swapped
                moment = Frechet(target, self.generated)._moment_term(reference)
            total += (target.covariance.trace() + moment) / target.count
        return float(total)

    def _gaussian_term(self) -> float:
        s = self.roots
        return float(0.5 * (np.outer(s, s) / np.add.outer(s, s)).sum() + 0.25 * s.sum())

    def _moment_term(self, features: Rows) -> float:
        """Returns 1/2 sum_ij Var(z_i z_j) / (s_i s_j (s_i + s_j)) with measured fourth moments."""
        s, variance, count = self.roots, np.zeros((len(self.roots),) * 2), features.shape[0]
        for block in blocks(features):
            squares = ((block - self.generated.mean) @ self.whitener) ** 2
            variance += squares.T @ squares
        variance /= count
        variance.flat[:: len(s) + 1] -= (s**2 * (count - 1) / count) ** 2  # z are not correlated
        variance /= np.outer(s, s)
        variance /= np.add.outer(s, s)
        return float(0.5 * variance.sum())

    @property
    def correctable(self) -> bool:
        """Whether both sets have the samples per dimension that make the first-order bias trustworthy."""
        counts = (self.generated.count, self.reference.gaussian.count)
        return all(count is None or count >= ENOUGH * self.generated.dim for count in counts)


def fid_infinity(
    features: Rows,
    reference: Reference | Gaussian,
    points: int = 15,
    smallest: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Returns the distance extrapolated to infinitely many generated vectors, by a line in 1 / n.

    Arguments:
        features: Generated vectors (N, d).
        reference: The reference.
        points: The number of subset sizes.
        smallest: The smallest subset; min(5000, max(N / 10, 2)) by default.
        seed: The seed of the subsets, each drawn without replacement.

    Returns:
        The intercept, with the standard error of the least-squares line (the points are not independent).
    """
    target = reference if isinstance(reference, Reference) else Reference(reference)
    total, rng = features.shape[0], np.random.default_rng(seed)
    first = min(5000, max(total // 10, 2)) if smallest is None else smallest
    if points < 3:
        raise OptionError(f"FID-infinity needs at least 3 sizes of subsets, not {points}")
    if not 2 <= first < total:
        raise OptionError(f"FID-infinity needs subsets of 2 to {total - 1} of {total} vectors, not {first}")
    sizes = np.linspace(first, total, points).astype(int)
    values = [target.distance(_subset(features, rng, size)) for size in sizes]
    design = np.stack([np.ones(points), 1 / sizes], 1)
    solution, residual, *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    spread = float(residual[0]) / max(points - 2, 1) if len(residual) else 0.0
    error = np.sqrt(spread * np.linalg.inv(design.T @ design)[0, 0])
    return Estimate(float(solution[0]), float(error))


def _subset(features: Rows, rng: np.random.Generator, size: int) -> Gaussian:
    """Returns the Gaussian of a random subset, read block by block."""
    chosen = np.zeros(features.shape[0], bool)
    chosen[rng.permutation(len(chosen))[:size]] = True
    moments = Moments(features.shape[1])
    for place, block in placed(features):
        moments.update(block[chosen[place]])
    return moments.gaussian()

"""Fréchet distance: closed forms, routes, bias and errors against repeats, and other libraries."""

import warnings

import numpy as np
import pytest
import torch

from diffaccel.errors import OptionError
from diffaccel.eval.frechet import Frechet, Reference, factor, fid_infinity, frechet_distance
from diffaccel.eval.moments import Gaussian

DIM = 64
POWER = 1 / np.arange(1, DIM + 1)
EXACT = Gaussian(np.zeros(DIM), np.eye(DIM))


def sets(rng, n, m, dim=DIM):
    scale = np.arange(1, dim + 1) ** -0.5
    mix = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return (rng.standard_normal((n, dim)) * scale) @ mix + 0.05, rng.standard_normal((m, dim)) * 1.1 * scale


def by_eigvals(x, y):
    roots = np.sqrt(np.linalg.eigvals(x.covariance @ y.covariance).astype(complex)).real.sum()
    return np.square(x.mean - y.mean).sum() + x.covariance.trace() + y.covariance.trace() - 2 * roots


def diagonal(rng):
    a, b = rng.uniform(0.1, 3, (2, DIM))
    m = rng.standard_normal(DIM)
    truth = (m**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    return Gaussian(m, np.diag(a)), Gaussian(np.zeros(DIM), np.diag(b)), truth


def test_closed_form():
    x, y, truth = diagonal(np.random.default_rng(0))
    for found in (frechet_distance(x, y), frechet_distance(y, x), Frechet(x, y).distance):
        assert found == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("n", [20, 300])
def test_rotations_and_permutations_change_nothing(n):
    rng = np.random.default_rng(1)
    x, y = sets(rng, n, 400)
    truth = frechet_distance(x, y)
    turn, order = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0], rng.permutation(DIM)
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(truth, rel=1e-9)
    assert frechet_distance(x[:, order], y[:, order]) == pytest.approx(truth, rel=1e-9)
    assert frechet_distance(x[::-1], y) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("n", [8, DIM // 2, DIM - 1, DIM, DIM + 1, 4 * DIM])
@pytest.mark.parametrize("m", [8, DIM // 2, 5 * DIM])
def test_routes_agree_and_are_symmetric(n, m):
    x, y = sets(np.random.default_rng(2), n, m)
    gx, gy = Gaussian.of(x), Gaussian.of(y)
    routes = [frechet_distance(a, b) for a in (x, gx) for b in (y, gy)]
    routes += [frechet_distance(b, a) for a in (x, gx) for b in (y, gy)]
    routes += [Frechet(gx, gy).distance, Frechet(gy, gx).distance, by_eigvals(gx, gy)]
    if n < DIM:
        routes.append(Reference(gy).distance_of_few(x))
    assert np.ptp(routes) <= 1e-6 * gy.covariance.trace()


@pytest.mark.parametrize("n", [8, DIM // 2, DIM, 4 * DIM])
def test_identical_sets(n):
    x, _ = sets(np.random.default_rng(3), n, 2)
    g = Gaussian.of(x)
    for found in (
        frechet_distance(x, x),
        frechet_distance(g, g),
        frechet_distance(x, g),
        Frechet(g, g).distance,
    ):
        assert abs(found) <= 1e-8 * g.covariance.trace()
    result = Frechet(g, g)
    assert np.isfinite([result.bias(x, x), result.standard_error(x)]).all()


@pytest.mark.parametrize("n", [10, 100])
def test_constant_features(n):
    x, y = np.full((n, DIM), 2.0), np.full((n + 5, DIM), 2.5)
    g = Gaussian.of(x)
    assert frechet_distance(x, y) == pytest.approx(DIM / 4)
    result = Frechet(g, Gaussian.of(y))
    assert result.distance == pytest.approx(DIM / 4)
    assert result.bias(x, y) == 0 and result.standard_error(x) == 0
    assert factor(g.covariance).shape == (DIM, 0)


def mean_of(repeats, make):
    values = [make(np.random.default_rng(seed)) for seed in range(repeats)]
    return np.mean(values, 0), np.std(values, 0, ddof=1) / np.sqrt(repeats)


def test_bias_of_an_isotropic_gaussian():
    """d (d + 5) / 4 N with an exact reference, and twice that with a sampled one."""
    n = 10_000
    x = np.random.default_rng(0).standard_normal((n, DIM))
    assert Frechet(EXACT_N(n), EXACT).bias() == pytest.approx(0.1104, abs=1e-6)
    assert Frechet(EXACT_N(n), EXACT_N(n)).bias() == pytest.approx(0.2208, abs=1e-6)

    def make(rng):
        a, b = (Gaussian.of(rng.standard_normal((n, DIM))) for _ in range(2))
        return frechet_distance(a, EXACT), frechet_distance(a, b)

    (one, both), (error_one, error_both) = mean_of(24, make)
    assert abs(one - 0.1104) < 4 * error_one + 0.02 * 0.1104
    assert abs(both - 0.2208) < 4 * error_both + 0.02 * 0.2208
    assert Frechet(Gaussian.of(x), EXACT).bias(x) == pytest.approx(0.1104, rel=0.03)


def EXACT_N(n):
    return Gaussian(np.zeros(DIM), np.eye(DIM), n)


def test_bias_of_a_power_law():
    g = Gaussian(np.zeros(DIM), np.diag(POWER), 2000)
    assert Frechet(g, Gaussian(g.mean, g.covariance)).bias() == pytest.approx(0.0240, abs=1e-4)


@pytest.mark.parametrize("n", [500, 2000, 5000])
def test_correction_leaves_less_than_a_tenth(n):
    exact = Reference(Gaussian(np.zeros(DIM), np.diag(POWER)))

    def make(rng):
        x = rng.standard_normal((n, DIM)) * np.sqrt(POWER)
        result = Frechet(Gaussian.of(x), exact)
        return result.distance, result.distance - result.bias(x)

    (raw, corrected), _ = mean_of(20, make)
    assert abs(corrected) < 0.1 * raw


def relu(rng, n, mix):
    return np.maximum(rng.standard_normal((n, DIM)) @ mix + 0.2, 0)


def test_fourth_moments_correct_what_is_not_gaussian():
    rng = np.random.default_rng(5)
    mix = rng.standard_normal((DIM, DIM)) / np.sqrt(DIM)
    exact = Reference(Gaussian.of(relu(rng, 400_000, mix)))

    def make(rng):
        x = relu(rng, 2000, mix)
        result = Frechet(Gaussian.of(x), exact)
        return result.distance, result.distance - result.bias(), result.distance - result.bias(x)

    (raw, gaussian, moments), _ = mean_of(20, make)
    assert raw > 0.02 and abs(moments) < 0.03 * raw and abs(gaussian) > 3 * abs(moments)


def test_reference_side_of_the_bias():
    """Its fourth moments are those of the reference, in its own coordinates: swapped roles swap the parts."""
    rng = np.random.default_rng(6)
    mix = rng.standard_normal((DIM, DIM)) / np.sqrt(DIM)
    x, y = relu(rng, 1500, mix), relu(rng, 2500, mix) * 1.3
    gx, gy = Gaussian.of(x), Gaussian.of(y)
    assert Frechet(gx, gy).bias(x, y) == pytest.approx(Frechet(gy, gx).bias(y, x), rel=1e-9)
    assert Frechet(gx, gy).bias() == pytest.approx(Frechet(gy, gx).bias(), rel=1e-9)


def test_confidence_interval_covers_the_truth():
    n, scale = 2000, np.sqrt(POWER)
    exact, shift = Reference(Gaussian(np.zeros(DIM), np.diag(POWER))), 0.1 * scale
    truth = frechet_distance(Gaussian(shift, 1.44 * np.diag(POWER)), exact.gaussian)
    covered = []
    for seed in range(100):
        x = np.random.default_rng(seed).standard_normal((n, DIM)) * 1.2 * scale + shift
        result = Frechet(Gaussian.of(x), exact)
        error = result.standard_error(x)
        covered.append(abs(result.distance - result.bias(x) - truth) < 1.96 * error)
    print("coverage", np.mean(covered))
    assert 0.93 <= np.mean(covered) <= 0.98


def test_paired_standard_error():
    n, scale, exact = 2000, np.sqrt(POWER), Reference(Gaussian(np.zeros(DIM), np.diag(POWER)))
    found, paired, unpaired = [], [], []
    for seed in range(60):
        noise = np.random.default_rng(seed).standard_normal((n, DIM))
        a, b = noise * 1.2 * scale, (noise * 1.22 + 0.02) * scale
        results = [Frechet(Gaussian.of(x), exact) for x in (a, b)]
        h = [result.influence(x) for result, x in zip(results, (a, b), strict=True)]
        found.append(results[1].distance - results[0].distance)
        paired.append((h[1] - h[0]).std() / np.sqrt(n))
        unpaired.append(np.hypot(h[0].std(), h[1].std()) / np.sqrt(n))
    print("paired", np.mean(paired), "empirical", np.std(found), "unpaired", np.mean(unpaired))
    assert np.mean(paired) == pytest.approx(np.std(found), rel=0.25)
    assert np.mean(unpaired) > 4 * np.mean(paired)


@pytest.mark.parametrize("n", [DIM // 2, DIM])
def test_error_with_few_vectors_is_too_wide_and_not_too_narrow(n):
    exact, scale = Reference(Gaussian(np.zeros(DIM), np.diag(POWER))), np.sqrt(POWER)
    found, errors = [], []
    for seed in range(100):
        x = np.random.default_rng(seed).standard_normal((n, DIM)) * 1.3 * scale
        result = Frechet(Gaussian.of(x), exact)
        assert not result.correctable
        found.append(result.distance)
        errors.append(result.standard_error(x))
    assert 0.95 <= np.mean(errors) / np.std(found) <= 1.6


def test_infinity():
    n, scale = 5000, np.sqrt(POWER)
    exact = Reference(Gaussian(np.zeros(DIM), np.diag(POWER)))
    truth = frechet_distance(Gaussian(np.zeros(DIM), np.diag(1.21 * POWER)), exact.gaussian)

    def make(rng):
        x = rng.standard_normal((n, DIM)) * 1.1 * scale
        return frechet_distance(x, exact.gaussian), fid_infinity(x, exact, smallest=500).value

    (raw, extrapolated), _ = mean_of(20, make)
    print("raw", raw / truth - 1, "infinity", extrapolated / truth - 1)
    assert abs(extrapolated / truth - 1) < 0.02 < raw / truth - 1
    x = np.random.default_rng(0).standard_normal((300, DIM))
    assert fid_infinity(x, exact) == fid_infinity(x, exact.gaussian)


@pytest.mark.parametrize("options", [{"points": 2}, {"smallest": 1}, {"smallest": 30}])
def test_infinity_refuses(options):
    with pytest.raises(OptionError, match="FID-infinity needs"):
        fid_infinity(np.zeros((30, DIM)), EXACT, **options)


@pytest.mark.parametrize("n", [300, 2000])
def test_other_libraries_agree(n):
    from cleanfid.fid import frechet_distance as clean
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    x, y = sets(np.random.default_rng(7), n, 2 * n)
    x, y = np.maximum(x, -0.1), np.maximum(y, -0.1)
    ours, (mx, my) = frechet_distance(x, y), (x.mean(0), y.mean(0))
    sx, sy = (np.cov(rows, rowvar=False) for rows in (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [clean(mx, sx, my, sy)]
    statistics = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (x, y)]
    theirs.append(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])
    theirs.append(float(_compute_fid(*map(torch.from_numpy, (mx, sx, my, sy)))))
    print([value / ours - 1 for value in theirs])
    assert theirs == pytest.approx([ours] * 3, rel=1e-6)


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("m", [10, 100])
@pytest.mark.parametrize(("wrong", "message"), [("nan", "finite"), ("dim", "numbers"), ("few", "at least 2")])
def test_refuses(n, m, wrong, message):
    x, y = sets(np.random.default_rng(8), n, m)
    x = {"nan": np.where(x > 1e9, x, np.nan), "dim": x[:, 1:], "few": x[:1]}[wrong]
    for pair in ((x, y), (y, x)):
        with pytest.raises(OptionError, match=message):
            frechet_distance(*pair)
    if wrong == "dim":
        with pytest.raises(OptionError, match=message):
            Frechet(Gaussian.of(x), Gaussian.of(y))

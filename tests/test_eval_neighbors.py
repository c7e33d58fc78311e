"""Precision, recall, density and coverage: against exact differences, other libraries, and known limits."""

import numpy as np
import pytest
import torch

from diffaccel.errors import OptionError
from diffaccel.eval.features import FeatureFile
from diffaccel.eval.neighbors import prdc

KEYS = ["precision", "recall", "density", "coverage"]


def values(*args, **options):
    found = prdc(*args, **options)
    assert list(found) == KEYS
    return [found[key].value for key in KEYS]


def by_differences(x, y, k, closed, squared=None):
    squared = squared or (lambda a, b: np.square(a[:, None] - b).sum(2))
    radii = []
    for rows in (x, y):
        within = squared(rows, rows).astype(float)
        np.fill_diagonal(within, np.inf)
        radii.append(np.sort(within, 1)[:, k - 1])
    inside = np.less_equal if closed else np.less
    cross = squared(x, y)
    held = inside(cross, radii[1])
    recall = inside(cross, radii[0][:, None]).any(0).mean()
    return [held.any(1).mean(), recall, held.sum(1).mean() / k, held.any(0).mean()]


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.standard_normal((310, 8)) * 1.2, rng.standard_normal((270, 8))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("closed", [True, False])
def test_values_are_those_of_exact_differences(pair, k, closed, monkeypatch):
    expected = by_differences(*pair, k, closed)
    assert values(*pair, k, closed) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("diffaccel.eval.features.ROWS", 64)
    assert values(*pair, k, closed) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("closed", [True, False])
def test_ties_and_duplicates_are_exact(closed, monkeypatch):
    """On a lattice far from 0 most balls have features on their surface, and some have radius 0."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 4, (200, 3)), rng.integers(0, 4, (150, 3))
    expected = by_differences(x, y, 3, closed)
    assert expected != by_differences(x, y, 3, not closed)
    for rows in (2048, 32):
        monkeypatch.setattr("diffaccel.eval.features.ROWS", rows)
        assert values(x / 10 + 50, y / 10 + 50, 3, closed) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dim", [2, 2048])
def test_identical_sets(dim):
    x = np.random.default_rng(2).standard_normal((150, dim)).astype(np.float32) + 3
    # each feature is in its own ball, and all k neighbors lie inside or on the surface
    assert values(x, x[::-1], 5) == [1, 1, 1.2, 1]
    assert values(x, x, 5, closed=False) == [1, 1, 1, 1]


def test_self_is_no_neighbor_in_high_dimension():
    """The matrix product gives a feature a distance to itself; here the nearest is closer than that."""
    rng = np.random.default_rng(3)
    centers = rng.standard_normal((60, 2048)).astype(np.float32)
    twins = centers + np.float32(1e-3) * rng.standard_normal(centers.shape).astype(np.float32)
    y = np.concatenate([centers, twins])
    mid = (centers.astype(float) + twins) / 2
    far = twins + 2.0 * (twins.astype(float) - centers)
    assert values(mid, y, 1)[0] == 1
    assert values(far, y, 1)[0] == 0


@pytest.mark.parametrize("dim", [2, 64])
def test_equal_distributions_reach_the_expected_coverage(dim):
    rng = np.random.default_rng(4)
    found = [values(*rng.standard_normal((2, 1000, dim))) for _ in range(4)]
    expected = 1 - np.prod([(1000 - j) / (2000 - j) for j in range(1, 6)])
    assert expected == pytest.approx(0.969, abs=5e-4)
    assert np.mean([f[3] for f in found]) == pytest.approx(expected, abs=0.008)
    assert np.mean([f[2] for f in found]) == pytest.approx(1, abs=0.06)


def test_what_each_number_sees():
    rng = np.random.default_rng(5)
    y = np.concatenate([rng.standard_normal((300, 4)), 20 + rng.standard_normal((300, 4))])
    half = dict(zip(KEYS, values(rng.standard_normal((600, 4)), y), strict=True))
    assert half["precision"] > 0.9
    assert half["recall"] < 0.51
    assert half["coverage"] < 0.51
    assert values(y + 100, y) == [0, 0, 0, 0]


def test_errors_are_the_spread_given_the_other_set():
    rng = np.random.default_rng(6)
    fixed = rng.standard_normal((300, 16))
    of_x = [prdc(rng.standard_normal((300, 16)) * 1.1, fixed) for _ in range(120)]
    of_y = [prdc(fixed * 1.1, rng.standard_normal((300, 16))) for _ in range(120)]
    for key, runs in (("precision", of_x), ("density", of_x), ("recall", of_y)):
        spread = np.std([run[key].value for run in runs])
        assert np.mean([run[key].se for run in runs]) == pytest.approx(spread, rel=0.3), key
    coverage = [run["coverage"] for run in of_x]
    assert 0.5 < np.mean([e.se for e in coverage]) / np.std([e.value for e in coverage]) < 1.2


@pytest.mark.parametrize("k", [3, 5])
def test_agrees_with_prdc(pair, k):
    peer = pytest.importorskip("prdc").compute_prdc(pair[1], pair[0], k)
    assert values(*pair, k, closed=False) == pytest.approx([peer[key] for key in KEYS], rel=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_agrees_with_torch_fidelity(pair, k):
    metric = pytest.importorskip("torch_fidelity.metric_prc")
    options = {"prc_neighborhood": k, "prc_batch_size": 100, "save_cpu_ram": True, "verbose": False}
    peer = metric.prc_features_to_metric(*(torch.from_numpy(s) for s in pair), **options)
    assert values(*pair, k)[:2] == pytest.approx([peer["precision"], peer["recall"]], rel=1e-6)


def test_float16_distances_are_rounded_as_stated():
    rng = np.random.default_rng(7)
    x, y = (np.abs(rng.standard_normal((n, 40))).astype(np.float32) for n in (160, 140))

    def half(a, b):
        a, b = a.astype(np.float16), b.astype(np.float16)
        product = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float16)
        norms = [np.square(s).sum(1, dtype=np.float64).astype(np.float16) for s in (a, b)]
        return np.maximum(norms[1] - 2 * product + norms[0][:, None], 0)

    expected = by_differences(x, y, 3, True, half)
    found = values(x, y, 3, fp16_compat=True)
    # sums in float32 and float64 round to different float16 numbers now and then
    assert found == pytest.approx(expected, abs=0.02)
    assert found == pytest.approx(values(x, y, 3), abs=0.05)
    assert found != values(x, y, 3)


def test_float16_overflow_falls_back_to_float32(pair):
    far = [1000 * rows for rows in pair]
    assert values(*far, 3, fp16_compat=True) == pytest.approx(values(*pair, 3), abs=0.01)


def test_file_is_like_an_array(tmp_path):
    rng = np.random.default_rng(8)
    arrays, files = [rng.standard_normal((n, 6)).astype(np.float32) for n in (2200, 400)], []
    for name, rows in zip("xy", arrays, strict=True):
        files.append(FeatureFile(tmp_path / name, 6))
        files[-1].append(rows)
    assert prdc(*files) == prdc(*arrays)


def test_memory_is_bounded_by_blocks(monkeypatch, traced_peak):
    monkeypatch.setattr("diffaccel.eval.features.ROWS", 128)
    x = np.random.default_rng(9).standard_normal((2000, 8))
    assert traced_peak(lambda: prdc(x, x)) < 4e6 < 8 * len(x) ** 2


def test_bad_input_is_refused(pair):
    x, y = pair
    holed = x.copy()
    holed[5, 0] = np.inf
    for first, second, k, word in (
        (x[:5], y, 5, "x has 5 rows; at least 6"),
        (x, y[:3], 3, "y has 3 rows; at least 4"),
        (x, y[:, 1:], 3, "length 7"),
        (holed, y, 3, "first in row 5"),
        (x, y, 0, "k=0"),
    ):
        with pytest.raises(OptionError, match=word):
            prdc(first, second, k)

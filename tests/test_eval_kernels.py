"""KID and CMMD: against the formula, against other libraries, and their standard errors against repeats."""

import numpy as np
import pytest
import torch

from diffaccel.errors import OptionError
from diffaccel.eval.features import FeatureFile
from diffaccel.eval.kernels import cmmd, kid, kid_difference, kid_subsets

DIM = 32
MIX = np.random.default_rng(1).standard_normal((DIM, DIM)) / np.sqrt(DIM)


def features(rng, count, shift=0.0):
    """Correlated and not negative, like those of a network after ReLU."""
    return np.maximum(rng.standard_normal((count, DIM)) @ MIX + shift, 0)


def by_loops(x, y, kernel):
    within = [
        sum(kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / len(s) / (len(s) - 1)
        for s in (x, y)
    ]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return features(rng, 300, 0.2), features(rng, 300)


def test_values_are_the_formula(pair):
    x, y = pair[0][:20], pair[1][:13]
    assert kid(x, y).value == pytest.approx(by_loops(x, y, lambda a, b: (a @ b / DIM + 1) ** 3), rel=1e-12)
    gauss = by_loops(x, y, lambda a, b: np.exp(-((a - b) @ (a - b)) / (2 * 3.0**2)))
    assert cmmd(x, y, sigma=3.0, scale=10.0).value == pytest.approx(10 * gauss, rel=1e-10)


def test_symmetric_and_blind_to_order_and_blocks(pair, monkeypatch):
    x, y = pair[0], pair[1][:250]
    whole = kid(x, y)
    monkeypatch.setattr("diffaccel.eval.features.ROWS", 64)
    for other in (kid(x, y), kid(y, x), kid(x[::-1], y)):
        assert (other.value, other.se) == pytest.approx((whole.value, whole.se), rel=1e-9)
    subset = kid_subsets(x, y, 3, 100)
    monkeypatch.undo()
    assert kid_subsets(x, y, 3, 100) == pytest.approx(subset, rel=1e-12)


def test_cmmd_of_the_paper_is_larger_by_the_diagonal(pair):
    x, y = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in pair)
    k = [[np.exp(-np.square(a[:, None] - b).sum(2) / 200) for b in (x, y)] for a in (x, y)]
    biased = 1000 * (k[0][0].mean() + k[1][1].mean() - 2 * k[0][1].mean())
    n = len(x)
    loss = sum(1 - (k[i][i].sum() - n) / n / (n - 1) for i in (0, 1)) / n
    assert cmmd(x, y).value == pytest.approx(biased - 1000 * loss, rel=1e-8)


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 0.9, 1.35), (0.1, 0.85, 1.15), (0.5, 0.85, 1.15)])
@pytest.mark.parametrize("sizes", [(200, 200), (80, 240)])
def test_standard_error_is_the_spread_of_repeats(shift, low, high, sizes):
    rng = np.random.default_rng(2)
    found = [kid(features(rng, sizes[0], shift), features(rng, sizes[1])) for _ in range(200)]
    spread = np.std([e.value for e in found], ddof=1)
    reported = np.sqrt(np.mean([e.se**2 for e in found]))
    assert low < reported / spread < high
    if shift == 0:
        assert abs(np.mean([e.value for e in found])) < 3 * spread / np.sqrt(200)
        assert min(e.value for e in found) < 0


def test_cmmd_error_is_the_spread_of_repeats():
    rng = np.random.default_rng(3)
    found = [cmmd(features(rng, 150, 0.2), features(rng, 150)) for _ in range(150)]
    ratio = np.sqrt(np.mean([e.se**2 for e in found])) / np.std([e.value for e in found], ddof=1)
    assert 0.85 < ratio < 1.15


@pytest.mark.parametrize("change", [0.02, 0.1])
def test_paired_error_is_the_spread_of_paired_repeats(change):
    rng, found, unpaired = np.random.default_rng(4), [], []
    for _ in range(200):
        noise, y = rng.standard_normal((200, DIM)) @ MIX, features(rng, 200)
        a = np.maximum(noise + 0.1, 0)
        b = np.maximum(noise + 0.1 + change + 0.05 * rng.standard_normal(noise.shape), 0)
        found.append(kid_difference(a, b, y))
        alone = kid(a, y), kid(b, y)
        assert found[-1].value == pytest.approx(alone[1].value - alone[0].value, abs=1e-12)
        unpaired.append(np.hypot(alone[0].se, alone[1].se))
    spread = np.std([e.value for e in found], ddof=1)
    assert 0.85 < np.sqrt(np.mean([e.se**2 for e in found])) / spread < 1.15
    assert np.mean(unpaired) > 1.5 * spread


def test_equal_samplers_differ_by_nothing(pair):
    same = kid_difference(pair[0], pair[0], pair[1])
    assert (same.value, same.se) == (0, 0)


def test_subset_deviation_is_not_the_error():
    rng = np.random.default_rng(5)
    full, means, deviations = [], [], []
    for seed in range(60):
        x, y = features(rng, 400), features(rng, 400)
        full.append(kid(x, y).value)
        mean, deviation = kid_subsets(x, y, 20, 100, seed)
        means.append(mean)
        deviations.append(deviation)
    assert abs(np.mean(means) - np.mean(full)) < 3 * np.std(np.subtract(means, full)) / np.sqrt(60)
    assert np.mean(deviations) > 2 * np.std(full)


def test_subsets_have_their_own_generator(pair):
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    first = kid_subsets(*pair, 5, 50, seed=3)
    assert first == kid_subsets(*pair, 5, 50, seed=3) != kid_subsets(*pair, 5, 50, seed=4)
    assert (np.random.get_state()[1] == state).all()
    mean, deviation = kid_subsets(*pair, 2, 300)
    assert mean == pytest.approx(kid(*pair).value, rel=1e-10)
    assert deviation < 1e-12


def test_agrees_with_torch_fidelity(pair):
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    tensors = [torch.from_numpy(s) for s in pair]
    # with all rows in one subset the peers' estimator is the full one
    options = {"kid_subsets": 1, "kid_subset_size": 300, "rng_seed": 0, "verbose": False}
    cubic = metric.kid_features_to_metric(*tensors, **options)[metric.KEY_METRIC_KID_MEAN]
    assert kid(*pair).value == pytest.approx(cubic, rel=1e-9)
    gauss = metric.kid_features_to_metric(*tensors, kid_kernel="rbf", kid_kernel_rbf_sigma=10.0, **options)
    assert cmmd(*pair).value == pytest.approx(1000 * gauss[metric.KEY_METRIC_KID_MEAN], rel=1e-8)
    # smaller subsets come from another generator: equal only to within the noise of their means
    options |= {"kid_subsets": 50, "kid_subset_size": 100}
    peer = metric.kid_features_to_metric(*tensors, **options)
    mean, deviation = kid_subsets(*pair, 50, 100)
    assert mean == pytest.approx(peer[metric.KEY_METRIC_KID_MEAN], abs=4 * deviation / np.sqrt(25))
    assert deviation == pytest.approx(peer[metric.KEY_METRIC_KID_STD], rel=0.5)


def test_agrees_with_clean_fid(pair):
    peer = pytest.importorskip("cleanfid.fid")
    assert kid(*pair).value == pytest.approx(peer.kernel_distance(*pair, 1, 300), rel=1e-9)


def test_agrees_with_torchmetrics(pair):
    module = pytest.importorskip("torchmetrics.image.kid")
    metric = module.KernelInceptionDistance(torch.nn.Identity(), subsets=1, subset_size=300)
    x, y = (torch.from_numpy(s).float() for s in pair)
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert kid(x.numpy(), y.numpy()).value == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_file_is_like_an_array(tmp_path):
    rng = np.random.default_rng(6)
    x, y = (features(rng, n, s).astype(np.float32) for n, s in ((2300, 0.1), (500, 0)))
    files = []
    for name, rows in (("x", x), ("y", y)):
        files.append(FeatureFile(tmp_path / name, DIM))
        files[-1].append(rows)
    assert kid(*files) == kid(x, y)
    assert kid_subsets(*files, 2, 400) == kid_subsets(x, y, 2, 400)
    assert kid_difference(files[0], files[0], files[1]).value == 0


def test_memory_is_bounded_by_blocks(monkeypatch, traced_peak):
    monkeypatch.setattr("diffaccel.eval.features.ROWS", 128)
    x = features(np.random.default_rng(7), 2000)
    assert traced_peak(lambda: kid(x, x)) < 4e6 < 8 * len(x) ** 2


def test_tiny_sets_have_no_error(pair):
    assert kid(pair[0][:3], pair[1]).se is None
    assert cmmd(pair[0][:3], pair[1]).se is None
    assert kid(pair[0][:4], pair[1]).se >= 0


@pytest.mark.parametrize("call", [kid, cmmd, kid_subsets, lambda x, y: kid_difference(x, x, y)])
def test_bad_sets_are_refused(pair, call):
    x, y = pair
    holed = y.copy()
    holed[7, 3] = np.nan
    for other, word in ((y[:1], "at least 2"), (y[:, 1:], "length 31"), (holed, "row 7"), (y[0], "shape")):
        with pytest.raises(OptionError, match=word):
            call(x, other)


def test_bad_options_are_refused(pair):
    with pytest.raises(OptionError, match="pass size=300"):
        kid_subsets(*pair)
    with pytest.raises(OptionError, match="subsets=0"):
        kid_subsets(*pair, 0, 100)
    with pytest.raises(OptionError, match="sigma"):
        cmmd(*pair, sigma=0)
    with pytest.raises(OptionError, match="one seed"):
        kid_difference(pair[0], pair[0][:-1], pair[1])

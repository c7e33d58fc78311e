"""The inception score: its limits, the splits of others, its error and bias against repeats."""

import numpy as np
import pytest
import torch

from diffaccel.errors import OptionError
from diffaccel.eval.features import FeatureFile
from diffaccel.eval.inception_score import inception_score

MIX = 1.2 * np.random.default_rng(1).standard_normal((10, 20))


def draw(seed, count):
    return np.random.default_rng(seed).standard_normal((count, 10)) @ MIX


def by_formula(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def test_limits():
    assert inception_score(np.zeros((50, 7))).value == pytest.approx(1, abs=1e-14)
    sure = 1e4 * np.eye(8)[np.arange(80) % 8]
    assert inception_score(sure).value == pytest.approx(8, rel=1e-12)
    # classes that nobody is in add nothing
    assert inception_score(np.pad(sure, ((0, 0), (0, 3)))).value == pytest.approx(8, rel=1e-12)
    assert inception_score(sure[:1].repeat(9, 0)).value == pytest.approx(1, abs=1e-14)


def test_value_is_the_formula_and_ignores_a_constant():
    logits = draw(2, 5000)
    score = inception_score(logits)
    assert score.value == pytest.approx(by_formula(logits), rel=1e-12)
    assert score.scores == (score.value,)
    assert score.std == 0
    moved = inception_score(logits + 500)
    assert moved.value == pytest.approx(score.value, rel=1e-12)


def test_splits_of_adm():
    logits = draw(3, 5300)
    parts = [by_formula(logits[start : start + 1000]) for start in range(0, 5300, 1000)]
    score = inception_score(logits, split_size=1000)
    assert score.scores == pytest.approx(parts, rel=1e-12)
    assert score.value == pytest.approx(np.mean(parts), rel=1e-12)
    assert inception_score(logits, split_size=10000).value == inception_score(logits).value


@pytest.mark.parametrize(("count", "splits"), [(3000, 10), (2057, 10), (2057, 1), (25, 25)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_agrees_with_torch_fidelity(count, splits, shuffle):
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    logits = draw(4, count)
    peer = metric.isc_features_to_metric(torch.from_numpy(logits), splits, shuffle, 2020)
    score = inception_score(logits, splits, shuffle_seed=2020 if shuffle else None)
    assert score.value == pytest.approx(peer[metric.KEY_METRIC_ISC_MEAN], rel=1e-10)
    assert score.std == pytest.approx(peer[metric.KEY_METRIC_ISC_STD], rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("splits", [1, 4])
def test_error_and_bias_are_those_of_repeats(splits):
    truth = inception_score(draw(5, 200_000)).value
    found = [inception_score(draw(100 + seed, 800), splits) for seed in range(300)]
    values = np.array([score.value for score in found])
    assert np.mean([score.se for score in found]) == pytest.approx(values.std(), rel=0.15)
    bias = np.mean([score.bias for score in found])
    assert bias < 0
    assert values.mean() - truth == pytest.approx(bias, abs=4 * values.std() / np.sqrt(300))


def test_file_is_like_an_array(tmp_path):
    logits = draw(6, 2500).astype(np.float32)
    file = FeatureFile(tmp_path / "logits", 20)
    file.append(logits)
    assert inception_score(file, 3, 7) == inception_score(logits, 3, 7)


def test_bad_input_is_refused():
    logits = draw(7, 30)
    holed = logits.copy()
    holed[4, 4] = np.nan
    for rows, options, word in (
        (logits[:1], {}, "at least 2"),
        (holed, {}, "row 4"),
        (logits, {"splits": 31}, "splits=31"),
        (logits, {"splits": 0}, "splits=0"),
        (logits, {"split_size": 0}, "split_size=0"),
        (logits, {"splits": 2, "split_size": 5}, "one of them"),
    ):
        with pytest.raises(OptionError, match=word):
            inception_score(rows, **options)

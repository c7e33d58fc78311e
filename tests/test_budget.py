"""Tolerance bounds against their closed form and by simulation; budgets and what judges them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from diffaccel.errors import MissingWeights, OptionError
from diffaccel.eval import fidelity
from diffaccel.eval.budget import QUALITY, Budget, Judge
from diffaccel.eval.perceptual import _untrained_lpips, feature_distance, feature_distances, lpips_available
from diffaccel.eval.tolerance import allowed_violations, needed, tolerance_bound


def test_needed_is_the_closed_form():
    assert needed(0.95, 0.95) == 59 and needed(0.99, 0.95) == 299 and needed(0.5, 0.95) == 5
    assert needed(0.5, 0.875) == 3, "exactly reached: 1 - 0.5^3"
    for coverage in (0.3, 0.9, 0.95):
        count = needed(coverage, 0.95)
        assert coverage**count <= 0.05 < coverage ** (count - 1)


def test_violations_are_those_of_wilks():
    least = [next(n for n in range(59, 200) if allowed_violations(n, 0.95, 0.95) == v) for v in range(4)]
    assert least == [59, 93, 124, 153]
    for count in (64, 100, 400):
        allowed = allowed_violations(count, 0.95, 0.95)
        assert binom.cdf(allowed, count, 0.05) <= 0.05 < binom.cdf(allowed + 1, count, 0.05)


def test_bound_holds_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for count in (59, 64, 93, 200):
        bounds = [tolerance_bound(rng.random(count), 0.95, 0.95) for _ in range(1500)]
        share = np.mean(np.array(bounds) >= 0.95)  # of uniform values, it is the bound's coverage
        exact = 1 - binom.cdf(allowed_violations(count, 0.95, 0.95), count, 0.05)
        assert abs(share - exact) < 0.025 and exact >= 0.95


def test_bound_is_the_largest_of_few_values():
    assert tolerance_bound(range(64), 0.95, 0.95) == 63 and tolerance_bound(range(93), 0.95, 0.95) == 91


@pytest.mark.parametrize(("shares", "word"), [((0, 0.9), "coverage"), ((0.9, 1), "confidence")])
def test_shares_out_of_range(shares, word):
    with pytest.raises(OptionError, match=word):
        needed(*shares)


def test_too_few_say_how_many():
    with pytest.raises(OptionError, match="at least 59"):
        allowed_violations(58, 0.95, 0.95)


def test_budgets_are_read():
    assert Budget.read("lpips<=0.05") == Budget("lpips", 0.05) and str(Budget("psnr", 30.0)) == "psnr>=30"
    assert Budget.read(" speedup >= 2 ") == Budget("speedup", 2.0)
    assert {Budget.read(f"{name}{side}0.5").metric for name, side in QUALITY.items()} == set(QUALITY)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("psnr<=30", "psnr>=30"),
        ("rms>=0.1", "rms<=0.1"),
        ("lpisp<=0.1", "did you mean 'lpips'"),
        ("rms<0.1", "form"),
        ("rms<=much", "form"),
        ("rms<=nan", "limit"),
        ("rms<=0", "limit"),
        ("ssim>=1", "limit"),
        ("speedup>=1", "limit"),
        ("psnr>=inf", "limit"),
    ],
)
def test_mistakes_in_budgets(text, words):
    with pytest.raises(OptionError, match=words):
        Budget.read(text)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(3, 3, 33, 32, generator=generator)
    noise = torch.randn(3, 3, 33, 32, generator=generator)
    return (reference + torch.tensor([0.01, 0.03, 0.1])[:, None, None, None] * noise).clamp(0, 1), reference


def test_judge_is_the_harness_image_by_image(pairs):
    images, reference = pairs
    found = Judge("rms")(images, reference)
    for n in range(3):
        single = fidelity(images[n : n + 1], reference[n : n + 1])
        assert found["rms"][n] == pytest.approx(single.rms, rel=1e-6)
        assert found["relative"][n] == pytest.approx(single.relative, rel=1e-6)
        assert found["ssim"][n] == pytest.approx(single.ssim.value, rel=1e-5)
        assert Budget("psnr", 30.0).value_of(found["rms"][n]) == pytest.approx(single.psnr, rel=1e-6)


def test_losses_are_within_where_the_metric_is(pairs):
    found = Judge("rms")(*pairs)
    psnr = -20 * np.log10(found["rms"])
    for budget, met in ((Budget("psnr", 29.0), psnr >= 29), (Budget("rms", 0.02), found["rms"] <= 0.02),
                        (Budget("ssim", 0.99), found["ssim"] >= 0.99)):  # fmt: skip
        assert 0 < met.sum() < 3 and ((budget.losses(found) <= budget.largest) == met).all()
        assert budget.value_of(budget.loss_of(0.7)) == pytest.approx(0.7)
    assert Budget("psnr", 30.0).value_of(0.0) == math.inf
    assert Budget("speedup", 2.0).largest == math.inf and Budget("speedup", 2.0).quality == "relative"


def test_networks_judge_images_one_by_one(pairs, monkeypatch):
    if not lpips_available():
        with pytest.raises(MissingWeights):
            Judge("lpips")
    network = _untrained_lpips()
    monkeypatch.setattr("diffaccel.eval.budget.load_lpips", lambda device: network)
    images, reference = pairs
    found = Judge("lpips")(images, reference)["lpips"]
    assert found.shape == (3,) and (np.diff(found) > 0).all()
    assert Judge("lpips")(reference, reference)["lpips"] == pytest.approx(np.zeros(3))

    def extract(pixels):
        return pixels.float().flatten(1)[:, ::97]

    values = feature_distances(images, reference, extract)
    assert values.shape == (3,) and bool((values.diff() > 0).all())
    assert feature_distance(images, reference, extract).value == pytest.approx(float(values.mean()))


def test_small_images_have_no_ssim():
    small = torch.rand(2, 3, 8, 8)
    assert "ssim" not in Judge("rms")(small, small)
    with pytest.raises(OptionError, match="too small"):
        Judge("ssim")(small, small)

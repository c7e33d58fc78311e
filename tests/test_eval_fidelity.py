"""Pairs of images: PSNR against its definition, SSIM against torchmetrics, batches, errors, bad input."""

import math
import sys

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from diffaccel.errors import OptionError
from diffaccel.eval.fidelity import Pairs, fidelity, to_floats


def draw(count=12, size=24, noise=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(count, 3, size, size, generator=generator)
    scale = noise * torch.rand(count, 1, 1, 1, generator=generator)
    images = reference + scale * torch.randn(reference.shape, generator=generator)
    return images.clamp(0, 1), reference


def level(value, count=2, dtype=torch.uint8):
    return torch.full((count, 3, 16, 16), value, dtype=dtype)


@pytest.mark.parametrize("scale", [1, 255], ids=["bytes", "floats"])
def test_psnr_of_constant_differences(scale):
    def shade(value):
        return level(value) if scale == 1 else level(value / 255, dtype=torch.float32)

    black_white = fidelity(shade(0), shade(255))
    assert black_white.psnr == pytest.approx(0, abs=1e-6) and black_white.psnr_mean.value == 0
    assert black_white.rms == pytest.approx(1) and black_white.identical == 0
    for above, below in ((116, 100), (100, 116)):  # bytes wrap around one way only
        result = fidelity(shade(above), shade(below))
        assert result.psnr == pytest.approx(24.0484, abs=1e-4)
        assert result.psnr_mean.value == pytest.approx(20 * math.log10(255 / 16), rel=1e-12)
        assert result.psnr_mean.se == 0


def test_bytes_do_not_wrap():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (2, 4, 3, 16, 16), dtype=np.uint8)
    squares = ((x.astype(np.int64) - y) ** 2).reshape(4, -1).mean(1)
    expected = 10 * np.log10(255**2 / squares)
    result = fidelity(torch.from_numpy(x), torch.from_numpy(y))
    assert result.psnr_mean.value == pytest.approx(expected.mean(), rel=1e-12)
    assert result.psnr_mean.se == pytest.approx(expected.std(ddof=1) / 2, rel=1e-9)
    assert result.psnr == pytest.approx(10 * np.log10(255**2 / squares.mean()), rel=1e-12)
    assert result.rms == pytest.approx(np.sqrt(squares.mean()) / 255, rel=1e-12)
    wrapped = (np.subtract(x, y) ** 2).astype(float).mean()
    assert 10 * np.log10(255**2 / wrapped) > result.psnr + 15


def test_identical_pairs_are_counted_apart():
    images, reference = draw()
    images[:3] = reference[:3]
    result, others = fidelity(images, reference), fidelity(images[3:], reference[3:])
    assert (result.count, result.identical, others.identical) == (12, 3, 0)
    assert result.psnr_mean == others.psnr_mean
    assert result.rms**2 == pytest.approx(others.rms**2 * 9 / 12), "identical pairs count in the mean"
    assert result.psnr == pytest.approx(others.psnr + 10 * math.log10(12 / 9))
    same = fidelity(reference, reference)
    assert same.psnr == same.psnr_mean.value == math.inf and same.identical == 12 and same.rms == 0
    assert same.ssim.value == pytest.approx(1, abs=1e-6)


def test_differences_below_a_level_show_in_floats_only():
    reference = level(0.5, dtype=torch.float64)
    result = fidelity(reference + 1e-9, reference)
    assert result.rms == pytest.approx(1e-9, rel=1e-6) and result.psnr == pytest.approx(180, abs=1e-4)
    assert result.identical == 2 and result.psnr_mean.value == math.inf


def test_bytes_round_half_to_even():
    x = torch.tensor([2.5, 3.5, 4.5, 0.5]).view(1, 1, 2, 2) / 255
    expected = torch.tensor([2, 4, 4, 0], dtype=torch.uint8).view(1, 1, 2, 2)
    assert fidelity(x.double(), expected).identical == 1


@pytest.mark.parametrize(("size", "channels"), [(11, 3), (32, 1), (48, 3)])
def test_ssim_is_that_of_torchmetrics(size, channels):
    images, reference = (part[:, :channels] for part in draw(size=size))
    expected = structural_similarity_index_measure(images, reference, data_range=1.0)
    result = fidelity(images, reference)
    assert result.ssim.value == pytest.approx(float(expected), abs=1e-6)
    assert 0 < result.ssim.se < 0.1
    assert fidelity(images[..., :10], reference[..., :10]).ssim is None


def test_stream_is_like_all_at_once(monkeypatch):
    images, reference = draw()
    whole = fidelity(images, reference)
    pairs = Pairs()
    for part in (slice(0, 1), slice(1, 6), slice(6, 12)):
        pairs.update(images[part], reference[part])
    monkeypatch.setattr(sys.modules[Pairs.__module__], "CHUNK", 1)
    for result in (pairs.result(), fidelity(images, reference)):
        assert result.count == 12 and result.identical == whole.identical
        for name, value in whole.estimates().items():
            other = result.estimates()[name]
            assert (other.value, other.se) == pytest.approx((value.value, value.se), rel=1e-6), name
        assert result.worst == pytest.approx(whole.worst, rel=1e-12)


def test_state_goes_to_others_and_adds():
    images, reference = draw()
    first, second = Pairs(), Pairs()
    first.update(images[:5], reference[:5])
    second.update(images[5:], reference[5:])
    first.load_state_dict(second.state_dict())
    assert first.result().rms == pytest.approx(fidelity(images, reference).rms, rel=1e-12)


def test_mixed_sizes_weigh_the_same():
    pairs = Pairs()
    for side, step in ((12, 0.1), (40, 0.3)):
        reference = torch.full((1, 3, side, side), 0.5)
        pairs.update(reference + step, reference)
    assert pairs.result().rms == pytest.approx(math.sqrt((0.01 + 0.09) / 2), rel=1e-5)


def test_standard_errors_are_those_of_repeats():
    repeats = [fidelity(*draw(30, 12, seed=seed)).estimates() for seed in range(120)]
    assert set(repeats[0]) == {"rms", "psnr", "relative", "psnr_mean", "ssim"}
    for name in repeats[0]:
        found = [estimates[name] for estimates in repeats]
        spread = np.std([estimate.value for estimate in found], ddof=1)
        assert np.median([estimate.se for estimate in found]) == pytest.approx(spread, rel=0.25), name


def test_single_pair_has_no_error():
    result = fidelity(*(part[:1] for part in draw()))
    assert result.errors == {} and result.psnr_mean.se is None and result.ssim.se is None


def test_slightly_outside_is_clamped():
    x = torch.tensor([-0.009, 0.2, 1.004, 1.0]).view(1, 1, 2, 2)
    assert to_floats(x).flatten().tolist() == pytest.approx([0, 0.2, 1, 1])
    assert fidelity(x, x.clamp(0, 1)).rms == 0
    assert to_floats(x.half()).dtype == torch.float16


def test_bad_input_is_refused():
    images, reference = draw(2)
    holed = images.clone()
    holed[1, 2, 3, 4] = math.nan
    pairs = Pairs()
    for x, y, words in (
        (images, reference[:1], "differ in shape"),
        (images[0], reference[0], "expected \\(B, C, H, W\\)"),
        (images[:0], reference[:0], "none of them 0"),
        (holed, reference, "images: a pixel is not finite"),
        (images, holed / 0.0, "reference: a pixel is not finite"),
        (images, 2 * reference - 1, "reference: pixels from -0.9998 to 0.9997; .* \\(x \\+ 1\\) / 2"),
        (255 * images, reference, "images: pixels from 0 to 25"),
        (images.long(), reference, "type torch.int64"),
    ):
        with pytest.raises(OptionError, match=words):
            pairs.update(x, y)
    with pytest.raises(OptionError, match="no images to compare"):
        pairs.result()

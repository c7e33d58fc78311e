"""The wavelet transform against its closed forms, and the exchange of the coarse band."""

import math

import pytest
import torch

from diffaccel.errors import OptionError
from diffaccel.pipelines.wavelets import HIGH_PASS, LOW_PASS, MODES, dwt, idwt, low_band, with_low_band

LOW, HIGH = (torch.tensor(taps, dtype=torch.float64) for taps in (LOW_PASS, HIGH_PASS))
SIZES = [("symmetric", (64, 48)), ("symmetric", (63, 5)), ("symmetric", (2, 1)), ("periodization", (64, 48)),
         ("periodization", (4, 2))]  # fmt: skip


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_filters_are_orthonormal_with_four_vanishing_moments():
    assert LOW.sum().item() == pytest.approx(math.sqrt(2), abs=1e-12)
    for shift in range(0, 8, 2):
        expected = 1.0 if shift == 0 else 0.0
        for taps in (LOW, HIGH):
            assert (taps[shift:] * taps[: 8 - shift]).sum().item() == pytest.approx(expected, abs=1e-12)
        for one, other in ((LOW, HIGH), (HIGH, LOW)):
            assert abs((one[shift:] * other[: 8 - shift]).sum().item()) < 1e-12
    for power in range(4):
        assert abs((HIGH * torch.arange(8.0, dtype=torch.float64) ** power).sum().item()) < 1e-8


@pytest.mark.parametrize(("mode", "size"), SIZES)
def test_the_transform_is_undone(mode, size):
    images = noise(2, 3, *size)
    bands = dwt(images, mode)
    expected = [(side + 7) // 2 if mode == "symmetric" else side // 2 for side in size]
    assert list(bands.low.shape) == [2, 3, *expected]
    assert list(bands.high.shape) == [2, 3, 3, *expected]
    assert (idwt(bands, size, mode) - images).abs().max() < 1e-11


def test_coefficients_are_the_sums_of_the_definition():
    row = noise(9)
    mirrored = torch.cat([row.flip(0), row, row.flip(0)])  # pixel n stands at n + 9
    places = [[2 * k + 1 - m + 9 for m in range(8)] for k in range(8)]
    bands = dwt(row.expand(1, 1, 12, 9))  # constant along the height, where the low-pass is sqrt(2)
    for found, taps in ((bands.low, LOW), (bands.high[:, :, 0], HIGH)):
        expected = torch.stack([(taps * mirrored[index]).sum() for index in places])
        assert torch.allclose(found[0, 0, 4] / math.sqrt(2), expected, atol=1e-12)
    assert bands.high[:, :, 1:].abs().max() < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_is_all_coarse(mode):
    bands = dwt(torch.full((1, 1, 16, 24), 0.3, dtype=torch.float64), mode)
    assert (bands.low - 0.6).abs().max() < 1e-12
    assert bands.high.abs().max() < 1e-12
    assert (low_band(torch.ones(1, 1, 16, 24), 3, mode) - 8).abs().max() < 1e-5


def test_the_periodic_transform_keeps_the_norm():
    images = noise(1, 3, 16, 24)
    bands = dwt(images, "periodization")
    total = bands.low.square().sum() + bands.high.square().sum()
    assert total.item() == pytest.approx(images.square().sum().item())


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_exchange(mode, level):
    images, guide = noise(1, 3, 64, 48), low_band(noise(1, 3, 64, 48, seed=1), level, mode)
    assert (with_low_band(images, low_band(images, level, mode), level, mode) - images).abs().max() < 1e-11
    result = with_low_band(images, guide, level, mode)
    gap = (low_band(result, level, mode) - guide).abs()
    again = (with_low_band(result, guide, level, mode) - result).abs()
    if mode == "periodization":  # a projection
        assert max(gap.max(), again.max()) < 1e-11
        assert torch.allclose(dwt(result, mode).high, dwt(images, mode).high, atol=1e-11)
    elif level == 1:  # redundant at the borders only
        assert gap[..., 8:-8, 8:-8].max() < 1e-11
        assert gap.max() > 0.1
        assert again.max() > 0.1


def test_low_precision_is_widened():
    assert dwt(torch.ones(1, 1, 8, 8, dtype=torch.float16)).low.dtype == torch.float32


def test_refusals():
    with pytest.raises(OptionError, match="a side of 7 pixels is odd"):
        dwt(noise(1, 1, 8, 7), "periodization")
    with pytest.raises(OptionError, match="known: symmetric, periodization"):
        dwt(noise(1, 1, 8, 8), "zero")


# ---------------------------------------------------------------- what the exchange does to sampling

SIDE, STEPS = 16, 200


def gaussian():
    """The spectrum and basis of correlated pixels of unit variance on a torus."""
    place = torch.arange(SIDE, dtype=torch.float64)
    gap = torch.minimum((place[:, None] - place).abs(), SIDE - (place[:, None] - place).abs())
    line = torch.exp(-gap / 4)
    spectrum, basis = torch.linalg.eigh(torch.kron(line, line))
    return spectrum, basis


def sampled(swaps, guide):
    """Euler's solution of the ODE of the exact denoiser, with the coarse band exchanged in some steps."""
    spectrum, basis = gaussian()
    sigmas = [*torch.logspace(math.log10(80), -2, STEPS, dtype=torch.float64).tolist(), 0.0]
    x = noise(1, 1, SIDE, SIDE, seed=2) * sigmas[0]
    for step in range(STEPS):
        shrunk = spectrum / (spectrum + sigmas[step] ** 2) * (basis.T @ x.flatten())
        x0 = (basis @ shrunk).reshape(x.shape)
        if step < swaps:
            x0 = with_low_band(x0, guide, 1, "periodization")
        ratio = sigmas[step + 1] / sigmas[step]
        x = ratio * x + (1 - ratio) * x0
    return x


def test_only_an_exchange_to_the_end_fixes_the_coarse_band():
    guide = low_band(3 * noise(1, 1, SIDE, SIDE, seed=3), 1, "periodization")
    assert (low_band(sampled(STEPS, guide), 1, "periodization") - guide).abs().max() < 1e-10
    assert (low_band(sampled(STEPS // 3, guide), 1, "periodization") - guide).abs().max() > 1

"""Conversions between predictions: round trips, Jacobians, precision, checks of the interpolants card."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.noise import NoiseLevel, path_of

MEAN, EPS = torch.randn((2, 2, 3, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def outputs(alpha, sigma, x0, eps):
    v = (alpha * eps - sigma * x0) / math.hypot(alpha, sigma)
    return {"epsilon": eps, "sample": x0, "v_prediction": v, "flow_prediction": eps - x0}


def close(ours, truth, tolerance):
    return (ours - truth).abs().max() <= tolerance * max(1, truth.abs().max())


positive = st.floats(0.05, 20)
coefficient = st.floats(-3, 3)


@settings(max_examples=200, deadline=None)
@given(positive, positive, coefficient, coefficient, st.integers(0, 2**31))
def test_round_trips(alpha, sigma, p, q, seed):
    level = NoiseLevel(alpha, sigma, p, q)
    generator = torch.Generator().manual_seed(seed)
    x0, sample = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    output = level.output(x0, sample)
    eps = (sample - alpha * x0) / sigma
    if abs(level.jacobian) < 1e-2:
        return
    assert close(level.x0(output, sample), x0, 1e-9 * 400)
    assert close(level.eps(output, sample), eps, 1e-9 * 400)
    for kind in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        expected = outputs(alpha, sigma, x0, eps)[kind]
        assert close(level.convert(output, sample, kind), expected, 1e-6)


@pytest.mark.parametrize("p, q", [(0, 1), (1, 0), (-0.6, 0.8), (-1, 1), (1.7, 0.2)])
def test_jacobians(p, q):
    level = NoiseLevel(0.8, 0.6, p, q)
    step = 1e-6
    for ours, function in ((level.x0_per_output, level.x0), (level.eps_per_output, level.eps)):
        slope = (function(MEAN + step, EPS) - function(MEAN - step, EPS)) / (2 * step)
        assert (slope - ours).abs().max() < 1e-8
    assert level.log_snr == pytest.approx(math.log(0.8 / 0.6))


def test_singular_levels_raise():
    pure_noise, clean = NoiseLevel(0, 1, 0, 1), NoiseLevel(1, 0, 0, 1)
    assert (pure_noise.log_snr, clean.log_snr) == (-math.inf, math.inf)
    with pytest.raises(ZeroDivisionError):
        _ = pure_noise.x0_per_output
    with pytest.raises(ZeroDivisionError):
        pure_noise.x0(EPS, EPS)
    assert pure_noise.eps_per_output == 1
    assert torch.equal(pure_noise.eps(EPS, MEAN), EPS)
    assert torch.equal(NoiseLevel(1, 0, 1, 0).x0(MEAN, EPS), MEAN)
    assert torch.equal(NoiseLevel(0, 1, -1, 0).x0(EPS, MEAN), -EPS)  # v is not singular at pure noise
    with pytest.raises(ZeroDivisionError):
        clean.output(MEAN, MEAN)
    with pytest.raises(ZeroDivisionError):
        NoiseLevel(1, 0, 1, 0).eps(MEAN, MEAN)
    assert torch.equal(NoiseLevel(1, 0, 1, 0).output(MEAN, MEAN), MEAN)
    with pytest.raises(ValueError, match="unknown prediction type 'noise'"):
        NoiseLevel(1, 1, 0, 1).convert(EPS, EPS, "noise")


def ddim_scheduler():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_at_least_float32(dtype):
    level, sample, output = NoiseLevel(0.0683, 0.9977, 0, 1), EPS.to(dtype), MEAN.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    path = path_of(ddim_scheduler())
    for result, expected in [
        (level.x0(output, sample), level.x0(output.double(), sample.double())),
        (level.output(output, sample), level.output(output.double(), sample.double())),
        (level.convert(output, sample, "sample"), level.x0(output.double(), sample.double())),
        (path.velocity(3, output, sample), path.velocity(3, output.double(), sample.double())),
        (path.to_time_coordinates(3, output), output.double()),
    ]:
        assert result.dtype == wide
        assert close(result, expected, 1e-6)


# acceptance checks of the interpolants card


def mixture_x0(sample, alpha, sigma):
    """Posterior mean of .3 N((-2,1), .4^2) + .5 N((1,0), .8^2) + .2 N((3,-1), .3^2), by components."""
    means = torch.tensor([[-2.0, 1], [1, 0], [3, -1]], dtype=torch.float64)
    stds, weights = torch.tensor([[0.4, 0.8, 0.3], [0.3, 0.5, 0.2]], dtype=torch.float64)
    variances = alpha**2 * stds**2 + sigma**2
    residuals = sample[:, None] - alpha * means
    logits = weights.log() - variances.log() - residuals.square().sum(2) / (2 * variances)
    x0s = means + (alpha * stds**2 / variances)[:, None] * residuals
    return (logits.softmax(1)[..., None] * x0s).sum(1)


def slopes(kind, ratio):
    """alpha, sigma, and the derivatives of both by the path's own time, at sigma / alpha = ratio."""
    if kind == "ve":
        return 1.0, ratio, 0.0, 1.0
    if kind == "flow":
        return 1 / (1 + ratio), ratio / (1 + ratio), -1.0, 1.0
    alpha, sigma = 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
    if kind == "trig":
        return alpha, sigma, -sigma, alpha
    beta = 0.1 + 19.9 * (math.sqrt(0.1**2 + 4 * 19.9 / 2 * math.log1p(ratio**2)) - 0.1) / 19.9
    return alpha, sigma, -beta / 2 * alpha, beta / 2 * alpha**2 / sigma


@pytest.mark.parametrize("kind", ["vp", "ve", "flow", "trig"])
def test_check_1_conversions_of_a_mixture(kind):
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    worst = 0.0
    for ratio in (0.1, 0.5, 1.0, 3.0):
        alpha, sigma, alpha_slope, sigma_slope = slopes(kind, ratio)
        sample = alpha * 2 * noise + sigma * noise.flip(0)
        x0 = mixture_x0(sample, alpha, sigma)
        eps = (sample - alpha * x0) / sigma
        d = 0.5
        edm = (d / math.hypot(ratio, d)) * ratio / d**2, -d / math.hypot(ratio, d)
        for p, q in [(0, 1), (1, 0), (-sigma, alpha), (-1, 1), (alpha_slope, sigma_slope), (0.7, 1.9), edm]:
            level = NoiseLevel(alpha, sigma, p, q)
            output = p * x0 + q * eps
            errors = [level.x0(output, sample) - x0, (level.eps(output, sample) - eps) * sigma / alpha]
            worst = max(worst, *(float(error.abs().max()) for error in errors))
    assert worst < 5e-14


def ddim(kind, own_time=False):
    """20 DDIM steps uniform in lambda from -4 to 5, or Euler steps in the path's own time, to x / alpha."""
    ratios = [math.exp(-log_snr) for log_snr in np.linspace(-4, 5, 21)]
    time = {"ve": lambda s: s, "flow": lambda s: s / (1 + s), "trig": math.atan}.get(kind)
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sample = slopes(kind, ratios[0])[0] * ratios[0] * noise
    for ratio, following in itertools.pairwise(ratios):
        alpha, sigma, alpha_slope, sigma_slope = slopes(kind, ratio)
        x0 = mixture_x0(sample, alpha, sigma)
        eps = NoiseLevel(alpha, sigma, 1, 0).eps(x0, sample)
        if own_time:
            sample = sample + (time(following) - time(ratio)) * (alpha_slope * x0 + sigma_slope * eps)
        else:
            alpha, sigma, *_ = slopes(kind, following)
            sample = alpha * x0 + sigma * eps
    return sample / slopes(kind, ratios[-1])[0]


def test_check_2_ddim_is_the_same_on_all_paths():
    reference = ddim("ve")
    for kind in ("vp", "flow", "trig"):
        assert (ddim(kind) - reference).abs().max() < 5e-14
    for kind in ("ve", "flow"):
        assert (ddim(kind, own_time=True) - reference).abs().max() < 5e-14
    assert (ddim("trig", own_time=True) - reference).abs().max() > 0.1


@pytest.mark.parametrize("shift", [0.5, 3.0, 12.0])
def test_check_7_shift(shift):
    paths = []
    for k in (1.0, shift):
        scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=k)  # float64 sigmas
        scheduler.set_timesteps(20)
        paths.append(path_of(scheduler))
    for index in range(1, 20):
        shifted = paths[0][index].log_snr - math.log(shift)
        assert paths[1][index].log_snr == pytest.approx(shifted, abs=1e-12)


def test_check_8_paths_are_rescaled_copies():
    """t_B(t_A(t)) round trips; at one lambda x_B = c x_A has the same x0 and eps, for any output."""
    for t in np.linspace(0.02, 0.98, 25):
        flow = NoiseLevel(1 - t, t, -1, 1)
        ratio = math.exp(-flow.log_snr)
        edm = NoiseLevel(1, ratio, 0, 1)
        vp = NoiseLevel(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio), 1, 0)
        assert edm.sigma / (1 + edm.sigma) == pytest.approx(t, abs=1e-12)
        sample = flow.alpha * MEAN + flow.sigma * EPS
        for level in (edm, vp):
            assert level.log_snr == pytest.approx(flow.log_snr, abs=1e-12)
            output = level.p * MEAN + level.q * EPS
            rescaled = sample * level.alpha / flow.alpha
            assert torch.allclose(level.x0(output, rescaled), MEAN, atol=1e-12)
            assert torch.allclose(level.eps(output, rescaled), EPS, atol=1e-12, rtol=1e-10) or level.p == 1
            assert torch.allclose(level.convert(output, rescaled, "flow_prediction"), EPS - MEAN, atol=1e-10)

"""Rewards as potentials and as shifts, against exact tilted densities and the limit of small steps."""

import itertools
import math

import numpy as np
import pytest
import torch
from corrected import BOOT, corrected
from exact_particles import EULER, F64, drive, estimate, level_of, outputs_of
from tiny_pipelines import fresh

from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.pipelines import image_reward
from diffaccel.pipelines.feynman_kac import CLEAN
from diffaccel.pipelines.particles import Particles, Rules
from diffaccel.pipelines.rewards import Tilt


def normal(mean):
    return [(1.0, [mean], 1.0)]


@pytest.mark.parametrize("gradient", [False, True])
def test_reward_tilts_the_target(gradient):
    """N(0.5, 1) exp(1.5 x) is N(2, 1); the gradient saves particles."""
    swarm, _ = drive([normal(0.5)], (1.0,), 200, groups=8, particles=1000, data_std=1.0,
                     tilt=Tilt(lambda x0: x0[:, 0], 1.5, gradient), ess_threshold=0.2)  # fmt: skip
    level = level_of(5.0)
    x = swarm.samples
    swarm.step([level], outputs_of([normal(0.5)], x, level), CLEAN)  # the last potential has the full scale
    y = swarm.samples.reshape(8, 1000)
    mean, error = estimate(swarm, y)
    assert abs(mean - 2.0) < 3 * error + 0.02
    variance = estimate(swarm, (y - mean) ** 2)
    assert abs(variance[0] - 1) < 3 * variance[1] + 0.04
    least = min(min(moment.effective) for moment in swarm.history)
    assert least > 400 if gradient else least < 300


def test_any_gradient_is_corrected():
    """The shift may be wrong by a factor: the ratio of the kernels makes up for it."""

    class Wrong(Tilt):
        def shift(self, gradient, target, noise):
            return -0.4 * super().shift(gradient, target, noise)

    swarm, _ = drive([normal(0.5)], (1.0,), 100, groups=8, particles=2000, data_std=1.0,
                     tilt=Wrong(lambda x0: x0[:, 0], 1.0, True))  # fmt: skip
    level = level_of(5.0)
    swarm.step([level], outputs_of([normal(0.5)], swarm.samples, level), CLEAN)
    mean, error = estimate(swarm, swarm.samples.reshape(8, 2000))
    assert abs(mean - 1.5) < 3 * error + 0.02


@pytest.mark.parametrize("curvature", [0.0, -0.3])
def test_discrete_weights_have_the_limit_of_the_correctors(curvature):
    r"""Telescoped potentials and ratios of kernels become the Feynman-Kac weight of the shifted SDE.

    For the drift sig^2 (s + a g), g = grad(beta r), the weight of q exp(beta r) is, found as that of
    Proposition 3.4, which is a = 1/2, d(beta r)/dt + sig^2 [a <s, g> + (a - 1/2) (|g|^2 + div g)] in
    coordinates with f = 0; at a = 1 the noise of potentials and of ratios cancels.  With data N(m, 1) it is
    r_t(y) = r((y + S^2 m) / (1 + S^2)).
    """
    mean, scale = 0.5, 1.2

    def gap(steps):
        tilt = Tilt(lambda x0: (x0 + curvature / 2 * x0**2)[:, 0], scale, True)
        grid = np.linspace(-2.5, 3.0, steps + 1)
        generator = torch.Generator().manual_seed(steps)
        noise = torch.randn(400, 1, generator=generator, dtype=F64) * math.exp(2.5)
        swarm = Particles(
            Rules((1.0,), 1, 400, resampling="none", data_std=EULER, tilt=tilt), noise, generator
        )
        total = torch.zeros(400, dtype=F64)
        for number, (here, there) in enumerate(itertools.pairwise(grid)):
            level, target = level_of(here), level_of(there)
            y, variance = swarm.samples[:, 0], level.sigma**2
            score, x0 = -(y - mean) / (1 + variance), (y + variance * mean) / (1 + variance)
            beta, slope = scale / (1 + variance), 1 + curvature * x0
            reward = x0 + curvature / 2 * x0**2
            g = beta * slope / (1 + variance)
            bend = beta * curvature / (1 + variance) ** 2
            change = variance - target.sigma**2  # sig^2 dt, the loss of S^2
            # at fixed y, per loss of S^2: beta' = scale / (1 + S^2)^2, x0' = (y - m) / (1 + S^2)^2
            rate = scale / (1 + variance) ** 2 * reward + beta * slope * (y - mean) / (1 + variance) ** 2
            if number:
                total += change * (rate + g * score + (g**2 + bend) / 2)
            swarm.step([level], outputs_of([normal(mean)], swarm.samples, level), target)
            if number == 0:
                start = swarm.log_weights[0].clone()
                total += change * (rate + g * score + (g**2 + bend) / 2)
        last = level_of(3.0)
        swarm.step([last], outputs_of([normal(mean)], swarm.samples, last), level_of(3.0001))
        return (swarm.log_weights[0] - start - total).square().mean().sqrt().item(), total.std().item()

    coarse, fine = gap(100), gap(1600)
    assert fine[0] < 0.45 * coarse[0]  # sqrt(1 / 16) for the Ito term, 1 / 16 without
    assert fine[0] < 0.05 * fine[1]


def test_bad_rewards():
    level, target = level_of(-1.0), level_of(0.0)
    noise = torch.zeros(4, 2)
    for reward, what in (
        (lambda x0: x0, "4 finite numbers"),
        (lambda x0: x0[:, 0] / 0, "4 finite numbers"),
        (lambda x0: 1.0, "4 finite numbers"),
    ):
        swarm = Particles(Rules((1.0,), 1, 4, tilt=Tilt(reward)), noise)
        with pytest.raises(OptionError, match=what):
            swarm.step([level], torch.zeros(1, 4, 2), target)
    swarm = Particles(Rules((1.0,), 1, 4, tilt=Tilt(lambda x0: torch.ones(4), 1.0, True)), noise)
    with pytest.raises(OptionError, match="not differentiable"):
        swarm.step([level], torch.zeros(1, 4, 2), target)
    with pytest.raises(OptionError, match="reward_scale"):
        Tilt(lambda x0: x0, math.nan)


# ---------------------------------------------------------------- in pipelines


@pytest.mark.parametrize("gradient", [False, True])
def test_reward_telescopes(gradient):
    """The final weights of one density are those of the result, but for the ratios of the kernels."""
    reward = lambda x0: x0.flatten(1).mean(1)  # noqa: E731
    result = corrected("sd", num_particles=4, resampling="none", reward=reward, reward_scale=50.0,
                       reward_gradient=gradient)  # fmt: skip
    expected = 50.0 * reward(result.latents).double()
    if gradient:
        plain = corrected("sd", num_particles=4, resampling="none")
        assert reward(result.latents).mean() > reward(plain.latents).mean() + 0.01
        assert not torch.allclose(result.log_weights[0], expected, atol=0.1)
    else:
        assert torch.allclose(result.log_weights[0], expected, rtol=1e-4, atol=1e-4)
        assert result.report.settings["reward_scale"] == 50.0


def test_reward_selects_with_guidance():
    reward = lambda x0: x0.flatten(1).mean(1)  # noqa: E731
    options = {"guidance_scale": 1.0, "num_particles": 8, "num_images_per_prompt": 4}
    plain, tilted = (corrected("sd", reward=reward, reward_scale=s, **options) for s in (0.0, 3000.0))
    assert reward(tilted.images).mean() > reward(plain.images).mean() + 2 * reward(plain.images).std() / 2
    assert tilted.report.events and not plain.report.events


@pytest.mark.parametrize("name", ["sd", "sd3", "dit", "ddim"])
def test_reward_of_pictures(name):
    pipe, seen = fresh(name), []

    def reward(images):
        seen.append(images)
        return images.mean((1, 2, 3))

    condition = {"dit": 1, "ddim": None}.get(name, BOOT)
    result = corrected(name, condition, pipe=pipe, steps=3, num_particles=2, resampling="none",
                       reward_scale=9.0, reward=image_reward(pipe, reward), output="all",
                       output_type="pt")  # fmt: skip
    assert len(seen) == 3 and all(0 <= images.min() and images.max() <= 1 for images in seen)
    assert torch.allclose(torch.as_tensor(result.images), seen[-1], atol=1e-5)
    pictures = torch.as_tensor(result.images).double().mean((1, 2, 3))
    assert torch.allclose(result.log_weights[0], 9 * pictures, atol=1e-4)


def test_reward_of_pictures_with_a_gradient():
    pipe = fresh("sd")
    reward = image_reward(pipe, lambda images: images.mean((1, 2, 3)))
    options = {"num_particles": 2, "resampling": "none", "reward": reward, "reward_scale": 400.0}
    plain, led = (corrected("sd", pipe=pipe, reward_gradient=g, **options) for g in (False, True))
    assert reward(led.latents).mean() > reward(plain.latents).mean()


def test_reward_of_pictures_refuses_latents_that_it_does_not_know():
    with pytest.raises(UnsupportedPipeline, match="scales its latents"):
        image_reward(fresh("wan"), lambda images: images)
    packed = image_reward(fresh("flux"), lambda images: images)
    with pytest.raises(UnsupportedPipeline, match="packed"):
        packed(torch.zeros(2, 64, 16))

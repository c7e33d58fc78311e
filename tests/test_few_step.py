"""Few-step recipes against the tables of the card, written from the published nodes."""

import math

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import TINY, run
from toy_mixture import START, exact, rms, solver, x0_of

from diffaccel import zoo
from diffaccel.errors import DiffaccelError, OptionError, UnsupportedPipeline
from diffaccel.samplers import Schedule, Step
from diffaccel.samplers.few_step import RECIPES, Recipe, recipe_ratio, recipe_schedule, recipe_times

TIMES = {
    "8": "999 857.32 719.44 585.86 457.19 334.35 218.70 112.73 22.68",
    "8-plain": "999 868.46 741.13 617.35 497.59 382.48 272.93 170.38 77.58",
    "5": "999 772.51 556.68 354.19 169.97 18.32",
    "6": "999 809.57 627.31 453.54 290.38 141.71 18.32",
    "xl-8": "999 852.30 709.71 571.76 439.18 313.02 194.95 88.17 3.18",
    "xl-8-plain": "999 855.40 715.73 580.47 450.30 326.18 209.58 103.24 14.59",
    "4": "999 760.73 534.43 323.35 134.02",
    "xl-4": "999 727.79 472.70 239.37 42.53",
}
RATIOS = {
    "8": "14.6146 6.7121 3.6076 2.1723 1.4045 .9366 .6169 .3725 .1472",
    "8-plain": "14.6146 7.0961 3.9478 2.4326 1.6053 1.0993 .7568 .5025 .2926",
    "5": "14.6146 4.5188 1.9615 1.0010 .5015 .1320",
    "6": "14.6146 5.3409 2.5230 1.3877 .8052 .4374 .1320",
    "xl-8": "14.6146 6.5481 3.4672 2.0671 1.3238 .8711 .5597 .3171 .0600",
    "xl-8-plain": ".3512 .1179",
    "4": "14.6146 4.2926 1.8173 .9024 .4202",
    "xl-4": "14.6146 3.7338 1.4781 .6685 .2059",
}
PATH = solver().path


def numbers(text):
    return [float(word) for word in text.split()]


@pytest.mark.parametrize("name", TIMES)
def test_nodes(name):
    times, expected = recipe_times(RECIPES[name], PATH), numbers(RATIOS[name])
    np.testing.assert_allclose(times, numbers(TIMES[name]), rtol=0, atol=0.01)
    sigmas = recipe_schedule(RECIPES[name], PATH).sigmas
    np.testing.assert_allclose(sigmas[-len(expected) :], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "time", "ratio"), [("7", 145.42, 0.4458), ("xl-7", 130.23, 0.4117)])
def test_ends_of_seven_evaluations(name, time, ratio):
    assert recipe_times(RECIPES[name], PATH)[-1] == pytest.approx(time, abs=0.01)
    assert recipe_schedule(RECIPES[name], PATH).sigmas[-1] == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_steps(name):
    schedule, recipe = recipe_schedule(RECIPES[name], PATH), RECIPES[name]
    assert schedule.evaluations == recipe.steps == len(schedule.sigmas) - 1 and schedule.sigmas[-1] > 0
    assert [step.order for step in schedule.steps] == [1, *[recipe.order] * (recipe.steps - 1)]
    longer = recipe_schedule(recipe, PATH, final_denoise=True)
    assert longer.evaluations == recipe.steps + 1 and longer.sigmas == (*schedule.sigmas, 0.0)
    assert RECIPES["xl-5"] == RECIPES["5"] and RECIPES["xl-6"] == RECIPES["6"]


def test_other_betas_make_other_nodes():
    linear = solver(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).path
    sigmas = recipe_schedule(RECIPES["8"], linear).sigmas
    assert sigmas[0] == pytest.approx(157.4, rel=1e-3) and len(sigmas) == 9
    assert recipe_schedule(RECIPES["8"], solver("flow", "flow_prediction").path).evaluations == 8


def walk(schedule, predict, y):
    """The result of the scheduler, from y = x / alpha on; ``predict(y, ratio)`` is x0."""
    scheduler = solver(schedules=[schedule.to_dict()])
    scheduler.set_timesteps(schedule.evaluations)
    x = torch.tensor(y) * scheduler.levels[0].alpha
    for level, timestep in zip(scheduler.levels, scheduler.timesteps, strict=False):
        x0 = torch.as_tensor(predict(x.numpy() / level.alpha, level.ratio))
        x = scheduler.step((x - level.alpha * x0) / level.sigma, timestep, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("name", ["4", "5", "6"])
def test_order_1_is_ddim_and_euler(name):
    schedule, y = recipe_schedule(RECIPES[name], PATH), 14.6 * np.array([-1.0, 0.2, 1.4])
    ddim, euler = y, y
    for s, t in zip(schedule.sigmas, schedule.sigmas[1:], strict=False):
        alphas = [1 / math.hypot(1, ratio) for ratio in (s, t)]
        x, x0 = alphas[0] * ddim, x0_of(ddim, s)
        eps = (x - alphas[0] * x0) / (alphas[0] * s)
        ddim = (alphas[1] * x0 + alphas[1] * t * eps) / alphas[1]
        euler = euler + (t - s) * (euler - x0_of(euler, s)) / s
    result = walk(schedule, x0_of, y)
    np.testing.assert_allclose(result, ddim, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result, euler, rtol=0, atol=1e-12)


def test_variance_of_gaussian_data_is_that_of_the_last_node():
    """A fine solution of order 2 ends with the noise of the cut: it stops early, and rescales nothing."""
    c, high, low = 0.5, PATH.largest, 0.1472
    sigmas = tuple(np.exp(np.linspace(math.log(high), math.log(low), 513)))
    steps = tuple(Step(min(2, n + 1), scaling="bh2" if n else "none") for n in range(512))
    schedule = Schedule(sigmas, steps, unit_scale=True)
    gain = walk(schedule, lambda y, s: c**2 / (c**2 + s**2) * y, np.ones(1))
    assert float(gain[0]) ** 2 * (c**2 + high**2) == pytest.approx(c**2 + low**2, rel=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_unit_scale(name):
    """A constant image without noise comes out as it is; a VP result would be alpha times it."""
    schedule, image = recipe_schedule(RECIPES[name], PATH), np.full(3, 0.7)
    np.testing.assert_allclose(walk(schedule, lambda y, s: image, image), image, rtol=0, atol=1e-12)
    plain = Schedule(schedule.sigmas, schedule.steps)
    shrunk = 0.7 / math.hypot(1, schedule.sigmas[-1])
    np.testing.assert_allclose(walk(plain, lambda y, s: image, image), shrunk, rtol=0, atol=1e-12)


def test_limits_of_the_two_stages(monkeypatch):
    monkeypatch.setattr("diffaccel.samplers.few_step.RHO_TIME", 1.0)
    times = recipe_times(Recipe(8, 12, 7.0, 11, 2), PATH)
    np.testing.assert_allclose(np.diff(times), -999 / 8, atol=1e-9)
    assert times[-1] == pytest.approx(0, abs=1e-9)
    assert recipe_ratio(0.0, PATH) == pytest.approx(PATH.smallest)


@pytest.mark.parametrize(("cut", "stopped", "denoised"), [
    (0.0600, 0.0079, 0.0077), (0.1320, 0.0362, 0.0317), (0.1472, 0.0444, 0.0377), (0.2926, 0.1447, 0.0854),
    (0.4202, 0.2471, 0.1198),
])  # fmt: skip
def test_stopping_is_no_better_than_one_more_step(cut, stopped, denoised):
    """From the exact solution up to the cut, the distance to the clean end; the card's figures."""
    kept = exact(14.6146 / 8 * START, 14.6146, cut)
    clean = exact(kept, cut, 1e-6)
    errors = rms(kept - clean), rms(x0_of(kept, cut) - clean)
    assert errors[1] <= errors[0]
    assert errors == pytest.approx((stopped, denoised), rel=0.02)


# ---------------------------------------------------------------- as an accelerator


def test_eight_evaluations():
    case, pipe = TINY["sd"], TINY["sd"].build()
    own, plain = pipe.scheduler, run(case, pipe, 8)
    calls = []
    pipe.unet.register_forward_hook(lambda *arguments: calls.append(1))
    pipe.to(accel="few-step:8")
    fast = run(case, pipe, 8)
    assert len(calls) == 8 == pipe.accel.report.updates and pipe.scheduler is own
    assert (
        torch.isfinite(fast).all() and not torch.equal(fast, plain) and torch.equal(run(case, pipe, 8), fast)
    )
    with pytest.raises(DiffaccelError, match="no schedule for 20 evaluations; there are some for 8"):
        run(case, pipe, 20)
    assert pipe.scheduler is own
    pipe.to(accel={"few-step:5": {"final_denoise": True}})
    calls.clear()
    run(case, pipe, 6)
    assert len(calls) == 6
    assert torch.equal(run(case, pipe.to(accel=None), 8), plain)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "sana", "wan"])
def test_other_models(name):
    case, pipe = TINY[name], TINY[name].build().to(accel="few-step:8")
    assert torch.isfinite(run(case, pipe, 8)).all() and pipe.accel.report.updates == 8


def test_the_zoo():
    pipe = zoo.load("tiny-fashion-sd")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 8, "output_type": "np", "guidance_scale": 2.5}
    images = pipe.to(accel="few-step:8")(
        zoo.prompts(2), generator=torch.Generator().manual_seed(0), **call
    ).images
    assert images.shape == (2, 32, 32, 3) and 0.1 < images.std() < 0.5


def test_refusals():
    pipe = TINY["ddim"].build()
    with pytest.raises(UnsupportedPipeline, match="final_denoise"):
        pipe.to(accel="few-step:8")
    pipe.to(accel={"few-step": {"final_denoise": True}})
    assert torch.isfinite(run(TINY["ddim"], pipe, 9)).all()
    with pytest.raises(DiffaccelError, match="no preset '9'; known: 4, 5, 6, 7, 8"):
        pipe.to(accel="few-step:9")
    with pytest.raises(OptionError, match="recipe"):
        pipe.to(accel={"few-step": {"recipe": "9"}})
    other = TINY["sd"].build()
    other.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(UnsupportedPipeline, match="another path"):
        other.to(accel="few-step:8")

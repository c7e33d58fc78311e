"""The scheduler of a student's own grid: its steps against formulas, and what it refuses."""

import itertools
import math

import diffusers
import pytest
import torch
from tiny_pipelines import TINY, ddim_scheduler, fresh, run

from diffaccel.errors import OptionError, UnsupportedScheduler
from diffaccel.noise import is_stochastic, path_of, probe
from diffaccel.samplers import FixedGridScheduler

TIMES = [1.0, 0.8, 0.35]
SHAPE = (2, 3, 4, 4)


def normal(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table(prediction="epsilon", **options):
    return FixedGridScheduler.from_config(ddim_scheduler(prediction_type=prediction).config, **options)


def drive(scheduler, predict, x, steps):
    """The samples after each step, with a network that predicts ``predict(x_t, level of the path)``."""
    scheduler.set_timesteps(steps)
    path, samples = path_of(scheduler), [x]
    for place, time in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(samples[-1], path[place]), time, samples[-1]).prev_sample
        samples.append(x)
    return samples[1:]


def test_euler_on_the_straight_path():
    scheduler, x, v = FixedGridScheduler([TIMES]), normal(0), normal(1)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 800, 350])
    assert scheduler.sigmas.tolist() == pytest.approx([*TIMES, 0])
    for start, end in zip(TIMES, [*TIMES[1:], 0], strict=True):
        found = scheduler.step(v, 1000 * start, x)[0]
        assert torch.allclose(found, x + (end - start) * v, rtol=0, atol=1e-14)
        x = found
    assert scheduler.step_index == 3


@pytest.mark.parametrize("grid", [[1.0], [1.0, 0.5], TIMES, [0.9, 0.3]])
def test_a_straight_field_needs_no_steps(grid):
    """Data at one point m: every grid, and either rule, ends there (card of rectified flow, check 6)."""
    m, eps = normal(0), normal(1)
    x = (1 - grid[0]) * m + grid[0] * eps
    scheduler = FixedGridScheduler([grid])
    found = drive(scheduler, lambda x_t, level: (x_t - m) / level.sigma, x, len(grid))
    for time, sample in zip([*grid[1:], 0], found, strict=True):
        assert float((sample - (1 - time) * m - time * eps).abs().max()) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("times", [[0.9, 0.6, 0.2], [1.0, 0.6, 0.2]])
def test_ddim_on_a_table(prediction, times):
    """All predictions of one x0 give the update of DDIM; from t = 1 on eps is the sample itself."""
    x, x0 = normal(0), 0.3 * normal(1)
    scheduler = table(prediction, grids=[times])
    found = drive(scheduler, lambda x_t, level: level.output(x0, x_t), x, 3)
    expected = x
    levels = [((1 - t) / math.hypot(t, 1 - t), t / math.hypot(t, 1 - t)) for t in [*times, 0]]
    for (alpha, sigma), (after, noise) in itertools.pairwise(levels):
        expected = after * x0 + noise * (expected - alpha * x0) / sigma
        assert torch.allclose(found.pop(0), expected, rtol=0, atol=1e-5)
    first = float(scheduler.timesteps[0])
    assert first == 999 if times[0] == 1 else scheduler.path.ratio(first) == pytest.approx(9, rel=1e-5)


@pytest.mark.parametrize("flow", [True, False])
def test_fresh_noise(flow):
    """x_s = alpha_s x0 + sigma_s noise, with the noise of the generator, and none in the last step."""
    scheduler = FixedGridScheduler([TIMES], stochastic_sampling=True) if flow else table(
        grids=[TIMES], stochastic_sampling=True
    )  # fmt: skip
    x, x0 = normal(0), normal(1)
    assert "stochastic_sampling" in is_stochastic(scheduler)
    scheduler.set_timesteps(3)
    path = path_of(scheduler)
    generator, same = (torch.Generator().manual_seed(5) for _ in range(2))
    for place, time in enumerate(scheduler.timesteps):
        x = scheduler.step(path[place].output(x0, x), time, x, generator=generator)[0]
        after = path[place + 1]
        noise = torch.randn(SHAPE, generator=same, dtype=x.dtype) if after.sigma else 0 * x
        assert torch.allclose(x, after.alpha * x0 + after.sigma * noise, rtol=0, atol=1e-4)
    assert torch.equal(generator.get_state(), same.get_state())


def test_only_trained_numbers_of_steps():
    scheduler = FixedGridScheduler([[1.0], [1.0, 0.5], [1.0, 0.8, 0.6, 0.3]])
    for steps in (1, 2, 4):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
    with pytest.raises(OptionError, match="trained for 1, 2, 4 steps, not for 3"):
        scheduler.set_timesteps(3)
    with pytest.raises(OptionError, match="call set_timesteps first"):
        FixedGridScheduler([TIMES]).step(normal(0), 1000, normal(1))


def test_levels_that_a_pipeline_brings():
    scheduler = FixedGridScheduler([[1.0, 0.8, 0.6, 0.3]])
    for given in ({"sigmas": [1, 0.75, 0.5, 0.25], "mu": 0.7}, {"sigmas": [1, 0.8, 0.6, 0.3]},
                  {"timesteps": [1000, 800, 600, 300]}):  # fmt: skip
        scheduler.set_timesteps(**given)
        assert scheduler.sigmas.tolist() == pytest.approx([1, 0.8, 0.6, 0.3, 0])
    for given in ({"sigmas": [1, 0.7, 0.5, 0.25]}, {"timesteps": [1000, 750, 500, 250]}):
        with pytest.raises(OptionError, match="was trained at"):
            scheduler.set_timesteps(**given)


@pytest.mark.parametrize(
    "grids", [[], [[]], [[1.0, 1.0]], [[0.5, 0.8]], [[1.2]], [[0.5, 0.0]], [[1.0], [0.9]]]
)
def test_wrong_grids(grids):
    with pytest.raises(OptionError, match="grid"):
        FixedGridScheduler(grids)


def test_wrong_settings():
    with pytest.raises(UnsupportedScheduler, match="another path"):
        FixedGridScheduler.from_config(diffusers.EDMEulerScheduler().config, grids=[[1.0]])
    scheduler = table(grids=[TIMES])
    scheduler.set_timesteps(3)
    with pytest.raises(OptionError, match="DDIM's"):
        scheduler.step(normal(0), 999, normal(1), eta=0.5)


def test_saved_and_loaded(tmp_path):
    scheduler = table("v_prediction", grids=[[0.9], [0.9, 0.5]], stochastic_sampling=True)
    scheduler.save_pretrained(tmp_path)
    loaded = FixedGridScheduler.from_pretrained(tmp_path)
    assert loaded.grids == {1: (0.9,), 2: (0.9, 0.5)} and loaded.config.beta_schedule == "scaled_linear"
    assert loaded.config.stochastic_sampling and loaded.config.prediction_type == "v_prediction"
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "EulerDiscrete", "DPMSolverMultistep", "PNDM"])
def test_configurations_of_others(name):
    other = getattr(diffusers, f"{name}Scheduler")()
    scheduler = FixedGridScheduler.from_config(other.config, grids=[TIMES])
    assert scheduler.path.is_flow == name.startswith("Flow")
    path = probe(scheduler)
    assert len(path) == 3 and path.kind == ("flow" if scheduler.path.is_flow else "vp")
    ratios = [level.sigma / (level.alpha + level.sigma) for level in path.levels[1:]]
    assert ratios == pytest.approx([*TIMES[1:], 0], abs=1e-6)


def test_half_precision_is_rounded_once():
    """The step is made in float32: against it in float64, half a unit of float16 at most."""
    x, v, scheduler = normal(0, torch.float16), normal(1, torch.float16), FixedGridScheduler([TIMES])
    scheduler.set_timesteps(3)
    found = scheduler.step(v, 1000, x)[0]
    assert found.dtype == torch.float16
    exact = x.double() - 0.2 * v.double()
    assert bool(((found.double() - exact).abs() <= 2**-11 * exact.abs() + 1e-6).all())


def test_noise_is_added_at_trained_times():
    """What image-to-image starts from: alpha x0 + sigma eps at a level of the grid, and the place in it."""
    for scheduler in (FixedGridScheduler([TIMES]), table(grids=[TIMES])):
        scheduler.set_timesteps(3)
        scheduler.set_begin_index(1)
        level, x0, eps = path_of(scheduler)[1], normal(0), normal(1)
        x = scheduler.add_noise(x0, eps, scheduler.timesteps[1:2])
        assert torch.allclose(x, level.alpha * x0 + level.sigma * eps, rtol=0, atol=1e-5)
        assert torch.equal(x, scheduler.scale_noise(x0, scheduler.timesteps[1:2], eps))
        x = scheduler.step(level.output(x0, x), scheduler.timesteps[1], x)[0]
        after = path_of(scheduler)[2]
        assert torch.allclose(x, after.alpha * x0 + after.sigma * eps, rtol=0, atol=1e-4)


def test_image_to_image():
    pipe = fresh("sd_img2img")
    pipe.scheduler = FixedGridScheduler.from_config(pipe.scheduler.config, grids=[[0.93, 0.8, 0.6, 0.4]])
    assert torch.isfinite(run(TINY["sd_img2img"], pipe, 4)).all()
    assert pipe.scheduler.step_index == 4 and pipe.scheduler.begin_index == 1

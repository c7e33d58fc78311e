"""The scheduler in pipelines: saved and loaded, from an image, with an analytic first step."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pipelines import TINY, fresh, run
from toy_mixture import START, solver

from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.samplers import Schedule, ScheduleError, Step, UnifiedSolverScheduler, solver_schedule
from diffaccel.samplers.family import family_of, scales_input

VP = (14.0, 5.0, 2.0, 1.0, 0.4, 0.1, 0.0)


def test_a_fresh_process_loads_the_pipeline(tmp_path):
    pipe = TINY["sd"].build()  # DDIMPipeline would turn the scheduler into DDIM
    pipe.scheduler = solver(schedules=[solver_schedule("unipc2", VP).to_dict()])
    pipe.save_pretrained(tmp_path)
    call = {**TINY["sd"].call, "num_inference_steps": 6, "output_type": "np"}
    expected = pipe(generator=torch.Generator().manual_seed(0), **call).images
    code = (  # diffusers loads only from modules that are imported
        "import sys, torch, diffaccel; from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        f"images = pipe(generator=torch.Generator().manual_seed(0), **{call}).images\n"
        "print(type(pipe.scheduler).__name__, float((images ** 2).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    name, total = done.stdout.split()
    assert name == "UnifiedSolverScheduler" and float(total) == pytest.approx(
        float((expected**2).sum()), rel=1e-5
    )


@pytest.mark.parametrize("name", ["sd_img2img", "sd_inpaint_blend", "sd_v_prediction", "sdxl", "dit", "ddim",
                                  "flux", "sana", "wan"])  # fmt: skip
def test_tiny_pipelines(name):
    case = TINY[name]
    pipe = case.build()
    plain = run(case, pipe, 8)
    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, solver="unipc2")
    flow = name in ("flux", "sana", "wan")
    assert pipe.scheduler.path.is_flow == flow
    first, second = run(case, pipe, 8), run(case, pipe, 8)
    assert first.shape == plain.shape and torch.equal(first, second) and torch.isfinite(first).all()
    if name != "ddim":  # random weights, and the first node is ten times noisier
        assert float((first - plain).double().std() / plain.double().std()) < 0.8, "another model's samples"
    assert pipe.scheduler.step_index == 8
    if name == "sd_img2img":
        assert pipe.scheduler.begin_index == 2


class Counter:
    """Counts the evaluations of a pipeline's denoiser."""

    def __init__(self, pipe):
        self.calls = 0
        pipe.unet.register_forward_hook(self.hook)

    def hook(self, *arguments):
        self.calls += 1


@pytest.mark.parametrize("kind", ["noise", "mean"])
def test_an_analytic_first_step_saves_an_evaluation(kind):
    case, pipe = TINY["sd"], TINY["sd"].build()
    schedule = Schedule(VP, (Step(), *[Step(2)] * 4, Step()), kind)
    pipe.scheduler = solver(schedules=[schedule.to_dict()])
    counter = Counter(pipe)
    result = run(case, pipe, 5)
    assert counter.calls == 5 == len(pipe.scheduler.timesteps) and len(schedule.steps) == 6
    assert torch.isfinite(result).all() and torch.equal(run(case, pipe, 5), result)
    with pytest.raises(ScheduleError, match="there are some for 5"):
        run(case, pipe, 6)


def test_an_analytic_first_step_is_that_of_its_assumption():
    """For a model whose first x0 is 0 it is exact; a loop that does not scale the input is told."""
    schedule = Schedule(VP, (Step(), *[Step(2)] * 4, Step()), "mean")
    scheduler = solver(schedules=[schedule.to_dict(), Schedule(VP, schedule.steps).to_dict()])
    results = []
    for count in (5, 6):
        scheduler.set_timesteps(count)
        x = torch.tensor(START)
        for number, timestep in enumerate(scheduler.timesteps):
            level = scheduler.levels[number + 6 - count]
            y = scheduler.scale_model_input(x, timestep)
            x0 = 0 * y if level.ratio == VP[0] else torch.tanh(y)
            x = scheduler.step((y - level.alpha * x0) / level.sigma, timestep, x).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)
    scheduler.set_timesteps(5)
    with pytest.raises(OptionError, match="scale_model_input"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("analytic", ["none", "noise", "mean"])
def test_pipelines_without_scaled_inputs_have_no_analytic_first_step(analytic, tmp_path):
    """Told when it is attached; the pipelines of Stable Diffusion call scale_model_input."""
    steps = (Step(),) * (4 if analytic == "none" else 5)
    for name, scales in (("sd", True), ("sdxl", True), ("dit", True), ("flux", False), ("sd3", False)):
        pipe = fresh(name)
        assert scales_input(pipe) == scales
        sigmas = (9.0, 5.0, 2.0, 1.0, 0.3)[: len(steps)]
        schedule = Schedule((*sigmas, 0.0), steps, analytic, facts={"family": family_of(pipe)})
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(schedule.to_dict()))
        if scales or analytic == "none":
            assert torch.isfinite(run(TINY[name], pipe.to(accel=f"s3:{file}"), 4)).all()
        else:
            with pytest.raises(UnsupportedPipeline, match="does not call scale_model_input"):
                pipe.to(accel=f"s3:{file}")


def test_a_run_that_begins_late_leaves_corrections_out():
    """They were fitted to whole runs."""
    plain = Schedule(VP, (Step(), *[Step(2)] * 4, Step()))
    steps = [replace(step, corrections=(0.05, -0.02)) for step in plain.steps]
    results = []
    for schedule in (plain, replace(plain, steps=tuple(steps))):
        scheduler, ends = solver(schedules=[schedule.to_dict()]), []
        for begin in (0, 2):
            scheduler.set_timesteps(6)
            scheduler.set_begin_index(begin)
            x = torch.tensor(START)
            for timestep in scheduler.timesteps[begin:]:
                x = scheduler.step(torch.tanh(x), timestep, x).prev_sample
            ends.append(x)
        results.append(ends)
    assert torch.equal(results[0][1], results[1][1]) and not torch.equal(results[0][0], results[1][0])


def test_analytic_first_step_from_an_image():
    """With all of the steps, the image is noised for the node that the analytic step leaves."""
    scheduler = solver(schedules=[Schedule(VP, (Step(),) * 6, "mean").to_dict()])
    scheduler.set_timesteps(5)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for place in (0, 1, 2):
        level = scheduler.levels[place + (place > 0)]
        time = scheduler.timesteps[place : place + 1]
        assert float(scheduler.add_noise(one, zero, time)) == pytest.approx(level.alpha, rel=1e-5)
        assert float(scheduler.add_noise(zero, one, time)) == pytest.approx(level.sigma, rel=1e-5)


def test_random_decisions_evaluate_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(2, 9))
        orders = [int(rng.integers(1, min(n + 1, 4) + 1)) for n in range(count)]
        correct = [*(bool(rng.random() < 0.5) for _ in orders[1:]), False]
        steps = [Step(n, "theta", corrector=flag) for n, flag in zip(orders, correct, strict=True)]
        kind = str(rng.choice(["none", "noise", "mean"]))
        steps[0] = Step() if kind != "none" else steps[0]
        sigmas = np.sort(np.exp(rng.uniform(-3, 2.6, count)))[::-1]
        schedule = Schedule((*sigmas, 0.0), tuple(steps), kind)
        scheduler = solver(schedules=[schedule.to_dict()])
        scheduler.set_timesteps(schedule.evaluations)
        x = torch.tensor(START)
        calls = 0
        for timestep in scheduler.timesteps:
            y, calls = scheduler.scale_model_input(x, timestep), calls + 1
            x = scheduler.step(torch.tanh(y), timestep, x).prev_sample
        assert calls == schedule.evaluations == count - (kind != "none") and torch.isfinite(x).all()

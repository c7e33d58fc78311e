"""Schedules that begin late: against diffusers' own way to begin in mid-schedule, for all kinds of them."""

import copy
import inspect

import diffusers
import pytest
import torch
from tiny_pipelines import ddim_scheduler, normal, vp

from diffaccel import UnifiedSolverScheduler
from diffaccel.errors import OptionError, UnsupportedScheduler
from diffaccel.noise import path_of
from diffaccel.pipelines.late_start import begin_from, late_start, num_steps, prepared

STEPS, LATE = 12, 5
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

SCHEDULERS = {
    "ddim": ddim_scheduler,
    "euler": lambda: vp(diffusers.EulerDiscreteScheduler, use_karras_sigmas=True),
    "heun": lambda: vp(diffusers.HeunDiscreteScheduler),
    "kdpm2": lambda: vp(diffusers.KDPM2DiscreteScheduler),
    "dpm++": lambda: vp(diffusers.DPMSolverMultistepScheduler),
    "singlestep": lambda: vp(diffusers.DPMSolverSinglestepScheduler, solver_order=2),
    "deis": lambda: vp(diffusers.DEISMultistepScheduler),
    "unipc": lambda: vp(diffusers.UniPCMultistepScheduler),
    "flow dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "edm euler": lambda: diffusers.EDMEulerScheduler(),
    "edm dpm++": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "unified": lambda: UnifiedSolverScheduler.from_config(ddim_scheduler().config, solver="dpm++2m"),
    "flow unified": lambda: UnifiedSolverScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, solver="unipc2"
    ),
}


def network(sample, timestep):
    """Something like a prediction that depends on the sample and the time."""
    return torch.tanh(sample) * (0.5 + float(timestep) / 2000) + 0.1


def solved(scheduler, times, x):
    for time in times:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, time), time, x).prev_sample
    return x


def ready(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_tail_is_solved_as_from_mid_schedule(name):
    scheduler = ready(name)
    assert num_steps(scheduler) == STEPS
    late = late_start(prepared(scheduler), LATE)
    begin = getattr(scheduler, "order", 1) * (STEPS - LATE)
    whole, tail = path_of(scheduler), path_of(late)
    for level, expected in zip(tail.levels, whole.levels[begin:], strict=True):
        assert level == pytest.approx(expected, rel=1e-5)
    assert torch.equal(late.timesteps, scheduler.timesteps[begin:])
    x = normal(1, 2, 4, 4) * max(tail[0].sigma, 0.1)
    scheduler.set_begin_index(begin) if hasattr(scheduler, "set_begin_index") else None
    expected = solved(scheduler, scheduler.timesteps[begin:], x)
    for _ in range(2):  # set_timesteps brings it back
        late.set_timesteps(3, device="cpu")
        assert torch.allclose(solved(late, late.timesteps, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_steps_are_the_schedule(name):
    scheduler = ready(name)
    late = late_start(scheduler, STEPS)
    assert path_of(late) == path_of(scheduler)
    assert type(late).__name__ == type(scheduler).__name__
    assert isinstance(late, type(scheduler))
    assert float(late.init_noise_sigma) == 1
    assert inspect.signature(late.set_timesteps) == inspect.signature(scheduler.set_timesteps)
    assert dict(late.config) == dict(scheduler.config)


@pytest.mark.parametrize("steps", [1, 2, LATE, STEPS])
@pytest.mark.parametrize("name", ["pndm", "lms"])
def test_those_that_diffusers_does_not_begin_late_correctly(name, steps):
    """Diffusers' image-to-image gives PNDM no double step, and LMS the coefficients of a long history."""
    scheduler = {
        "pndm": lambda: vp(diffusers.PNDMScheduler, skip_prk_steps=True),
        "lms": lambda: vp(diffusers.LMSDiscreteScheduler),
    }[name]()
    scheduler.set_timesteps(STEPS)
    late = late_start(scheduler, steps)
    path, eps, x0 = path_of(late), normal(1, 2, 4, 4), normal(1, 2, 4, 4, seed=2)
    x = path[0].alpha * x0 + path[0].sigma * eps
    for time in late.timesteps:  # exact for a constant prediction, if the levels follow each other
        x = late.step(eps, time, x).prev_sample
    assert torch.allclose(x, path[len(path)].alpha * x0 + path[len(path)].sigma * eps, atol=1e-4)
    assert num_steps(late) == steps


def test_a_late_schedule_begins_from_given_latents():
    late = late_start(ready("ddim"), LATE)
    begin_from(late, normal(2, 4, 4, 4))
    for _ in range(2):
        late.set_timesteps(LATE)
        first = late.scale_model_input(torch.zeros(4, 4, 2, 2), late.timesteps[0])
        assert torch.equal(first, normal(2, 4, 4, 4).repeat(2, 1, 1, 1))
        assert torch.equal(late.scale_model_input(first + 1, late.timesteps[1]), first + 1)


def test_the_scheduler_itself_stays():
    scheduler = ready("dpm++")
    before = copy.deepcopy(scheduler.__dict__)
    late = late_start(scheduler, LATE)
    late.set_timesteps(LATE)
    solved(late, late.timesteps, normal(1, 2, 4, 4))
    assert set(before) == set(scheduler.__dict__)
    assert torch.equal(before["timesteps"], scheduler.timesteps)
    assert scheduler.step_index is None


def test_refusals():
    with pytest.raises(OptionError, match="13 of the last steps of a schedule that has 12"):
        late_start(ready("ddim"), 13)
    runge = vp(diffusers.PNDMScheduler)
    runge.set_timesteps(STEPS)
    with pytest.raises(UnsupportedScheduler, match="skip_prk_steps"):
        late_start(runge, LATE)
    ipndm = diffusers.IPNDMScheduler()
    ipndm.set_timesteps(STEPS)
    with pytest.raises(UnsupportedScheduler, match="IPNDMScheduler cannot begin late"):
        late_start(ipndm, LATE)

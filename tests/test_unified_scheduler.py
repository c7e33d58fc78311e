"""The scheduler against diffusers' own, and what diffusers asks of every scheduler."""

import copy
import itertools
import json
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch
from toy_mixture import START, output_of, solver

from diffaccel.errors import DiffaccelError, OptionError, UnsupportedScheduler
from diffaccel.samplers import (
    GRIDS,
    SOLVERS,
    Schedule,
    ScheduleError,
    Step,
    UnifiedSolverScheduler,
    solver_schedule,
)
from diffaccel.samplers.family import solver_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = (14.0, 5.0, 2.0, 1.0, 0.4, 0.1, 0.0)


def states(scheduler, levels, count):
    """The samples after each step."""
    x, found = torch.tensor(START * levels[0].alpha)[:, None], []
    for number, timestep in enumerate(scheduler.timesteps[:count]):
        output = output_of(x.double().numpy() / levels[number].alpha, levels[number])
        x = scheduler.step(torch.tensor(output), timestep, x).prev_sample.double()
        found.append(x.numpy())
    return found


# ---------------------------------------------------------------- diffusers' own

DPM, UNIPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
DEIS, OWN = diffusers.DEISMultistepScheduler, {"use_karras_sigmas": True, **SD}
PEERS = [
    ("dpm++1", DPM, {"solver_order": 1}, 10),
    ("dpm++2m", DPM, {"solver_order": 2}, 10),
    ("dpm++2m-heun", DPM, {"solver_order": 2, "solver_type": "heun"}, 10),
    ("dpm++3m-damped", DPM, {"solver_order": 3, "lower_order_final": False}, 9),
    ("unipc1", UNIPC, {"solver_order": 1}, 10),
    ("unipc2", UNIPC, {"solver_order": 2}, 10),
    ("unipc3", UNIPC, {"solver_order": 3}, 8),  # diffusers ends with orders 2 and 1
    ("unipc3", UNIPC, {"solver_order": 3, "solver_type": "bh1"}, 0),
    ("deis2", DEIS, {"solver_order": 2}, 8),  # diffusers ends at the last node, and repeats it
    ("deis3", DEIS, {"solver_order": 3}, 7),
]


@pytest.mark.parametrize(("name", "cls", "options", "same"), PEERS)
def test_equals_diffusers(name, cls, options, same):
    peer = cls(**OWN, **options)
    peer.set_timesteps(10)
    nodes = [float(sigma) for sigma in peer.sigmas]
    if nodes[-1] == nodes[-2]:
        nodes = nodes[:-1]
    ours = solver(solver=name)
    ours.set_timesteps(sigmas=nodes)
    pairs = list(zip(states(ours, ours.levels, same), states(peer, ours.levels, same), strict=True))
    assert len(pairs) == same
    for mine, other in pairs:
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("dpm++2m", "midpoint"), ("dpm++2m-heun", "heun")])
def test_equals_diffusers_with_noise(name, kind):
    """The same noise in both: 2M of DPM-Solver++ for the reverse SDE."""
    peer = DPM(**OWN, solver_order=2, solver_type=kind, algorithm_type="sde-dpmsolver++")
    peer.set_timesteps(10)
    ours = solver(solver=name, zeta=1.0)
    ours.set_timesteps(sigmas=peer.sigmas.tolist())
    found = []
    for scheduler in (ours, peer):
        generator = torch.Generator().manual_seed(0)
        x = torch.tensor(START * ours.levels[0].alpha)[:, None].float()
        for level, timestep in zip(ours.levels, scheduler.timesteps, strict=False):
            output = torch.tensor(output_of(x.double().numpy() / level.alpha, level)).float()
            x = scheduler.step(output, timestep, x, generator=generator).prev_sample
        found.append(x)
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def test_equals_ddim():
    peer = diffusers.DDIMScheduler(**SD, clip_sample=False)
    peer.set_timesteps(10)
    ours = solver(solver="ddim")
    ours.set_timesteps(timesteps=peer.timesteps)
    assert ours.timesteps.tolist() == pytest.approx(peer.timesteps.tolist(), abs=1e-3)
    for mine, other in zip(states(ours, ours.levels, 10), states(peer, ours.levels, 10), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_euler_of_flow_matching(shift):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(8)
    ours = UnifiedSolverScheduler.from_config(peer.config, solver="dpm++1")
    ours.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    x = y = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    own.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    for s, t in zip(ours.timesteps, own.timesteps, strict=True):
        assert float(s) == pytest.approx(float(t), abs=2e-3)
        x = ours.step(torch.sin(x), s, x).prev_sample
        y = own.step(torch.sin(y), t, y).prev_sample.double()
    torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- configurations

FOREIGN = [
    diffusers.DDIMScheduler(**SD, prediction_type="v_prediction", clip_sample=False),
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    DPM(**SD, use_karras_sigmas=True),
    diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
    diffusers.LCMScheduler(),  # its default betas are those of SD
    UNIPC(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0),
    diffusers.DDIMScheduler(num_train_timesteps=5, trained_betas=[0.1, 0.2, 0.3, 0.4, 0.5]),
]


@pytest.mark.parametrize("other", FOREIGN, ids=lambda other: type(other).__name__)
@pytest.mark.parametrize("saved", [False, True])
def test_from_other_schedulers_and_back(other, saved, tmp_path):
    config = other.config
    if saved:
        other.save_pretrained(tmp_path)
        config = UnifiedSolverScheduler.load_config(tmp_path)
    ours = UnifiedSolverScheduler.from_config(config, solver="unipc2")
    flow = "Flow" in type(other).__name__ or getattr(other.config, "use_flow_sigmas", False)
    assert ours.path.is_flow == flow
    if not flow:
        torch.testing.assert_close(ours.alphas_cumprod, other.alphas_cumprod, atol=1e-6, rtol=1e-3)
        assert ours.config.prediction_type == other.config.prediction_type
    else:
        shift = other.config.get("shift", other.config.get("flow_shift"))
        ours.set_timesteps(2)
        assert ours.schedule.sigmas[1] == pytest.approx(shift)
    back = type(other).from_config(ours.config)
    for key in set(other.config) - {"_use_default_values"}:
        assert back.config[key] == other.config[key], key


def test_foreign_paths_are_refused():
    for other in (diffusers.EDMEulerScheduler(), diffusers.EDMDPMSolverMultistepScheduler(),
                  diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)):  # fmt: skip
        with pytest.raises(UnsupportedScheduler, match="another path"):
            UnifiedSolverScheduler.from_config(other.config)
    with pytest.raises(UnsupportedScheduler):
        solver_of(diffusers.IPNDMScheduler())
    with pytest.raises(UnsupportedScheduler, match="alphas"):
        solver_of(diffusers.CogVideoXDDIMScheduler())  # scales the ratios of its table


def with_schedules(**facts):
    schedule = solver_schedule("unipc2", VP)
    return solver(schedules=[{**schedule.to_dict(), "facts": facts}], trained_betas=None)


@pytest.mark.parametrize("scheduler", [solver(), solver("flow", "flow_prediction", shift=3.0, grid="theta"),
                                       with_schedules(a=1)])  # fmt: skip
def test_save_and_load(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = UnifiedSolverScheduler.from_pretrained(tmp_path)
    assert {**loaded.config, "_use_default_values": 0} == {**scheduler.config, "_use_default_values": 0}
    for one in (scheduler, loaded):
        one.set_timesteps(6)
    assert loaded.schedule == scheduler.schedule and loaded.schedule.facts == scheduler.schedule.facts
    assert torch.equal(loaded.timesteps, scheduler.timesteps)
    assert json.loads(scheduler.to_json_string())["_class_name"] == "UnifiedSolverScheduler"


# ---------------------------------------------------------------- what diffusers' tests ask for


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dpm++2m", "unipc3", "theta3"])
def test_shape_and_type_are_kept(name, dtype):
    scheduler = solver(solver=name)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for timestep in scheduler.timesteps:
        x = scheduler.step(0.1 * x, timestep, scheduler.scale_model_input(x, timestep)).prev_sample
        assert x.dtype == dtype and x.shape == (2, 3, 4, 4)
    assert torch.isfinite(x).all()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(part.dtype == wide for node in scheduler._nodes for part in (node.x0, node.eps, node.sample))
    result = solver()
    result.set_timesteps(3)
    assert torch.equal(result.step(x, result.timesteps[0], x, return_dict=False)[0].isfinite(), x == x)


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_add_noise(kind):
    scheduler = solver(kind)
    x, noise = torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0)
    result = scheduler.add_noise(x, noise, torch.tensor([1, 500, 999]))
    if kind == "vp":
        expected = diffusers.DDIMScheduler(**SD).add_noise(x, noise, torch.tensor([1, 500, 999]))
    else:
        expected = torch.tensor([1.001, 1.5, 1.999]).reshape(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert scheduler.add_noise(x.half(), noise.half(), torch.tensor([5])).dtype == torch.float16
    assert torch.equal(scheduler.scale_noise(x, torch.tensor([1, 500, 999]), noise), result)
    assert len(scheduler) == 1000


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("grid", GRIDS)
def test_numbers_of_steps(grid, kind):
    for name in ("dpm++2m", "unipc3", "theta3"):
        scheduler = solver(kind, solver=name, grid=grid)
        for count in (*range(1, 12), 25, 50, 999, 1000):
            scheduler.set_timesteps(count)
            times = scheduler.timesteps.tolist()
            assert len(times) == count == scheduler.num_inference_steps and scheduler.order == 1
            assert all(a > b for a, b in itertools.pairwise(times)), (name, count)
            assert 0 <= min(times) and max(times) <= 1000 and scheduler.timesteps.dtype == torch.float32
            assert len(scheduler.sigmas) == count + 1 and scheduler.sigmas[-1] == 0
    with pytest.raises(OptionError, match="at least 1"):
        scheduler.set_timesteps(0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_can_be_repeated(name):
    scheduler = solver(solver=name)

    def once():
        scheduler.set_timesteps(7)
        return states(scheduler, scheduler.levels, 7)[-1]

    first = once()
    scheduler.set_timesteps(4)
    states(scheduler, scheduler.levels, 2)  # left in the middle
    assert np.array_equal(once(), first) and np.isfinite(first).all()


def test_copies_are_independent():
    scheduler = solver(solver="unipc2")
    scheduler.set_timesteps(6)
    x = torch.ones(2, 3)
    for timestep in scheduler.timesteps[:3]:
        x = scheduler.step(x.sin(), timestep, x).prev_sample
    copies = copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))
    results = []
    for one in (*copies, scheduler):
        y = x
        for timestep in scheduler.timesteps[3:]:
            y = one.step(y.sin(), timestep, y).prev_sample
        results.append(y)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])


def test_custom_timesteps_and_sigmas():
    scheduler = solver()
    scheduler.set_timesteps(timesteps=[900.5, 500, 20])
    assert scheduler.timesteps.tolist() == pytest.approx([900.5, 500, 20], abs=1e-3)
    scheduler.set_timesteps(sigmas=[14, 3, 0.5, 0])
    assert scheduler.schedule.sigmas == (14, 3, 0.5, 0) and scheduler.num_inference_steps == 3
    again = copy.deepcopy(scheduler)
    again.set_timesteps(sigmas=scheduler.sigmas)
    assert again.schedule == scheduler.schedule
    for bad in (
        {"timesteps": [1, 5]},
        {"sigmas": [3, 3]},
        {"sigmas": [3, -1]},
        {"sigmas": [80, 3]},
        {"sigmas": []},
    ):
        with pytest.raises(ScheduleError):
            scheduler.set_timesteps(**bad)
    for bad in ({}, {"timesteps": [5], "sigmas": [3]}):
        with pytest.raises(OptionError, match="give"):
            scheduler.set_timesteps(**bad)
    flow = solver("flow", "flow_prediction")
    flow.set_timesteps(sigmas=[1.0, 0.9, 0.3])
    assert flow.timesteps.tolist() == pytest.approx([1000, 900, 300], abs=1e-2)
    assert flow.sigmas.tolist() == pytest.approx([1, 0.9, 0.3, 0], abs=2e-6)


@pytest.mark.parametrize(("kind", "factor"), [("exponential", math.exp(0.8)), ("linear", 0.8)])
def test_dynamic_shift(kind, factor):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    ours = UnifiedSolverScheduler.from_config(peer.config)
    for one in (peer, ours):
        one.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=0.8)
    torch.testing.assert_close(ours.timesteps, peer.timesteps, atol=5e-3, rtol=0)
    assert ours.schedule.sigmas[2] == pytest.approx(factor)
    with pytest.raises(OptionError, match="mu"):
        ours.set_timesteps(4)


# ---------------------------------------------------------------- bad input

GOOD = Schedule((8, 2, 1, 0), (Step(), Step(2, "epsilon"), Step())).to_dict()
BAD = [
    ({"sigmas": [8, 2, 2, 0]}, "falling"),
    ({"sigmas": [8, 2, 3, 0]}, "falling"),
    ({"sigmas": [8, 2, 1, -1]}, "at least 0"),
    ({"sigmas": [8, 2, float("nan"), 0]}, "falling"),
    ({"sigmas": ["a", 2, 1, 0]}, "numbers"),
    ({"sigmas": [8, 2, 0]}, "one node more"),
    ({"sigmas": [80, 2, 1, 0]}, "another family"),
    ({"sigmas": [8, 2, 0.02, 0]}, "knows down to 0.02917"),
    ({"steps": [{"corrector": True}, {}, {}], "analytic_first": "mean"}, "analytic first step"),
    ({"facts": {"family": {"path": "flow"}}}, "another family"),
    ({"version": 2}, "version 2"),
    ({"version": None}, "version None"),
    ({"steps": [{"order": 2}, {}, {}]}, "only 1 nodes"),
    ({"steps": [{}, {"order": 5}, {}]}, "expected 1 to 4"),
    ({"steps": [{}, {"order": 1.5}, {}]}, "expected 1 to 4"),
    ({"steps": [{}, {"start": 2}, {}]}, "not known"),
    ({"steps": [{}, {"points": [2]}, {}]}, "not known"),
    ({"steps": [{}, {"order": 2, "points": [0]}, {}]}, "too few"),
    ({"steps": [{}, {"estimate": 3, "order": 2}, {}]}, "not known"),
    ({"steps": [{}, {"prediction": "eps"}, {}]}, "no prediction 'eps'"),
    ({"steps": [{}, {"scaling": "bh3"}, {}]}, "no scaling 'bh3'"),
    ({"steps": [{}, {"oder": 2}, {}]}, "'oder'"),
    ({"steps": [{}, {"corrector": "yes"}, {}]}, "corrector"),
    ({"steps": [{}, {"relaxation": float("inf")}, {}]}, "relaxation"),
    ({"steps": [{}, {}, {"order": 2}]}, "ends at 0"),
    ({"steps": [{}, {}, {"corrector": True}]}, "last step"),
    ({"steps": [{}, {"corrector": True, "corrections": [0.1, 0.2]}, {}]}, "undo"),
    ({"steps": [{}, {"corrections": [0.1]}, {}]}, "pairs"),
    ({"steps": [{"corrections": [0.1, 0.2, 0.3, 0.4]}, {}, {}]}, "not known"),
    ({"steps": 3}, "no schedule"),
    ({"analytic_first": "zero"}, "no analytic_first"),
    ({"std": 0}, "std"),
    ({"unit_scale": "no"}, "unit_scale"),
    ({"nodes": 1}, "'nodes'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_impossible_schedules_are_refused_at_load(change, message, tmp_path):
    solver(schedules=[GOOD])
    with pytest.raises(ScheduleError, match=message):
        solver(schedules=[{**GOOD, **change}])
    config = {**json.loads(solver(schedules=[GOOD]).to_json_string()), "schedules": [{**GOOD, **change}]}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ScheduleError, match=message):
        UnifiedSolverScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(("options", "message"), [
    ({"solver": "dpm++2"}, "did you mean 'dpm\\+\\+2m'"), ({"grid": "karas"}, "no grid 'karas'"),
    ({"prediction_type": "x0"}, "x0"), ({"zeta": -1.0}, "zeta"), ({"zeta": math.inf}, "zeta"),
    ({"zeta": 1.0, "solver": "deis2"}, "deis2"), ({"zeta": 1.0, "solver": "theta2"}, "theta2"),
    ({"beta_schedule": "cosine"}, "cosine"), ({"trained_betas": [0.1, 0.2]}, "2 betas"),
    ({"zeta": 1.0, "schedules": [{**GOOD, "steps": [{}, {"prediction": "theta"}, {}]}]}, "theta|sample"),
    ({"zeta": 1.0, "schedules": [{**GOOD, "steps": [{}] * 3, "analytic_first": "mean"}]}, "evaluation"),
])  # fmt: skip
def test_unknown_options(options, message):
    with pytest.raises(DiffaccelError, match=message):
        UnifiedSolverScheduler(**{**SD, **options})


def test_dynamic_thresholding_is_refused():
    with pytest.raises(UnsupportedScheduler, match="thresholding"):
        solver_of(DPM(thresholding=True))
    with pytest.raises(UnsupportedScheduler, match="thresholding"):
        UnifiedSolverScheduler.from_config(DPM(thresholding=True).config)


def test_one_schedule_for_each_number_of_evaluations():
    with pytest.raises(ScheduleError, match="one for each number"):
        solver(schedules=[GOOD, GOOD])
    scheduler = solver("flow", "flow_prediction", schedules=[GOOD])
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2, 0.0])
    assert len(scheduler.timesteps) == 3, "a last 0 is no evaluation"


def test_calls_in_the_wrong_order():
    scheduler = solver()
    for call in (lambda: scheduler.step(torch.ones(1), 1, torch.ones(1)),
                 lambda: scheduler.scale_model_input(torch.ones(1), 1)):  # fmt: skip
        with pytest.raises(OptionError, match="set_timesteps first"):
            call()
    scheduler = with_schedules()
    with pytest.raises(ScheduleError, match="no schedule for 9 evaluations; there are some for 6"):
        scheduler.set_timesteps(9)

"""SADA with every deterministic solver, and in pipelines that start late or change the sample."""

import inspect
import math

import diffusers
import pytest
import torch
from sada_toys import NO_CLIP, VP, Foreign, Loop, counted, noise, rms, skips, toy
from tiny_pipelines import TINY, run

from diffaccel import Accelerator, UnsupportedPipeline, accelerate
from diffaccel.noise import is_stochastic
from diffaccel.toy import toy_t

FLOWS = {"FlowMatchEulerDiscrete": {}, "FlowMatchHeunDiscrete": {}, "FlowMapEulerDiscrete": {},
         "LTXEulerAncestralRF": {"eta": 0.0}}  # fmt: skip
SOLVERS = {
    "DDIM": NO_CLIP, "DDIMParallel": NO_CLIP, "CogVideoXDDIM": {**NO_CLIP, "timestep_spacing": "trailing"},
    "PNDM": VP, "PNDM without Runge-Kutta": {**VP, "skip_prk_steps": True},
    "EulerDiscrete": VP, "HeunDiscrete": VP, "KDPM2Discrete": VP, "LMSDiscrete": VP,
    "DPMSolverMultistep": {**VP, "solver_order": 3}, "DPMSolverSinglestep": {**VP, "lower_order_final": True},
    "UniPCMultistep": VP, "DEISMultistep": VP, "EDMEuler": {}, "EDMDPMSolverMultistep": {}, "IPNDM": {},
    "MiniMaxH3": {}, "DDIMInverse": NO_CLIP, "DPMSolverMultistepInverse": VP, **FLOWS,
}  # fmt: skip
WRAPPED = {"EDMEuler": "edm", "EDMDPMSolverMultistep": "edm", "IPNDM": "angle", "MiniMaxH3": "rising flow"}


def solved(name):
    """Returns the pipeline of a solver and where it starts."""
    scheduler = getattr(diffusers, f"{name.split()[0]}Scheduler")(**SOLVERS[name])
    if name in WRAPPED:
        model = Foreign(WRAPPED[name])
    else:
        model = toy_t(prediction_type="flow_prediction", path="flow") if name in FLOWS else toy_t()
    start = toy_t().draw(32, generator=torch.Generator().manual_seed(0)) if "Inverse" in name else noise(32)
    return Loop(model, scheduler), start


def test_every_deterministic_solver_is_here():
    """Those of `test_noise.CASES`, which is complete."""
    from test_noise import CASES

    assert {case.name for case in CASES} == {name.split()[0] for name in SOLVERS}
    assert not any(is_stochastic(solved(name)[0].scheduler) for name in SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver(name):
    """Fewer evaluations than the reuse of every second output, at half its error or less."""
    pipe, x = solved(name)
    before = pipe(x)
    after = pipe.to(accel="sada")(x)
    report = pipe.accel.report
    calls, requested = report.evaluated, report.requested
    assert report.skipped > 0.15 * requested
    reuse = rms(pipe.to(accel="reuse")(x), before)
    assert calls < pipe.accel.report.evaluated + 5 and rms(after, before) < 0.5 * reuse
    few = pipe.to(accel=None)(x, num_inference_steps=math.ceil(50 * calls / requested))
    if "Inverse" not in name:  # backwards the starts differ: the levels of the first step depend on N
        assert rms(after, before) < rms(few, before)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "DDIMInverse"])
def test_every_solver_with_the_rule_of_the_paper(name):
    pipe, x = solved(name)
    assert torch.isfinite(pipe.to(accel="sada:paper")(x)).all()
    assert 0.2 < pipe.accel.report.skipped / pipe.accel.report.requested < 0.8


def test_the_paper_refuses_a_start_without_noise():
    with pytest.raises(UnsupportedPipeline, match="without noise"):
        solved("DDIMInverse")[0].to(accel="sada:paper")


@pytest.mark.parametrize("name", SOLVERS)
def test_a_tolerance_of_nothing_gives_the_plain_result(name):
    """As it goes to 0 the result goes to the plain one: nothing is skipped that was not checked."""
    pipe, x = solved(name)
    before = pipe(x)
    assert torch.equal(pipe.to(accel={"sada": {"tolerance": 0.0}})(x), before)
    after = pipe.to(accel={"sada": {"tolerance": 1e-9}})(x)
    assert rms(after, before) < 1e-5


@pytest.mark.parametrize("name", ["HeunDiscrete", "KDPM2Discrete", "FlowMatchHeunDiscrete"])
@pytest.mark.parametrize(
    "options", [{}, {"order": 3}, {"order": 1}, {"skip_from": 0}, {"tolerance": 1e9}], ids=str
)
def test_repeated_levels(name, options):
    """Both stages of a two-stage solver may have one level; a polynomial must not divide by its distance."""
    pipe, x = solved(name)
    before = pipe(x)
    after = pipe.to(accel={"sada": options})(x)
    assert pipe.accel.report.skipped > 0 and rms(after, before) < 0.2
    assert all(0 not in chosen and 98 not in chosen for chosen in skips(pipe, 32))


def test_only_some_rows_are_evaluated():
    pipe, x = toy().to(accel={"sada": {"tolerance": 2e-3}}), noise(3, seed=5)
    rows = counted(pipe.unet)
    pipe(x)
    chosen = skips(pipe, 3)
    assert {1, 2} & set(rows) and len(set(map(tuple, chosen))) > 1
    wanted = [sum(step not in steps for steps in chosen) for step in range(50)]
    assert [count for count in wanted if count] == rows


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistep", "DDIM", "EulerDiscrete", "UniPCMultistep", "FlowMatchEulerDiscrete"]
)
def test_start_in_mid_schedule(name):
    pipe, _ = solved(name)
    x, levels = pipe.unet.draw(8, generator=torch.Generator().manual_seed(0)), []

    class Look(Accelerator):
        exclusive = "guidance"  # outside, where repeated updates are not seen

        def update(self, call, proceed):
            path, scheduler = call.run.path, call.run.scheduler
            assert call.index == call.step + 20 and call.run.num_updates == 30
            level = path[call.index]
            if hasattr(scheduler, "sigmas"):
                ratio = float(scheduler.sigmas[call.step + 20])
                assert (level.sigma if "Flow" in name else level.sigma / level.alpha) == pytest.approx(ratio)
            else:
                abar = float(scheduler.alphas_cumprod[int(call.timestep)])
                assert level.alpha**2 == pytest.approx(abar)
            levels.append(level)
            return proceed(call)

    accelerate(pipe, Look())
    before = pipe(x / getattr(pipe.scheduler, "init_noise_sigma", 1.0), first=20)
    accelerate(pipe, [Look(), {"sada": {"tolerance": 0.01}}])
    after = pipe(x / getattr(pipe.scheduler, "init_noise_sigma", 1.0), first=20)
    assert len(levels) == 60 and pipe.accel.report.skipped > 0 and rms(after, before) < 0.05
    assert all(chosen[0] >= 3 and chosen[-1] < 29 for chosen in skips(pipe, 8) if chosen)


def test_img2img_pipeline():
    case = TINY["sd_img2img"]
    pipe = accelerate(case.build(), {"sada": {"tolerance": 1e9}})
    run(case, pipe, 40)
    updates = pipe.accel.report.updates
    chosen = pipe.accel.report.skipped_steps()
    assert updates == case.updates(40) < 40 and 3 <= chosen[0] and chosen[-1] < updates - 1


def steps_taken(pipe):
    """Returns a list of the scheduler's real updates."""
    taken, step = [], pipe.scheduler.step

    def count(*args, **kwargs):
        taken.append(1)
        return step(*args, **kwargs)

    count.__signature__ = inspect.signature(step)
    pipe.scheduler.step = count
    return taken


def test_replay_is_off_where_the_pipeline_changes_the_sample():
    pipe, x = toy().to(accel="sada"), noise(8)
    taken = steps_taken(pipe)
    pipe(x)
    assert len(taken) > 50, "corrections repeat updates"
    for change in (lambda step, sample: sample * 1.0001, lambda step, sample: torch.where(x > 1, x, sample)):
        taken.clear()
        assert torch.isfinite(pipe(x, after=change)).all()
        assert len(taken) == 50 and pipe.accel.report.skipped > 0
    taken.clear()
    pipe(x, after=lambda step, sample: sample.clone())
    assert len(taken) > 50, "a copy is no change"


@pytest.mark.parametrize("accel", ["sada", "sada:paper"])
def test_changes_in_place_are_kept(accel):
    """As callbacks and some pipelines make them."""
    pipe, x = toy().to(accel=accel), noise(8)
    new = pipe(x, after=lambda step, sample: sample * 1.001)
    torch.testing.assert_close(pipe(x, after=lambda step, sample: sample.mul_(1.001)), new)


def test_callback_changes_latents_in_place():
    case, results = TINY["sd"], []
    for change in (lambda latents: latents * 1.01, lambda latents: latents.mul_(1.01)):

        def callback(pipeline, step, timestep, tensors, change=change):
            return {"latents": change(tensors["latents"])}

        pipe = accelerate(case.build(), {"sada": {"tolerance": 0.1}})
        results.append(run(case, pipe, 20, callback_on_step_end=callback))
        assert pipe.accel.report.skipped > 0
    torch.testing.assert_close(*results)


def test_inpainting_that_blends():
    case = TINY["sd_inpaint_blend"]
    pipe = accelerate(case.build(), {"sada": {"tolerance": 1.0}})
    taken = steps_taken(pipe)
    assert torch.isfinite(run(case, pipe, 20)).all()
    assert pipe.accel.report.skipped > 0 and len(taken) == pipe.accel.report.updates


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("accel", ["sada", "sada:paper"])
def test_zero_terminal_snr(name, accel):
    options = {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    scheduler = getattr(diffusers, name)(**(NO_CLIP if name[:2] == "DD" else VP), **options)
    pipe, x = toy("v_prediction", scheduler), noise(8)
    before = pipe(x)
    after = pipe.to(accel={accel: {"skip_from": 0}})(x)
    assert pipe.accel.report.skipped > 10 and rms(after, before) < 0.02

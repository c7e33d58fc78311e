"""SADA against its card, on the exact mixture and in pipelines: checks 1, 5, 7, 8, 10, 11 and all solvers."""

import functools
import inspect
import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from tiny_pipelines import TINY, run

from diffaccel import Accelerator, Sada, UnsupportedPipeline, accelerate
from diffaccel.noise import is_stochastic
from diffaccel.pipelines.sada_rules import ErrorRule
from diffaccel.toy import GaussianMixtureModel, toy_t

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_CLIP = {**VP, "clip_sample": False}
Output = diffusers.models.unets.unet_2d.UNet2DOutput


class Loop(DiffusionPipeline):
    """The plainest sampling loop: noise in, latents out, in float64."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, noise, num_inference_steps=50, first=0, after=None):
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps[first:]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        x = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for step, t in enumerate(timesteps):
            scale = getattr(self.scheduler, "scale_model_input", lambda sample, t: sample)
            out = self.unet(scale(x, t), t).sample
            x = self.scheduler.step(out, t, x).prev_sample
            if after is not None:
                x = after(step, x)
        return x


class Foreign(torch.nn.Module):
    """Toy T with other inputs and outputs than those of `GaussianMixtureModel`."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.mixture = kind, toy_t()

    def forward(self, x, t):
        t = float(t)
        if self.kind == "edm":  # sigma_data 0.5, input c_in x, t = log(sigma) / 4
            sigma, d = math.exp(4 * t), 0.5
            norm = math.hypot(sigma, d)
            x0 = self.mixture.x0(x * norm, 1.0, sigma)
            return Output(sample=(x0 - d**2 / norm * x) * norm / (sigma * d))
        if self.kind == "angle":
            alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
            x0, eps = self.mixture.x0(x, alpha, sigma), self.mixture.eps(x, alpha, sigma)
            return Output(sample=alpha * eps - sigma * x0)
        assert self.kind == "rising flow"
        return Output(sample=self.mixture.x0(x, t, 1 - t) - self.mixture.eps(x, t, 1 - t))


def toy(prediction_type="epsilon", scheduler=None, model=None):
    if model is None:
        model = toy_t(prediction_type=prediction_type)
    if scheduler is None:
        scheduler = DPMSolverMultistepScheduler(**VP, prediction_type=prediction_type, steps_offset=1)
    return Loop(model, scheduler)


def flow_toy():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return Loop(toy_t(prediction_type="flow_prediction", path="flow"), scheduler)


def noise(count=64, seed=0):
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(model):
    """Returns a list that grows by the rows of every real evaluation."""
    rows, forward = [], model.forward

    def count(sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    model.forward = count
    return rows


def rms(a, b):
    return (a - b).pow(2).mean().sqrt().item()


def skips(pipe, count):
    return [pipe.accel.report.skipped_steps(n) for n in range(count)]


@functools.cache
def plain(steps=50):
    """Toy T's 256 samples by DPM++ 2M; the card's rms is that to 50 steps."""
    return toy()(noise(256), num_inference_steps=steps)


class Forced(Sada):
    """Skips given steps, whatever the error: to test the reconstruction alone."""

    name = ""
    pattern = frozenset(range(11, 46, 2))

    def start_rule(self, run):
        rule = ErrorRule(0.0, self.max_skips, self.order)
        plan = rule.plan

        def forced(call, x0, result, ran):
            plan(call, x0, result, ran)
            return np.full(len(x0), call.step + 1 in self.pattern)

        rule.plan = forced
        return rule

    def _in_range(self, call):
        return True


OFF = [{"skip_from": 1.0}, {"max_skips": 0}, {"tolerance": 0.0}, {"skip_until": 0.0}]


@pytest.mark.parametrize("off", OFF, ids=str)
@pytest.mark.parametrize("criterion", ["error", "stability"])
@pytest.mark.parametrize("cls", ["DDIMPipeline", "DDPMPipeline"])
def test_1_off_is_bitwise_plain(off, criterion, cls):
    if criterion == "stability" and "tolerance" in off:
        pytest.skip("an option of the error criterion")
    scheduler = DDIMScheduler(**NO_CLIP) if cls == "DDIMPipeline" else DPMSolverMultistepScheduler(**VP)
    pipe = getattr(diffusers, cls)(toy_t(), DDIMScheduler(**NO_CLIP))
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    rows = counted(pipe.unet)

    def sample():
        rows.clear()
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=4, generator=generator, num_inference_steps=50, output_type="np").images

    before = sample()
    pipe.to(accel={"sada": {"criterion": criterion, **off}})
    assert np.array_equal(sample(), before) and rows == [4] * 50
    assert pipe.accel.report.evaluated == pipe.accel.report.requested == 50
    pipe.to(accel="sada:fast")
    assert not np.array_equal(sample(), before) and sum(rows) < 200, "and what is on, differs"


@pytest.mark.parametrize("accel", ["sada", "sada:paper"])
@pytest.mark.parametrize("make", [toy, lambda: toy("v_prediction"), flow_toy], ids=["eps", "v", "flow"])
def test_5_reflection_rotation_batch(accel, make):
    pipe, x = make(), noise(6)
    pipe.to(accel=accel)
    result, chosen = pipe(x), skips(pipe, 6)
    assert all(chosen)
    rotation = torch.linalg.qr(noise(16, seed=1).reshape(16, 16)).Q
    for matrix in (-torch.eye(16, dtype=torch.float64), rotation):
        turned = make()
        means = turned.unet.means.flatten(1) @ matrix.T
        turned.unet.means.copy_(means.reshape(turned.unet.means.shape))
        turned.to(accel=accel)
        image = turned((x.flatten(1) @ matrix.T).reshape(x.shape))
        assert skips(turned, 6) == chosen
        expected = (result.flatten(1) @ matrix.T).reshape(x.shape)
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-4)  # DPM++ solves in float32
    for n in (0, 3):
        alone = pipe(x[n : n + 1])
        assert skips(pipe, 1) == [chosen[n]], "a sample decides for itself"
        torch.testing.assert_close(alone, result[n : n + 1], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("accel", [{"sada": {"skip_from": 0, "tolerance": 2e-3}}, "sada:paper"], ids=str)
def test_5_batch_invariance_of_other_solvers(name, accel):
    """Corrections in a batch where samples skip differently, and two-stage solvers."""
    pipe, x = toy(scheduler=getattr(diffusers, name)(**VP)).to(accel=accel), noise(8)
    together, chosen = pipe(x, num_inference_steps=30), skips(pipe, 8)
    assert any(chosen) and (accel == "sada:paper" or len(set(map(tuple, chosen))) > 1)
    for n in range(8):
        alone = pipe(x[n : n + 1], num_inference_steps=30)
        assert skips(pipe, 1) == [chosen[n]]
        torch.testing.assert_close(alone, together[n : n + 1], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("solver", ["DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep", "HeunDiscrete"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_7_point_mass(prediction, solver):
    """To 1e-10 where network and solver agree on the levels; Euler's, float32, are 1e-7 off."""
    model = GaussianMixtureModel(num_components=1, std=0.0, prediction_type=prediction).double()
    scheduler = getattr(diffusers, f"{solver}Scheduler")(**VP, prediction_type=prediction)
    pipe, x = toy(model=model, scheduler=scheduler), noise(4)
    before = pipe(x)
    pipe.to(accel={"sada": {"tolerance": 1e9}})
    after = pipe(x)
    assert pipe.accel.report.evaluated < 0.5 * pipe.accel.report.requested
    exact = prediction == "sample" or "Multistep" in solver
    torch.testing.assert_close(after, before, atol=1e-10 if exact else 1e-6, rtol=1e-10 if exact else 1e-6)


def test_8_reconstruction_of_a_fixed_pattern():
    """Every second step 11..45; card: eps reuse 5.4e-3, 2/3/4 nodes 8.3e-4/4.5e-4/1.2e-4, plain 33 1.3e-2."""

    class ReuseEps(Accelerator):
        def evaluate(self, call, proceed):
            self.last = self.last if call.step in Forced.pattern else proceed(call)
            return self.last

    def error(accel):
        pipe = accelerate(toy(), accel)
        image = pipe(noise(256))
        assert accel.name == "" and pipe.accel.report.evaluated == 32
        return rms(image, plain())

    reuse = error(ReuseEps())
    assert reuse == pytest.approx(5.4e-3, rel=0.3)  # other means than the card's
    errors = {
        setting: error(Forced(order=setting[0], correct=setting[1]))
        for setting in itertools.product((2, 3, 4), (False, True))
    }
    assert errors[3, False] * 5 <= reuse
    assert max(errors.values()) * 5 < rms(plain(32), plain())
    for order, card in ((2, 8.3e-4), (3, 4.5e-4), (4, 1.2e-4)):
        assert errors[order, False] == pytest.approx(card, rel=0.4)
    for order in (2, 3):  # the orders that the card recommends
        assert errors[order, True] < 0.8 * errors[order, False]


def test_8_long_gaps():
    """3 of 4 skipped from step 25: more nodes are no better, and correction helps."""

    class Gaps(Forced):
        name = ""
        pattern = frozenset(step for step in range(26, 47) if step % 4 != 1)

    errors = {}
    for order, correct in itertools.product((2, 3, 4), (False, True)):
        pipe = accelerate(toy(), Gaps(order=order, correct=correct))
        errors[order, correct] = rms(pipe(noise(256)), plain())
        assert pipe.accel.report.evaluated == 34
    assert errors[4, False] > errors[3, False] and errors[3, True] < errors[3, False]
    assert max(errors.values()) < rms(plain(34), plain())


@pytest.mark.parametrize("accel", ["sada", "sada:fast", "sada:paper"])
@pytest.mark.parametrize("make", [toy, flow_toy, lambda: toy(scheduler=DDIMScheduler(**NO_CLIP))])
def test_10_nothing_is_left_from_other_runs(accel, make):
    pipe, x = make().to(accel=accel), noise(4)
    first, chosen = pipe(x), skips(pipe, 4)
    assert torch.equal(pipe(x), first)
    pipe(x, num_inference_steps=17)
    pipe(noise(7, seed=9), num_inference_steps=20)
    assert torch.equal(pipe(x), first)

    for stop in (1, 12, 23, 48):

        def after(step, sample, stop=stop):
            if step == stop:
                raise KeyError("stop")
            return sample

        with pytest.raises(KeyError):
            pipe(x, after=after)
        assert torch.equal(pipe(x), first) and skips(pipe, 4) == chosen
    assert torch.equal(make().to(accel=accel)(x), first), "nor is anything kept in the first pipeline"


def test_10_aborted_by_a_callback():
    case = TINY["sd"]
    pipe = accelerate(case.build(), {"sada": {"tolerance": 0.1}})
    first = run(case, pipe, 20)

    def stop(pipeline, step, timestep, tensors):
        if step == 9:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        run(case, pipe, 20, callback_on_step_end=stop)
    run(case, pipe, 11)
    assert torch.equal(run(case, pipe, 20), first) and pipe.accel.report.skipped > 0


@pytest.mark.parametrize("accel", ["sada", "sada:paper"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_11_calls_add_up(accel, name):
    pipe, x = toy(scheduler=getattr(diffusers, name)(**VP)).to(accel=accel), noise(5)
    rows = counted(pipe.unet)
    pipe(x)
    report, calls = pipe.accel.report, 99 if "Heun" in name else 50
    assert report.requested == report.updates == calls
    assert sum(rows) == pytest.approx(report.evaluated * 5) == report.counts["unet"].rows
    assert sum(len(action.samples) for action in report.actions) + sum(rows) == calls * 5
    assert report.skipped == pytest.approx(np.mean([len(chosen) for chosen in skips(pipe, 5)]))
    assert f"of {calls} evaluations" in str(report)


@pytest.mark.parametrize(("name", "probe"), [("sd", "conv_in"), ("flux_true_cfg", "x_embedder")])
def test_11_counted_by_a_hook(name, probe):
    """Guidance in one stacked call, and in two calls a step."""
    case = TINY[name]
    pipe = accelerate(case.build(), {"sada": {"tolerance": 0.1}})
    network, rows = getattr(pipe, case.denoisers[0]), []
    with getattr(network, probe).register_forward_hook(lambda *call: rows.append(len(call[-1]))):
        run(case, pipe, 20)
    report = pipe.accel.report
    assert report.requested == 20 * case.calls_per_step and report.skipped > 0
    per_call = report.batch * (2 if case.calls_per_step == 1 else 1)
    assert sum(rows) == pytest.approx((report.requested - report.skipped) * per_call)


@pytest.mark.parametrize("accel", ["sada:precise", "sada", "sada:fast", "sada:paper"])
def test_better_than_fewer_steps(accel):
    pipe = toy().to(accel=accel)
    error, calls = rms(pipe(noise(256)), plain()), pipe.accel.report.evaluated
    assert calls < 40 and error <= 0.5 * rms(plain(math.ceil(calls)), plain())
    assert accel != "sada:paper" or "criterion=stability" in str(pipe.accel)
    assert accel != "sada:paper" or "criterion=stability" in str(pipe.accel.report.stack)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_prediction_types_agree(prediction):
    """The same but for corrections, in which the network's output is kept while the sample moves."""
    x, uncorrected = noise(64), {"sada": {"correct": False}}
    first, pipe = toy().to(accel=uncorrected), toy(prediction).to(accel=uncorrected)
    torch.testing.assert_close(pipe(x), first(x), atol=1e-5, rtol=1e-5)
    assert skips(pipe, 64) == skips(first, 64)
    corrected = [rms(pipe.to(accel="sada")(x), plain()[:64]) for pipe in (first, pipe)]
    assert max(corrected) < 3 * min(corrected)


def test_flow_prediction():
    """With 256 samples, some of which change their mode when steps are left out."""
    pipe, x = flow_toy().to(accel="sada"), noise(256)
    after, calls = pipe(x), pipe.accel.report.evaluated
    pipe.to(accel=None)
    before, few = pipe(x), pipe(x, num_inference_steps=math.ceil(calls))
    assert calls < 35 and rms(after, before) < 0.5 * rms(few, before)


@pytest.mark.parametrize("steps", [20, 50, 100])
@pytest.mark.parametrize("accel", ["sada", "sada:fast", "sada:paper"])
def test_ranges_are_fractions(steps, accel):
    pipe, x = toy().to(accel=accel), noise(16)
    pipe(x, num_inference_steps=steps)
    chosen = skips(pipe, 16)
    assert all(chosen), "short runs are accelerated too"
    (sada,) = pipe.accel.stack
    for steps_of_one in chosen:
        assert steps_of_one[0] >= max(3, sada.skip_from * steps) and steps_of_one[-1] < steps - 1
        assert steps_of_one[-1] < sada.skip_until * steps
        rows = [k - i for i, k in enumerate(steps_of_one)]  # equal within a stretch
        assert max(rows.count(row) for row in rows) <= sada.max_skips
    pipe.to(accel={accel: {"skip_from": 0.5, "skip_until": 0.8}})
    pipe(x, num_inference_steps=steps)
    union = set().union(*skips(pipe, 16))
    assert union and min(union) >= 0.5 * steps and max(union) < 0.8 * steps


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

"""SADA against its card: the acceptance checks 1 to 11, on the exact mixture and on toy networks."""

import copy
import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from tiny_pipelines import TINY, run

from diffaccel import Accelerator, Sada, UnsupportedPipeline, accelerate
from diffaccel.noise import path_of
from diffaccel.pipelines.history import History, lagrange_weights
from diffaccel.pipelines.replay import Replay
from diffaccel.pipelines.sada_rules import ErrorRule, StabilityRule
from diffaccel.toy import GaussianMixtureModel, toy_t

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


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


class Forced(Sada):
    """Skips given steps, whatever the error: to test the reconstruction alone."""

    name = ""
    pattern: frozenset = frozenset(range(11, 46, 2))

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


@pytest.mark.parametrize("off", [{"skip_from": 1.0}, {"max_skips": 0}, {"tolerance": 0.0}])
@pytest.mark.parametrize("criterion", ["error", "stability"])
def test_1_off_is_bitwise_plain(off, criterion):
    if criterion == "stability" and "tolerance" in off:
        pytest.skip("an option of the error criterion")
    pipe, x = toy(), noise(8)
    plain = pipe(x)
    pipe.to(accel={"sada": {"criterion": criterion, **off}})
    assert torch.equal(pipe(x), plain)
    assert pipe.accel.report.evaluated == pipe.accel.report.requested == 50


def test_2_time_scale_of_the_velocity():
    """The predictor moves as far as the solver: the reference's time scale gave 0.049 of it."""
    pipe, x, ratios = toy(), noise(32), []

    class Watch(Accelerator):
        def start(self, run):
            self.rule = StabilityRule(0, math.inf, 4, 4)

        def update(self, call, proceed):
            result = proceed(call)
            x0 = call.run.path[call.index].x0(call.output, call.sample)
            self.rule.plan(call, x0, result, np.ones(len(x0), bool))
            if 10 < call.step < 45:
                start = call.run.path.to_time_coordinates(call.index, call.sample)
                real = call.run.path.to_time_coordinates(call.index + 1, result[0]) - start
                ratios.append(float((self.rule.predicted - start).norm() / real.norm()))
            return result

    accelerate(pipe, Watch())
    pipe(x)
    assert all(0.9 < ratio < 1.1 for ratio in ratios), ratios


@pytest.mark.parametrize(
    ("coefficients", "order"),
    [
        (StabilityRule.PREDICTOR, 3),
        ((1, 0, 0), 2),
        ((0.625, 0.75, -0.375), 2),
        ((1.5, -0.5, 0), 3),
        ((23 / 12, -16 / 12, 5 / 12), 4),
    ],
)
def test_3_order_of_the_predictor(coefficients, order):
    def x(t):
        return math.exp(-t) * math.sin(3 * t)

    def y(t):
        return math.exp(-t) * (3 * math.cos(3 * t) - math.sin(3 * t))

    def error(h):  # t falls by h, as in sampling
        slope = sum(c * y(0.7 + j * h) for j, c in enumerate(coefficients))
        return abs(x(0.7 - h) - (x(0.7) - h * slope))

    assert sum(coefficients) == pytest.approx(1, abs=1e-12)
    assert math.log2(error(2e-3) / error(1e-3)) == pytest.approx(order, abs=0.1)


def test_4_the_criterion_has_both_signs():
    """With exact Euler the paper's predictor gives m = -D/6 |D2y|^2 + D/2 (y1 - y2).D2y, of either sign."""
    generator = torch.Generator().manual_seed(0)
    signs = set()
    for grows in (0.5, 2.5) * 5:
        y1, slope, bend = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        y0, y2 = y1 + grows * slope + 0.1 * bend, y1 - slope
        delta, second = 0.02, y0 - 2 * y1 + y2
        c0, c1, c2 = StabilityRule.PREDICTOR
        m = (-delta * y0 + delta * (c0 * y0 + c1 * y1 + c2 * y2)) * second
        expected = -delta / 6 * second.pow(2).sum() + delta / 2 * ((y1 - y2) * second).sum()
        assert torch.allclose(m.sum(), expected, atol=1e-14)
        signs.add(bool(m.sum() < 0))
    assert signs == {True, False}


@pytest.mark.parametrize("accel", ["sada", "sada:paper"])
@pytest.mark.parametrize("make", [toy, lambda: toy("v_prediction"), flow_toy])
def test_5_invariance_to_reflection_rotation_and_batch(accel, make):
    pipe, x = make(), noise(6)
    pipe.to(accel=accel)
    result, chosen = pipe(x), None
    chosen = skips(pipe, 6)
    assert any(chosen)
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


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_6_polynomials_are_exact(count):
    generator = np.random.default_rng(count)
    nodes = np.sort(generator.uniform(-3, 3, (count, 5)), 0)
    powers = generator.normal(size=(count, 5))
    history = History(count + 1)

    def value(u):
        return torch.as_tensor(sum(powers[k] * u**k for k in range(count)))[:, None]

    for j in range(count):
        for b in range(5):  # every sample at places of its own
            mask = np.arange(5) == b
            history.push(value(nodes[j, b]), nodes[j, b], mask)
    torch.testing.assert_close(history.predict(3.7, count), value(3.7), atol=1e-10, rtol=1e-10)
    assert lagrange_weights(nodes, 1.234).sum(0) == pytest.approx(np.ones(5))
    if count > 1:
        between = history.interpolate(3.4, count, value(3.9), 3.9)
        torch.testing.assert_close(between, value(3.4), atol=1e-10, rtol=1e-10)
    history.push(value(9.0), nodes[-1, 0], np.arange(5) == 0)
    assert history.count.tolist() == [count] * 5, "a repeated place replaces the value"


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_7_point_mass(prediction):
    model = GaussianMixtureModel(num_components=1, std=0.0, prediction_type=prediction).double()
    pipe, x = toy(prediction, model=model), noise(4)
    plain = pipe(x)
    pipe.to(accel={"sada": {"tolerance": 1e9}})
    fast = pipe(x)
    assert pipe.accel.report.evaluated < 25
    torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-10)


def test_8_reconstruction_of_a_fixed_pattern():
    """Every second step 11..45 skipped; the card has 5.4e-3 for reuse of eps and 4.5e-4 for three nodes."""
    pipe, x = toy(), noise(256)
    plain = pipe(x)
    few = rms(pipe(x, num_inference_steps=32), plain)

    class ReuseEps(Accelerator):
        def evaluate(self, call, proceed):
            if call.step in Forced.pattern:
                return self.last
            self.last = proceed(call)
            return self.last

    accelerate(pipe, ReuseEps())
    reuse = rms(pipe(x), plain)
    error = {}
    for order, correct in itertools.product((2, 3), (False, True)):
        accelerate(pipe, Forced(order=order, correct=correct))
        error[order, correct] = rms(pipe(x), plain)
        assert pipe.accel.report.evaluated == 32
    assert error[3, False] * 5 <= reuse, (error, reuse)
    assert error[2, True] < error[2, False] < reuse and error[3, True] < error[3, False]
    assert max(error.values()) < few / 4


def test_9_guidance_commutes_with_reconstruction():
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 3, 4, 16, generator=generator, dtype=torch.float64)
    histories = [History(3) for _ in range(3)]
    for k in range(3):
        guided = uncond[k] + 5 * (cond[k] - uncond[k])
        for history, value in zip(histories, (cond[k], uncond[k], guided), strict=True):
            history.push(value, k + 0.3 * k * k, np.ones(4, bool))
    c, u, g = (history.predict(4.5, 3) for history in histories)
    torch.testing.assert_close(u + 5 * (c - u), g, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("accel", ["sada", "sada:fast", "sada:paper"])
def test_10_nothing_is_left_from_other_runs(accel):
    pipe, x = toy().to(accel=accel), noise(4)
    first = pipe(x)
    assert torch.equal(pipe(x), first)
    pipe(x, num_inference_steps=17)
    assert torch.equal(pipe(x), first)

    def abort(step, sample):
        raise KeyboardInterrupt if step == 23 else StopIteration if step > 23 else ValueError

    with pytest.raises(ValueError):
        pipe(x, after=abort)
    assert torch.equal(pipe(x), first)


@pytest.mark.parametrize("accel", ["sada", "sada:paper", "reuse"])
def test_11_calls_add_up(accel):
    pipe, x = toy().to(accel=accel), noise(5)
    rows = counted(pipe.unet)
    pipe(x)
    report = pipe.accel.report
    assert sum(rows) == pytest.approx(report.evaluated * 5)
    assert report.requested == 50
    assert sum(len(action.samples) for action in report.actions) + sum(rows) == 50 * 5


def test_default_beats_plain_fewer_steps():
    pipe, x = toy(), noise(256)
    plain = pipe(x)
    pipe.to(accel="sada")
    fast = pipe(x)
    calls = pipe.accel.report.evaluated
    pipe.to(accel=None)
    few = pipe(x, num_inference_steps=round(calls))
    assert calls < 35 and rms(fast, plain) * 5 < rms(few, plain)


@pytest.mark.parametrize("steps", [20, 50, 100])
@pytest.mark.parametrize("accel", ["sada:fast", "sada:paper"])
def test_ranges_are_fractions(steps, accel):
    pipe, x = toy().to(accel=accel), noise(16)
    pipe(x, num_inference_steps=steps)
    skipped = sorted({step for chosen in skips(pipe, 16) for step in chosen})
    assert skipped, "short runs are accelerated too"
    assert skipped[0] >= 3 and skipped[-1] < steps - 1, "first steps and the last one always run"


DETERMINISTIC = {
    "DDIMScheduler": {}, "PNDMScheduler": {"skip_prk_steps": True}, "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {}, "KDPM2DiscreteScheduler": {}, "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"solver_order": 3}, "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": {}, "DEISMultistepScheduler": {},
}  # fmt: skip


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_deterministic_solver(name):
    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(**VP, **DETERMINISTIC[name], **options)
    pipe, x = toy(scheduler=scheduler), noise(32)
    plain = pipe(x)
    pipe.to(accel="sada")
    fast = pipe(x)
    report = pipe.accel.report
    assert report.skipped > 0.15 * report.requested
    pipe.to(accel="reuse")
    assert rms(fast, plain) < 0.5 * rms(pipe(x), plain)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_solvers(name):
    pipe, x = flow_toy(), noise(32)
    pipe.scheduler = getattr(diffusers, name)()
    plain = pipe(x)
    pipe.to(accel="sada:fast")
    fast = pipe(x)
    assert pipe.accel.report.skipped > 0
    pipe.to(accel="reuse")
    assert rms(fast, plain) < 0.5 * rms(pipe(x), plain)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
     "PNDMScheduler", "HeunDiscreteScheduler"],
)  # fmt: skip
def test_replay_with_the_truth_gives_the_true_trajectory(name):
    """Steps 20 to 22 are wrong at first, and repeated with what the network would have said."""
    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    options |= {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe, x = toy(scheduler=getattr(diffusers, name)(**VP, **options)), noise(3)
    truth, outputs = {}, {}

    class Record(Accelerator):
        def update(self, call, proceed):
            truth[call.step] = call.run.path[call.index].x0(call.output, call.sample)
            outputs[call.step] = call.output
            return proceed(call)

    accelerate(pipe, Record())
    plain = pipe(x)

    class Wrong(Accelerator):
        def start(self, run):
            self.replay = Replay()

        def evaluate(self, call, proceed):
            output = outputs[call.step].clone()
            return (output * 1.1,) if call.step in (20, 21, 22) else (output,)

        def update(self, call, proceed):
            gap = call.step in (20, 21, 22)
            if call.step == 23:
                call = self.replay.correct(call, np.array([True] * 3), lambda old: truth[old.step])
            return self.replay.step(call, proceed, np.array([gap] * 3), keep=True)

    pipe.unet.forward = lambda sample, t: diffusers.models.unets.unet_2d.UNet2DOutput(sample=sample)
    original = Loop.__call__

    class Output(Wrong):
        def evaluate(self, call, proceed):
            return diffusers.models.unets.unet_2d.UNet2DOutput(sample=super().evaluate(call, proceed)[0])

    accelerate(pipe, Output())
    assert Loop.__call__ is original
    torch.testing.assert_close(pipe(x), plain, atol=1e-10, rtol=1e-10)


def test_only_some_rows_are_evaluated():
    pipe, x = toy().to(accel="sada"), noise(3, seed=5)
    rows = counted(pipe.unet)
    pipe(x)
    assert {1, 2} & set(rows) and len({tuple(chosen) for chosen in skips(pipe, 3)}) > 1


def test_mid_schedule_start_uses_the_right_levels():
    for scheduler in (None, DDIMScheduler(**VP, clip_sample=False)):
        pipe, x, seen = toy(scheduler=scheduler), noise(8), []

        class Look(Accelerator):
            exclusive = "guidance"  # outside, where repeated updates are not seen

            def update(self, call, proceed, seen=seen):
                seen.append((call.step, call.index, call.run.num_updates))
                return proceed(call)

        accelerate(pipe, [Look(), "sada:fast"])
        pipe(x, first=20)
        assert seen == [(step, step + 20, 30) for step in range(30)]
        assert pipe.accel.report.skipped > 0


def test_sample_changed_by_the_pipeline_is_not_replayed(monkeypatch):
    pipe, x, used = toy().to(accel="sada:fast"), noise(8), []
    original = Replay.correct

    def correct(self, call, due, interpolated):
        used.append(len(self._moments))
        return original(self, call, due, interpolated)

    monkeypatch.setattr(Replay, "correct", correct)
    pipe(x)
    assert any(used)
    used.clear()
    blended = pipe(x, after=lambda step, sample: sample * 1.0001)
    assert not any(used) and torch.isfinite(blended).all()
    assert pipe.accel.report.skipped > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    case = TINY["sd"]
    pipe = case.build()
    accelerate(pipe.to(dtype), {"sada": {"tolerance": 0.1}})
    result = run(case, pipe, 20)
    assert result.dtype == dtype and torch.isfinite(result).all() and pipe.accel.report.skipped > 0


@pytest.mark.parametrize(
    "name",
    ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler"],
)
def test_stochastic_solvers_are_refused(name):
    case = TINY["sd"]
    pipe = case.build()
    options = {"algorithm_type": "sde-dpmsolver++"} if "DPM" in name and "Multi" in name else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    with pytest.raises(UnsupportedPipeline, match="random"):
        pipe.to(accel="sada")
    assert not hasattr(pipe, "accel")


def test_eta_and_later_schedulers_are_refused_at_the_call():
    case = TINY["sd"]
    pipe = case.build().to(accel="sada")
    with pytest.raises(UnsupportedPipeline, match="eta=1"):
        run(case, pipe, 5, eta=1.0)
    run(case, pipe, 5)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedPipeline, match="random"):
        run(case, pipe, 5)


def test_path_of_a_probe_leaves_the_scheduler_alone():
    scheduler = DPMSolverMultistepScheduler(**VP)
    before = copy.deepcopy(scheduler.__dict__)
    Sada().check(type("Pipe", (), {"scheduler": scheduler})())
    assert scheduler.num_inference_steps is before["num_inference_steps"]
    scheduler.set_timesteps(7)
    assert len(path_of(scheduler)) == 7

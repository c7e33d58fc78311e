"""SADA against its card, on the exact mixture: checks 1, 5, 7, 8, 10, 11."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from sada_toys import NO_CLIP, VP, Forced, counted, flow_toy, noise, plain, rms, skips, toy
from tiny_pipelines import TINY, run

from diffaccel import Accelerator, accelerate
from diffaccel.toy import GaussianMixtureModel, toy_t

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

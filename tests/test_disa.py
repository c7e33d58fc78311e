"""DiSA: the schedules, the limits that justify them, and the pipelines that opt in."""

import copy
import math
import pickle

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny_pipelines import fresh

from diffaccel.errors import AcceleratorConflict, OptionError, UnknownAccelerator, UnsupportedPipeline
from diffaccel.pipelines import ARStep, MARPipeline, MARScheduler, MARTransformer2DModel, StepAnnealing
from diffaccel.pipelines.autoregressive import token_counts
from diffaccel.pipelines.disa import FALLS
from diffaccel.pipelines.head_error import drawn_moments, normal_error
from diffaccel.pipelines.mar_chain import chain, diffusion_timesteps, run_chain
from diffaccel.pipelines.mar_scheduler import masked_counts

MAR = token_counts(masked_counts(256, 64))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def schedule(drawn=MAR, preset="", **options):
    annealing = StepAnnealing.create(preset, **options)
    return [annealing.steps(ARStep(k, tuple(drawn))) for k in range(len(drawn))]


def calls(steps):
    return sum(len(diffusion_timesteps(number)) for number in steps)


# the schedules


def test_schedules_of_mar():
    linear, cosine, two = (schedule(kind=kind) for kind in ("linear", "cosine", "two-stage"))
    assert linear[:5] == [50, 49, 48, 47, 47] and linear[-5:] == [7, 7, 6, 5, 5]
    assert [sum(part) for part in (linear, cosine, two)] == [1733, 1729, 1760]
    assert [calls(part) for part in (linear, cosine, two)] == [1681, 1674, 1696]
    assert two[31:33] == [50, 5]
    assert schedule(kind="constant", lower=7) == [7] * 64
    weighted = sum(n * t for n, t in zip(MAR, linear, strict=True)) / 256
    assert weighted == pytest.approx(20.98, abs=0.005)
    assert sum(linear) / 64 == pytest.approx(27.08, abs=0.005)


@pytest.mark.parametrize(
    ("preset", "drawn", "expected"),
    [
        ("xar", (64,) * 4, [50, 38, 26, 15]),
        ("flowar", (1, 4, 16, 64, 256), [25, 22, 20, 17, 15]),
        ("flowar-h", (1, 4, 16, 64, 256), [50, 41, 32, 23, 15]),
        ("mar", (1,) * 64, schedule()),
        ("harmon", (16,) * 64, schedule()),
    ],
)
def test_presets(preset, drawn, expected):
    assert schedule(drawn, preset) == expected


@pytest.mark.parametrize("by", ["ar_step", "tokens"])
@pytest.mark.parametrize("kind", [kind for kind in FALLS if kind != "constant"])
def test_schedules_fall_from_upper_to_lower(kind, by):
    for drawn in (MAR, (1, 4, 16), (7, 1), (1,) * 9):
        steps = schedule(drawn, kind=kind, by=by, upper=31, lower=4)
        assert steps[0] == 31 and steps[-1] == 4 and steps == sorted(steps, reverse=True)
    assert schedule((16,), kind=kind, by=by, upper=31) == [31]  # a single step


def test_progress_by_tokens_waits_for_them():
    by_step, by_tokens = schedule(), schedule(by="tokens")
    assert all(b >= a for a, b in zip(by_step, by_tokens, strict=True))  # the first steps draw few tokens
    known, end = sum(MAR[:40]), 256 - MAR[-1]
    assert by_tokens[40] == 5 + (end - known) * 45 // end
    assert schedule((3,) * 7, by="tokens") == schedule((3,) * 7)


def test_timesteps():
    assert diffusion_timesteps(5) == [950, 749, 500, 250, 0]
    assert len(diffusion_timesteps(50)) == 48 and diffusion_timesteps(50)[:3] == [950, 938, 917]
    lengths = {5: 5, 10: 10, 25: 24, 27: 26, 50: 48, 100: 96}
    assert {n: len(diffusion_timesteps(n)) for n in lengths} == lengths
    with pytest.raises(OptionError, match="2 steps or more, not 1"):
        diffusion_timesteps(1)


# what the head makes of tokens whose law is known


def best_head(kind, steps, mean, spread):
    """The best prediction for normal tokens with the means (R, 1)."""
    by_time = {step.timestep: step for step in steps}

    def predict(x, t):
        step = by_time[t]
        total = (step.alpha * spread) ** 2 + step.sigma**2
        token = mean + spread**2 * step.alpha * (x - step.alpha * mean) / total
        noise = step.sigma * (x - step.alpha * mean) / total
        return noise - token if kind == "flow" else noise

    return predict


@pytest.mark.parametrize(("kind", "numbers"), [("diffusion", (2, 5, 50)), ("flow", (1, 2, 7))])
def test_a_certain_token_needs_no_steps(kind, numbers):
    """The limit that justifies annealing: without spread any number of steps is exact."""
    mean = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for number in numbers:
        steps = chain(kind, number)
        noise = torch.randn(len(steps), 9, 1, generator=seeded(), dtype=torch.float64)
        drawn, spread = run_chain(best_head(kind, steps, mean, 0.0), steps, noise, 1.0)
        assert torch.allclose(drawn, mean, atol=1e-12)
        assert spread < 1e-6 or math.isnan(spread)
        assert normal_error(steps, 0.0) < 1e-12


@pytest.mark.parametrize(
    ("variance", "steps", "expected"),
    [
        (1, 5, (1.000, 1.241, 2.07, 3.93)),
        (1, 25, (1.000, 1.039, 1.130, 1.288)),
        (1, 50, (1.000, 1.019, 1.062, 1.133)),
        (0, 5, (0.662, 0.608, 0.399, 0.233)),
        (0, 50, (0.955, 0.934, 0.873, 0.792)),
    ],
)
def test_spread_of_drawn_normal_tokens(variance, steps, expected):
    taken = chain("diffusion", steps)
    for s, ratio in zip((1.0, 0.5, 0.2, 0.1), expected, strict=True):
        mean, spread = drawn_moments(taken, 1.0, s, variance)
        assert spread / s == pytest.approx(ratio, abs=5e-3 if ratio > 2 else 2e-3)
        if s in (1.0, 0.5):
            assert mean == pytest.approx(0.994 if s == 1 else 0.999, abs=2e-3)


def test_moments_are_those_of_samples():
    for kind, variance in (("diffusion", 0.0), ("diffusion", 1.0), ("flow", 0.0)):
        steps = chain(kind, 6)
        means = torch.linspace(-1, 1, 20_000)[:, None]
        noise = torch.randn(len(steps), 20_000, 1, generator=seeded())
        drawn, _ = run_chain(best_head(kind, steps, means, 0.4), steps, noise, variance, 0.9)
        slope = (drawn * means).sum() / means.square().sum()  # of the regression on the conditional mean
        mean, spread = drawn_moments(steps, 1.0, 0.4, variance, 0.9)
        assert slope == pytest.approx(mean, abs=0.02) and abs(slope - 1) < 0.05
        assert (drawn - slope * means).std() == pytest.approx(spread, rel=0.02)


def test_the_spread_converges_in_first_order():
    errors = [drawn_moments(chain("diffusion", n), 0.0, 0.5, 1.0)[1] / 0.5 - 1 for n in (25, 50, 100)]
    assert errors == pytest.approx([0.039, 0.019, 0.009], abs=1e-3)


def test_temperature():
    steps = chain("diffusion", 50)
    for s, ratio in ((1.0, 0.9506), (0.1, 0.950)):
        cold, warm = (drawn_moments(steps, 0.0, s, 1.0, tau)[1] for tau in (0.95, 1.0))
        assert cold / warm == pytest.approx(ratio, abs=2e-3)


# the automatic schedule


def test_automatic_steps_are_the_fewest_within_the_tolerance():
    scheduler, drawn = MARScheduler(variance_type="small"), (1,) * 4
    annealing = StepAnnealing(kind="auto", tolerance=0.05, upper=60)
    error = scheduler.step_error
    assert annealing.steps(ARStep(0, drawn), error) == 60  # nothing is known yet
    assert annealing.steps(ARStep(1, drawn, math.nan), error) == 60
    given = []
    for spread in (0.0, 0.02, 0.1, 0.3, 0.6, 1.0):
        number = annealing.steps(ARStep(1, drawn, spread), error)
        given.append(number)
        assert number == 60 or error(number, spread) <= 0.05
        assert number == 5 or error(number - 1, spread) > 0.05
    assert given == sorted(given) and given[0] == 5 and len(set(given)) > 3
    strict = StepAnnealing(kind="auto", tolerance=0.0)
    assert strict.steps(ARStep(1, drawn, 0.5), error) == 50


# pipelines


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MARTransformer2DModel(16, 2, 1, 3, 2, 8, 1, 1, 2, head_width=16, head_layers=1,
                                      learned_variance=False).eval()  # fmt: skip
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def pipe(network):
    pipe = MARPipeline(network, MARScheduler(variance_type="small"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, labels=(0, 1), **options):
    return pipe(list(labels), **{"generator": seeded(), "output_type": "latent", **options}).images


def test_head_calls_are_reported(pipe):
    call(pipe.to(accel="disa:mar"))
    report = pipe.accel.report
    count = report.counts["head"]
    assert (count.requested, count.evaluated, count.rows) == (6400, 1681, 2 * 1681)
    assert report.counts["transformer"].evaluated == report.evaluated == report.updates == 64
    assert {action.step for action in report.actions} == set(range(64))
    assert all(a.what == "anneal" and a.samples == (0, 1) and a.network == "head" for a in report.actions)
    assert report.to_dict()["networks"]["head"]["evaluated"] == 1681
    call(pipe, guidance_scale=2.0, num_inference_steps=16, num_head_steps=20)
    count = pipe.accel.report.counts["head"]
    assert count.requested == 320 and count.rows == 4 * (count.rows // 4) > 4 * count.evaluated


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("kind", FALLS)
def test_equal_bounds_are_the_fixed_sampler(pipe, kind, guidance):
    options = {"guidance_scale": guidance, "num_inference_steps": 10}
    plain = call(pipe, num_head_steps=7, **options)
    annealed = call(pipe.to(accel={"disa": {"upper": 7, "lower": 7, "kind": kind}}), **options)
    assert torch.equal(plain, annealed)


def test_each_step_takes_what_it_is_given(pipe):
    seen = []

    def note(pipe, k, timestep, given):
        seen.append(given["head_calls"])

    pipe.to(accel={"disa": {"upper": 20, "lower": 3}})
    call(
        pipe,
        num_inference_steps=6,
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=["head_calls"],
    )
    drawn = token_counts(masked_counts(64, 6))
    assert seen == [len(diffusion_timesteps(n)) for n in schedule(drawn, upper=20, lower=3)]


def test_a_single_step(pipe):
    annealed = call(pipe.to(accel="disa"), num_inference_steps=1)
    assert torch.equal(annealed, call(pipe.to(accel=None), num_inference_steps=1, num_head_steps=50))


def test_automatic_schedule_follows_the_head(pipe):
    call(pipe.to(accel={"disa": {"kind": "auto", "tolerance": 0.0}}), num_inference_steps=8)
    assert pipe.accel.report.counts["head"].evaluated == 8 * 48
    call(pipe.to(accel={"disa": {"kind": "auto", "tolerance": 10.0}}), num_inference_steps=8)
    assert pipe.accel.report.counts["head"].evaluated == 48 + 7 * 5
    spread = pipe.scheduler.spread
    assert spread is None  # that of the call was on the stand-in
    call(pipe.to(accel=None), num_inference_steps=8)
    assert pipe.scheduler.spread > 0


def test_nothing_stays_after_a_call(pipe):
    plain, scheduler = call(pipe, num_inference_steps=4, num_head_steps=9), pipe.scheduler
    before = dict(pipe.scheduler.__dict__)
    pipe.to(accel="disa")
    first = call(pipe, num_inference_steps=4)
    assert torch.equal(first, call(pipe, num_inference_steps=4))
    twins = copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))
    assert all(torch.equal(first, call(twin, num_inference_steps=4)) for twin in twins)
    with pytest.raises(OptionError, match="65 autoregressive steps for 64 tokens"):
        call(pipe, num_inference_steps=65)
    assert pipe.scheduler is scheduler and scheduler.__dict__.keys() == before.keys()
    assert "forward" not in pipe.transformer.head.__dict__
    pipe.to(accel=None)
    assert torch.equal(plain, call(pipe, num_inference_steps=4, num_head_steps=9))


def test_it_stacks_with_reuse_of_the_trunk(pipe):
    call(pipe.to(accel=["disa", "reuse"]))
    report = pipe.accel.report
    assert report.evaluated == 32 and report.counts["head"].evaluated == 1681


# hosts that opt in by one method


class CellScheduler(FlowMatchEulerDiscreteScheduler):
    """The scheduler of an autoregressive flow: all that it takes to opt in."""

    def head_steps(self, step):
        return 50


class CellModel(ModelMixin, ConfigMixin):
    """The velocity of cells whose values are known, as in xAR the whole network."""

    @register_to_config
    def __init__(self, spread: float = 0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, sample, timestep, clean):
        t, s = timestep / 1000, self.config.spread
        mean = self.weight * (clean.mean(1, keepdim=True) + 1)  # the next cell follows from those before
        total = ((1 - t) * s) ** 2 + t**2
        noise = t * (sample - (1 - t) * mean) / total
        return noise - (mean + s**2 * (1 - t) * (sample - (1 - t) * mean) / total)


class CellPipeline(DiffusionPipeline):
    """Four cells, or scales, one after the other."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, drawn, generator=None):
        cells = torch.zeros(2, 1)
        for k, size in enumerate(drawn):
            self.scheduler.set_timesteps(self.scheduler.head_steps(ARStep(k, tuple(drawn))))
            cell = torch.randn(2, size, generator=generator)
            for t in self.scheduler.timesteps:
                velocity = self.transformer(cell, t, cells)
                cell = self.scheduler.step(velocity, t, cell).prev_sample
            cells = torch.cat([cells, cell], 1)
        return cells[:, 1:]


@pytest.mark.parametrize(
    ("drawn", "preset", "expected"),
    [((16,) * 4, "xar", 129), ((1, 4, 16, 64, 256), "flowar-h", 161), ((1, 4, 16, 64, 256), "flowar", 99)],
)
def test_a_host_opts_in_by_one_method(drawn, preset, expected):
    """Cells like those of xAR, and scales like those of FlowAR; certain tokens come out the same."""
    pipe = CellPipeline(CellModel(), CellScheduler())
    plain = pipe(drawn, seeded())
    annealed = pipe.to(accel=f"disa:{preset}")(drawn, seeded())
    report = pipe.accel.report
    assert report.counts["head"].requested == 50 * len(drawn)
    assert report.counts["head"].evaluated == report.evaluated == report.updates == expected
    assert torch.allclose(plain, annealed, rtol=1e-5, atol=1e-5)
    wide = CellPipeline(CellModel(0.5), CellScheduler())
    assert not torch.allclose(wide(drawn, seeded()), wide.to(accel="disa")(drawn, seeded()), atol=1e-3)


# wrong use


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"lower": 60}, "lower=60 is above upper=50"),
        ({"upper": 4}, "lower=5 is above upper=4"),
        ({"lower": 1}, r"lower=1 is outside \[2, inf\]"),
        ({"upper": 1, "lower": 1}, "outside"),
        ({"kind": "square"}, "kind='square' is none of 'linear'"),
        ({"by": "time"}, "by='time' is none of 'ar_step', 'tokens'"),
        ({"tolerance": -0.1}, "tolerance=-0.1 is outside"),
        ({"steps": 3}, "no option 'steps'"),
    ],
)
def test_wrong_options(pipe, spec, words):
    with pytest.raises(OptionError, match=words):
        pipe.to(accel={"disa": spec})
    assert not hasattr(pipe, "accel")


def test_wrong_pipelines(pipe):
    with pytest.raises(UnsupportedPipeline, match="no autoregressive steps; DDIMScheduler has no method"):
        fresh("dit").to(accel="disa")
    with pytest.raises(UnsupportedPipeline, match="CellScheduler has no method step_error"):
        CellPipeline(CellModel(), CellScheduler()).to(accel="disa:auto")
    with pytest.raises(UnknownAccelerator, match="no preset 'marr'; did you mean 'mar'"):
        pipe.to(accel="disa:marr")
    with pytest.raises(AcceleratorConflict, match="both of the kind 'solver'"):
        pipe.to(accel=["disa", "s3"])
    with pytest.raises(UnsupportedPipeline, match="MARScheduler has noise levels that are not known"):
        pipe.to(accel="sada")

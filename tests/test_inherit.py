"""Feature inheritance: the card's acceptance checks 1 to 12, and every family."""

import itertools
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from tiny_pipelines import TINY, fresh, normal, run
from torch import nn

from diffaccel import Accelerator, accelerate
from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.eval.cost import count_flops, flops_by_module
from diffaccel.pipelines import BlockCall
from diffaccel.pipelines.dataflow import Flow, Needed
from diffaccel.pipelines.features import Features
from diffaccel.pipelines.inheritance import computed_steps


def inherit(**options):
    return {"inherit": {"warmup": 1, "cooldown": 0, **options}}


def relative(one, other):
    return float((one - other).norm() / other.norm())


CASES = [("layer", name) for name in TINY]
CASES += [("block", name) for name in ("sd", "sdxl", "ddim", "sd_controlnet")]  # elsewhere layers are blocks
CASES += [("unit", name) for name in ("sd", "dit", "sd3", "flux_true_cfg", "sana", "wan", "hunyuan_video")]


@pytest.mark.parametrize(("level", "name"), CASES)
def test_every_family(level, name):
    """Check 1, and that all of them inherit when they should, and only then."""
    case, pipe = TINY[name], fresh(name)
    plain = run(case, pipe, 6)
    assert torch.equal(run(case, pipe.to(accel=inherit(level=level, every=1)), 6), plain)
    assert not pipe.accel.report.actions
    fast = run(case, pipe.to(accel=inherit(level=level, every=2)), 6)
    actions, updates = pipe.accel.report.actions, case.updates(6)
    steps = {1, 5} if name == "wan22" else set(range(1, updates, 2))  # its second network begins at step 3
    assert {action.step for action in actions} == steps and {a.what for a in actions} == {"inherit"}
    assert len(actions) == len(steps) * case.calls_per_step * (1 + (name == "sd_controlnet"))
    assert pipe.accel.report.skipped == 0
    assert torch.isfinite(fast).all() and 0 < relative(fast, plain) < 0.6


class Still(Accelerator):
    """Has the denoisers see at every step what they saw at the first, and keeps what they say."""

    exclusive = "skip"

    def evaluate(self, call, proceed):
        first = self.first.setdefault((call.network, call.branch), call)
        output = proceed(replace(call, args=first.args, kwargs=first.kwargs))
        if call.network != "controlnet":
            self.outputs.setdefault((call.network, call.branch), []).append(output[0][0].clone())
        return output


STILL = [(name, {}) for name in ("sd", "sd_controlnet", "ddim", "dit", "sd3", "flux_true_cfg", "sana")]
STILL += [(name, {"level": "unit"}) for name in ("sd", "sd3", "flux_true_cfg")]
STILL += [(name, {"order": 1}) for name in ("sd", "dit")]
STILL += [("sd", {"level": "block"}), ("sd", {"modules": "mid_block *downsamplers* up_blocks.0.resnets.1"})]
STILL += [("sd3", {"modules": "*_blocks.0"})]


@pytest.mark.parametrize(("name", "options"), STILL, ids=str)
def test_the_same_input_gives_the_same_output(name, options):
    """Check 3; what a transformer's block adds to its input is rounded once more."""
    case, pipe, still = TINY[name], fresh(name), Still()
    still.first, still.outputs = {}, {}
    run(case, accelerate(pipe, [still, inherit(every=2, **options)]), 6)
    assert [a for a in pipe.accel.report.actions if a.step == 1 and a.network != "controlnet"]
    exact = options.get("level") == "unit" or "unet" in case.denoisers
    for outputs in still.outputs.values():
        for output in outputs[1:]:
            tolerance = 0 if exact else 3e-6 * float(outputs[0].abs().max())
            torch.testing.assert_close(output, outputs[0], atol=tolerance, rtol=0)


def deep_unet():
    """The card's U-Net with three blocks."""
    torch.manual_seed(0)
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=8, down_block_types=down, up_block_types=up,
    ).eval()  # fmt: skip


def deep():
    pipe = fresh("sd")
    pipe.unet = deep_unet()
    return pipe


def leaf_calls(pipe, steps):
    """How often linear and convolutional layers of the U-Net run."""
    calls: list = []
    leaves = [m for m in pipe.unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    hooks = [leaf.register_forward_hook(lambda *args: calls.append(1)) for leaf in leaves]
    pipe("a bag", num_inference_steps=steps, output_type="latent", height=16, width=16)
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_calls_are_those_of_deepcache():
    """Check 4: ceil(T / N) full calls, and the card's counts of what runs in them and in the others."""
    pipe = deep()
    assert leaf_calls(pipe, 20) == 4020
    for every, expected in ((2, 2210), (3, 1667), (5, 1124)):
        assert leaf_calls(pipe.to(accel=inherit(every=every)), 20) == expected
        inherited = [action.step for action in pipe.accel.report.actions]
        assert 20 - len(inherited) == -(-20 // every)
        assert not {step for step in inherited if step % every == 0}


def cost(pipe, steps):
    """The floating-point operations of the denoiser."""
    network = next(getattr(pipe, n) for n in ("unet", "transformer") if hasattr(pipe, n))
    call = {} if not hasattr(pipe, "tokenizer") else {"prompt": "a bag", "output_type": "latent"}
    call |= {"height": 16, "width": 16} if hasattr(network, "down_blocks") else {}
    call |= {"class_labels": [1], "output_type": "np"} if isinstance(pipe, diffusers.DiTPipeline) else {}
    counts = flops_by_module(lambda: pipe(num_inference_steps=steps, **call))
    return counts[type(network).__name__], counts


def test_more_outer_layers_cost_more_and_err_less():
    """Check 5."""
    pipe, call = deep(), {"height": 16, "width": 16, "prompt": ["a bag"] * 2}
    plain = run(TINY["sd"], pipe, 12, **call)
    errors, costs = [], []
    for outer in (1, 3, 6, 8):
        pipe.to(accel=inherit(every=3, outer=outer))
        errors.append(relative(run(TINY["sd"], pipe, 12, **call), plain))
        costs.append(cost(pipe, 3)[0])
    assert costs == sorted(costs) and len(set(costs)) == 4
    assert all(later <= 1.05 * error for error, later in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]
    with pytest.raises(UnsupportedPipeline, match="nothing is left"):
        pipe.to(accel=inherit(outer=11))


class Bend(nn.Module):
    """A small smooth network."""

    def __init__(self):
        super().__init__()
        self.inner = (
            nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)).double().requires_grad_(False)
        )

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(("order", "slope"), [(0, 1), (1, 2)])
def test_features_err_with_the_order_of_the_step_size(order, slope):
    """Check 6, on the trajectory (cos t, sin t, t, 1)."""
    torch.manual_seed(0)
    module, errors = Bend(), []
    for steps in (30, 60, 120, 240):
        features = Features(None, {"g"}, (), order)
        worst = 0.0
        for step in range(steps):
            t = torch.tensor(step / steps, dtype=torch.float64)
            x = torch.stack([t.cos(), t.sin(), t, torch.ones_like(t)])
            call = BlockCall(None, module, (x,), {}, step, 0)
            if step % 3 == 0:
                features._kept("g", call, lambda call: module(*call.args))
            elif step > 6:
                worst = max(worst, float((features._inherited("g", call) - module(x)).norm()))
        errors.append(worst)
    slopes = np.diff(np.log2(errors))
    assert slopes == pytest.approx(-slope * np.ones(3), abs=0.2 if order == 0 else 0.3)


class LinearUNet(ModelMixin, ConfigMixin):
    """The card's U-Net of 1x1 convolutions."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=3, width=5):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, width, 1)
        self.down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.mid_block = nn.Conv2d(width, width, 1)
        self.up_blocks = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(2))
        self.conv_out = nn.Conv2d(width, in_channels, 1)

    def forward(self, sample, timestep, return_dict=True):
        first = self.down_blocks[0](self.conv_in(sample))
        second = self.down_blocks[1](first)
        self.main = self.up_blocks[0](torch.cat([self.mid_block(second), second], 1))
        return UNet2DOutput(self.conv_out(self.up_blocks[1](torch.cat([self.main, first], 1))))


class Seen(Accelerator):
    """Keeps what the denoiser gets and says."""

    exclusive = "skip"

    def evaluate(self, call, proceed):
        output = proceed(call)
        self.seen.append((call.sample.clone(), output[0].clone()))
        return output


def test_a_linear_network_errs_by_what_it_has_inherited():
    """Check 7."""
    torch.manual_seed(0)
    network, seen = LinearUNet().eval().requires_grad_(False), Seen()
    pipe, seen.seen = DDIMPipeline(network, DDIMScheduler()), []
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, [seen, inherit(every=3)])
    pipe(batch_size=2, num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="pt")
    full = []
    for sample, output in seen.seen:
        full.append((network(sample, 0).sample, network.main))
        step = len(full) - 1
        stale = network.main - full[step - step % 3][1]
        weight = network.up_blocks[1].weight[:, :5]
        wrong = torch.einsum("oc,bchw->bohw", (network.conv_out.weight[..., 0, 0] @ weight[..., 0, 0]), stale)
        torch.testing.assert_close(output, full[step][0] - wrong, atol=1e-6, rtol=1e-5)
        assert (wrong.norm() > 1e-2) == (step % 3 > 0)


@pytest.mark.parametrize(
    ("name", "level"),
    [("sd", "layer"), ("sd", "block"), ("sd", "unit"), ("sd_controlnet", "layer"), ("ddim", "layer")],
)
def test_what_feeds_only_those_that_inherit_makes_no_difference(name, level, monkeypatch):
    """Check 8: nothing is changed by leaving it out, but for the cost."""
    case, pipe = TINY[name], fresh(name).to(accel=inherit(level=level, every=3))
    results, costs = [], []
    for _ in range(2):
        costs.append(count_flops(lambda: results.append(run(case, pipe, 6))))
        monkeypatch.setattr(Flow, "needed", lambda self, *args: Needed(frozenset(self.shapes), True))
    assert torch.equal(*results)
    assert costs[0] < costs[1] or (level == "unit" and costs[0] == costs[1])


def test_runs_of_other_shapes_are_as_if_they_were_the_first():
    """Check 9."""
    case, pipe = TINY["sd"], fresh("sd").to(accel="inherit")
    others = ({}, {"height": 64, "width": 32}, {"prompt": ["a bag"] * 3}, {"guidance_scale": 1.0}, {})
    for other in others:
        assert torch.equal(
            run(case, pipe, 5, **other), run(case, fresh("sd").to(accel="inherit"), 5, **other)
        )


def test_steps_around_a_center():
    """Check 10; the card's list for the script of Stable Diffusion 1.5."""
    assert computed_steps(50, 5, 1.4, 0.3) == [0, 6, 11, 14, 15, 19, 24, 29, 35, 42]
    assert computed_steps(20, 3) == [0, 3, 6, 9, 12, 15, 18]
    for total, every, power, center in (
        (50, 2, 3.0, 0.5),
        (20, 3, 1.4, 0.0),
        (7, 7, 2.0, 1.0),
        (9, 1, 9.0, 0.2),
    ):
        steps = computed_steps(total, every, power, center)
        assert len(steps) == len(set(steps)) == -(-total // every) and steps == sorted(steps)
        assert steps[0] == 0 and steps[-1] < total
    gaps = np.diff(computed_steps(1000, 20, 1.6, 0.4))
    closest = computed_steps(1000, 20, 1.6, 0.4)[int(gaps.argmin())]
    assert abs(closest - 400) < 30 and gaps[0] > 2 * gaps.min() and gaps[-1] > 2 * gaps.min()
    with pytest.raises(OptionError):
        computed_steps(10, 0)
    pipe = fresh("sd").to(accel=inherit(every=5, power=1.4, center=0.3, warmup=1, cooldown=2))
    run(TINY["sd"], pipe, 50)
    inherited = {action.step for action in pipe.accel.report.actions}
    assert set(range(50)) - inherited == {0, 6, 11, 14, 15, 19, 24, 29, 35, 42, 48, 49}
    run(TINY["sd"], pipe.to(accel=inherit(every=3, warmup=3)), 10)
    assert [action.step for action in pipe.accel.report.actions] == [3, 4, 6, 7, 9]


def test_a_controlnet_of_no_weight_is_none():
    """Check 11."""
    case, pipe = TINY["sd_controlnet"], fresh("sd_controlnet").to(accel="inherit")
    with_it = run(case, pipe, 6, controlnet_conditioning_scale=0.0)
    counts = pipe.accel.report.counts
    assert counts["controlnet"].evaluated == counts["unet"].evaluated == 6
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    alone = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    alone.set_progress_bar_config(disable=True)
    call = {key: value for key, value in case.call.items() if key != "image"}
    without = run(replace(case, call=call), alone.to(accel="inherit"), 6)
    torch.testing.assert_close(with_it, without, atol=1e-5, rtol=1e-4)


OMITTED = [("dit", {}, 3), ("dit", {"level": "unit", "outer": 0, "modules": "*.attn1"}, 6), ("sd3", {}, 3),
           ("flux_true_cfg", {}, 18)]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "expected"), OMITTED, ids=str)
def test_calls_that_are_omitted_are_counted(name, options, expected):
    """Three of six steps: a block of two, two units, a block of two, three of four in two evaluations."""
    pipe, ran = fresh(name).to(accel=inherit(every=2, **options)), []
    kinds = ("attn1",) if name == "dit" else ("attn",)
    for part, module in pipe.transformer.named_modules():
        if part.endswith(kinds):
            module.register_forward_hook(lambda module, args, output, part=part: ran.append(part))
    run(TINY[name], pipe, 6)
    report = pipe.accel.report
    assert report.omitted == report.to_dict()["omitted"] == expected
    assert f", {expected} calls of modules omitted" in str(report)
    if not options:  # a hook sees what inherits by itself as called
        assert len(ran) == len(set(ran)) * 6 * TINY[name].calls_per_step - expected
    run(TINY[name], pipe.to(accel=inherit(every=1)), 6)
    assert pipe.accel.report.omitted == 0 and "omitted" not in str(pipe.accel.report)


def test_calls_that_are_omitted_in_a_controlnet():
    """They are those of its network, and none of the denoiser's."""
    pipe = fresh("sd_controlnet").to(accel=inherit(every=2))
    run(TINY["sd_controlnet"], pipe, 6)
    counts, report = pipe.accel.report.counts, pipe.accel.report.to_dict()
    assert counts["controlnet"].omitted > 0 and report["omitted"] == counts["unet"].omitted > 0
    assert report["networks"]["controlnet"]["omitted"] == counts["controlnet"].omitted


def test_features_are_not_written_to():
    """Check 11: FreeU writes into what up-blocks get."""
    case, pipe, still = TINY["sd"], fresh("sd"), Still()
    pipe.enable_freeu(0.5, 0.6, 1.3, 1.4)
    still.first, still.outputs = {}, {}
    run(case, accelerate(pipe, [still, inherit(every=4, modules="mid_block up_blocks.0.attentions.0")]), 4)
    (outputs,) = still.outputs.values()
    assert all(torch.equal(output, outputs[0]) for output in outputs)


class Ways(diffusers.DiffusionPipeline):
    """Calls the network as it is told to."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, way):
        self.scheduler.set_timesteps(6)
        x = normal(2, 3, 16, 16)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(way(self.unet, x, t), t, x).prev_sample
        return x


def test_timesteps_are_given_in_any_way():
    """Check 12; a one-element tuple stays one."""
    ways = [
        lambda net, x, t: net(x, t, return_dict=False)[0],
        lambda net, x, t: net(sample=x, timestep=int(t)).sample,
        lambda net, x, t: net(x, timestep=t.expand(2)).sample,
        lambda net, x, t: net(x, t[None]).sample,
    ]
    pipe = Ways(fresh("ddim").unet, DDIMScheduler())
    plain = pipe(ways[0])
    pipe.to(accel="inherit")
    results = [pipe(way) for way in ways]
    assert all(torch.equal(result, results[0]) for result in results) and not torch.equal(results[0], plain)


@pytest.mark.parametrize("name", ["sd", "dit", "sd_controlnet"])
def test_nothing_is_watched_or_kept_where_no_later_step_inherits(name, monkeypatch):
    case, pipe = TINY[name], fresh(name)
    plain, kept = run(case, pipe, 4), []
    own = Features._kept
    monkeypatch.setattr(Features, "_kept", lambda self, part, call, proceed: (
        kept.append(call.step), own(self, part, call, proceed))[1])  # fmt: skip
    assert torch.equal(run(case, pipe.to(accel=inherit(warmup=case.updates(4), cooldown=1)), 4), plain)
    assert kept == []
    pipe.to(accel=inherit(warmup=2, every=2, cooldown=1))
    run(case, pipe, 4)
    steps = {action.step for action in pipe.accel.report.actions}
    assert set(kept) == set(range(max(steps))) and max(steps) < case.updates(4) - 1

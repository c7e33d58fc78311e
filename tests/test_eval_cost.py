"""What a run costs: operations against arithmetic, calls of real pipelines, memory, bootstrap intervals."""

import math
import statistics
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from tiny_pipelines import TINY
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffaccel import accelerate
from diffaccel.errors import OptionError
from diffaccel.eval.cost import (
    Timing,
    bootstrap_ci,
    count_calls,
    count_flops,
    interleave,
    order_of,
    peak_memory,
)

CPU = torch.device("cpu")
MB = 2**20


def test_abba():
    seen = []
    interleave([lambda: "a", lambda: "b"], 4, lambda turn, position, result: seen.append(result))
    assert "".join(seen) == "abbabaab"
    for count in (2, 3):  # a drift of the machine hits all alike
        places = [[order_of(turn, count).index(task) + count * turn for turn in range(2 * count)]
                  for task in range(count)]  # fmt: skip
        assert len({sum(times) for times in places}) == 1


@pytest.mark.parametrize(("law", "statistic", "truth"), [
    ("exponential", statistics.median, math.log(2)),
    ("exponential", statistics.fmean, 1.0),
    ("standard_normal", statistics.median, 0.0),
])  # fmt: skip
def test_bootstrap_covers(law, statistic, truth, monkeypatch):
    monkeypatch.setattr("diffaccel.eval.cost.DRAWS", 300)
    generator = np.random.default_rng(0)
    held = 0
    for repeat in range(200):
        low, high = bootstrap_ci(getattr(generator, law)(size=40).tolist(), statistic, seed=repeat)
        held += low <= truth <= high
    assert 0.90 <= held / 200 <= 0.985


def test_interval():
    values = tuple(np.random.default_rng(1).exponential(size=15).tolist())
    timing = Timing(values)
    low, high = timing.interval
    assert min(values) <= low < timing.median < high <= max(values)
    assert timing.interval == timing.interval, "the same draws each time"
    assert Timing((3.0,)).interval == (3.0, 3.0)
    wide, narrow = bootstrap_ci(values, level=0.99), bootstrap_ci(values, level=0.5)
    assert wide[0] <= low <= narrow[0] <= narrow[1] <= high <= wide[1]
    shifted = bootstrap_ci([2 * value + 1 for value in values])
    assert shifted == pytest.approx((2 * low + 1, 2 * high + 1))
    for bad in (partial(bootstrap_ci, []), partial(bootstrap_ci, [1.0], level=1)):
        with pytest.raises(OptionError, match="expected at least 1"):
            bad()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_twice_the_products(device):
    make = partial(torch.empty, device=device)
    linear = nn.Linear(8, 16, device=device)
    assert count_flops(lambda: linear(make(4, 5, 8))) == 2 * (4 * 5 * 8 * 16)
    convolution = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, device=device)
    assert count_flops(lambda: convolution(make(2, 6, 10, 12))) == 2 * (2 * 8 * 5 * 6 * (6 // 2) * 9)
    q, k, v = make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 4)
    products = 2 * 3 * 5 * 7 * (8 + 4)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * products
    mask = torch.zeros(5, 7, device=device)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v, mask)) == 2 * products


def test_plain_counter_misses_attention_on_cpu():
    q = torch.randn(1, 2, 5, 8)
    attend = partial(F.scaled_dot_product_attention, q, q, q)
    with FlopCounterMode(display=False) as counter:
        attend()
    found = counter.get_total_flops()
    assert found in (0, count_flops(attend)), "0 as far as torch 2.14; later ones may know it"


WIDTH, TOKENS = 16, 16


def tiny_dit(device="cpu"):
    with torch.device(device):
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
            sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        ).eval()  # fmt: skip


def dit_products(layers=2, d=WIDTH, n=TOKENS):
    """Multiplications of one image: patches, blocks, head; the network embeds its time in each block."""
    time = 256 * d + d * d
    block = n * (4 * d * d + 8 * d * d) + 2 * n * n * d + 6 * d * d + time
    return n * 16 * d + layers * block + time + 2 * d * d + n * d * 16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_of_a_transformer(device):
    model = tiny_dit(device)
    x = torch.randn(3, 4, 8, 8, device=device)
    steps, labels = torch.full((3,), 7, device=device), torch.zeros(3, dtype=torch.long, device=device)
    with torch.no_grad():
        assert count_flops(lambda: model(x, timestep=steps, class_labels=labels)) == 2 * 3 * dit_products()


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_flops_of_a_compiled_module():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 8)
    with torch.no_grad():
        compiled(x)
        assert count_flops(lambda: compiled(x)) == count_flops(lambda: model(x)) == 2 * 2 * 4 * 8 * 32


@pytest.mark.parametrize("name", ["dit", "sd", "ddim", "sd3", "flux"])
def test_calls_of_pipelines(name):
    case = TINY[name]
    pipe = case.build()
    denoiser = getattr(pipe, case.denoisers[-1])
    with count_calls(denoiser) as counted:
        images = pipe(**case.call, num_inference_steps=4)[0]
    doubled = 2 if case.guided == "stacked" else 1
    assert counted.calls == 4 * case.calls_per_step
    assert counted.per_image(len(images)) == 4 * doubled * case.calls_per_step
    pipe(**case.call, num_inference_steps=1)
    assert counted.calls == 4 * case.calls_per_step and not denoiser._forward_pre_hooks, "the hook is gone"


def test_doubled_batch_is_two_rows_an_image():
    model = tiny_dit()
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    x = torch.randn(3, 4, 8, 8)
    labels = torch.arange(6)
    with torch.no_grad(), count_calls(model) as counted:
        for step in scheduler.timesteps:
            output = model(torch.cat([x, x]), timestep=step.expand(6), class_labels=labels).sample
            first, second = output.chunk(2)
            x = scheduler.step(second + 2 * (first - second), step, x).prev_sample
    assert (counted.calls, counted.rows, counted.per_image(3)) == (5, 30, 10)


def test_rows_of_any_call():
    class Named(nn.Module):
        def forward(self, sample=None, hidden_states=None, t=None, x=None):
            return 0

    module, five = Named(), torch.zeros(5, 2)
    for args, kwargs in (
        ((five,), {}),
        ((), {"sample": five}),
        ((), {"t": torch.zeros(1), "hidden_states": five}),
        (([five] * 5,), {"t": torch.zeros(1)}),  # images of different size, as Z-Image takes them
        ((), {"x": five}),
    ):
        with count_calls(module) as counted:
            module(*args, **kwargs)
        assert (counted.calls, counted.rows) == (1, 5)
    with pytest.raises(OptionError, match="without an input"), count_calls(module):
        module()
    assert not module._forward_pre_hooks


def test_calls_of_a_compiled_module_and_an_accelerated_pipeline():
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), count_calls(compiled) as counted:
        for size in (2, 3, 3):
            compiled(torch.zeros(size, 4))
    assert (counted.calls, counted.rows) == (3, 8)
    pipe = TINY["ddim"].build()
    accelerate(pipe, "reuse")
    with count_calls(pipe.unet) as counted:
        pipe(**TINY["ddim"].call, num_inference_steps=4)
    assert counted.calls == 4, "entered in all steps, though two are not computed"


def test_peak_memory():
    def task(size):
        parts = [torch.ones(size * MB // 4) for _ in range(2)]
        return float(sum(part[0] for part in parts))

    task(1)
    for size in (24, 60, 24):  # an earlier higher peak is forgotten
        result, memory = peak_memory(partial(task, size), CPU)
        assert result == 2 and memory.reserved is None
        if memory.source == "VmHWM":
            assert memory.growth / MB == pytest.approx(2 * size, abs=6)
    assert memory.peak >= memory.before > 20 * MB
    with pytest.raises(OptionError, match="meta"):
        peak_memory(lambda: None, torch.device("meta"))


def test_peak_memory_without_proc(monkeypatch):
    monkeypatch.setattr("diffaccel.eval.cost._reset_peak", lambda: False)
    result, memory = peak_memory(lambda: 7, CPU)
    assert result == 7 and memory.source == "ru_maxrss" and memory.growth < 5 * MB < memory.peak

"""SlimFlow: annealed noise, schedules, two-step targets, and the toy of the card."""

import math

import pytest
import ring
import torch
from torch import nn

from diffaccel.distill.draws import Draws
from diffaccel.distill.premetrics import L2, PerceptualHuber, PseudoHuber
from diffaccel.distill.reflow import euler, flow_loss
from diffaccel.distill.slimflow import (
    FIRST_STEPS,
    SCHEDULES,
    anneal,
    annealed_noise,
    coupling_at,
    distill_loss,
    flip,
    middle_times,
    two_step_loss,
    two_step_target,
)
from diffaccel.errors import OptionError

POINT = torch.tensor([0.3, -1.2])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def to_point(x, t):
    """The field of data that are one point: constant along its paths."""
    return (x - POINT.to(x)) / t[:, None]


def curved(x, t):
    return x.sin() + t[:, None] * x.flip(1)


# ---------------------------------------------------------------- annealing


@pytest.mark.parametrize("b", [0.0, 0.5, 1.0])
def test_annealed_noise_is_normal(b):
    """Check 1 of the card, with 200k draws."""
    noise, fresh = normal(100_000, 2), normal(100_000, 2, seed=1)
    found = annealed_noise(noise, fresh, b)
    assert found.std() == pytest.approx(1, abs=0.005)
    assert (found * noise).mean() == pytest.approx(math.sqrt(1 - b * b), abs=0.01)
    assert annealed_noise(noise.bfloat16(), fresh, b).dtype == torch.float64
    assert annealed_noise(noise.bfloat16(), fresh.bfloat16(), b).dtype == torch.float32


def test_the_ends_of_annealing_are_known_losses():
    """Check 2 of the card: bit by bit the 1-RF loss of shuffled noise at b = 1, and reflow at b = 0."""
    x0, noise, t = normal(32, 2), normal(32, 2, seed=1), torch.rand(32)
    other = noise[torch.randperm(32, generator=torch.Generator().manual_seed(2))]
    for b, same in ((1.0, other), (0.0, noise)):
        found = flow_loss(curved, x0, annealed_noise(noise, other, b), t, coupling=coupling_at(b))
        assert torch.equal(found, flow_loss(curved, x0, same, t, coupling="independent"))
    assert [coupling_at(b) for b in (0.0, 1e-9, 1.0)] == ["paired", "independent", "independent"]
    with pytest.raises(OptionError, match="not the mean"):
        flow_loss(curved, x0, noise, t, PseudoHuber(), coupling=coupling_at(0.1))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(OptionError):
            annealed_noise(noise, other, wrong)


def test_schedules():
    """Check 3 of the card, in images."""
    length = 5_000
    assert [anneal(k, length) for k in (0, length, 2 * length)] == [1, 0, 0]
    assert anneal(length // 2, length, "cos") == pytest.approx(0.5) and anneal(length, length, "cos") == 0
    assert anneal(length, length, "exp") == pytest.approx(math.exp(-1))
    for name in SCHEDULES:
        values = [anneal(k, length, name) for k in range(0, 4 * length, 50)]
        assert all(1 >= a >= b >= 0 for a, b in zip(values, [*values[1:], 0], strict=True))
        assert anneal(0, length, name) == (name != "constant") and anneal(10, 0, name) == 0
    for wrong in ((1, 2, "cosine"), (-1, 2), (1, -2)):
        with pytest.raises(OptionError):
            anneal(*wrong)


# ---------------------------------------------------------------- two steps


@pytest.mark.parametrize("first_step", FIRST_STEPS)
def test_two_steps_of_a_straight_field_are_one(first_step):
    """Check 4 of the card."""
    noise, ones = normal(64, 2), torch.ones(64, dtype=torch.float64)
    for s in (1e-6, 0.2, 0.5, 0.8, 1 - 1e-6):
        target = two_step_target(to_point(noise, ones), to_point, noise, ones * s)
        assert (target - POINT).abs().max() < 1e-6
        loss = two_step_loss(to_point, to_point, noise, ones * s, first_step=first_step)
        assert loss.shape == (64,) and loss.max() < 1e-12


def test_two_step_targets_are_their_formula():
    """And its limits: one step of the first velocity as s goes to 0, of the flow as it goes to 1."""
    noise, first, ones = normal(64, 2), normal(64, 2, seed=1), torch.ones(64, dtype=torch.float64)
    s = torch.linspace(0.1, 0.9, 64, dtype=torch.float64)
    x_s = noise - (1 - s)[:, None] * first
    expected = noise - (1 - s)[:, None] * first - s[:, None] * curved(x_s, s)
    assert torch.allclose(two_step_target(first, curved, noise, s), expected, atol=1e-12)
    assert (two_step_target(first, curved, noise, 1e-9 * ones) - (noise - first)).abs().max() < 1e-7
    flow = curved(noise, ones)
    for a in (first, flow):
        assert (two_step_target(a, curved, noise, (1 - 1e-9) * ones) - (noise - flow)).abs().max() < 1e-7
    assert two_step_target(first.float(), curved, noise.float(), s.float()).dtype == torch.float32


@pytest.mark.parametrize(("first_step", "frozen"), [("practice", 1), ("paper", 2)])
def test_gradients_reach_the_student_once(first_step, frozen):
    """Check 5 of the card: the loss is that of a constant target; one evaluation of the student."""
    noise, s, calls = normal(16, 2), torch.full((16,), 0.4).double(), []
    student, flow = ring.Networks(0, 1, 8).double(), ring.Networks(1, 1, 8).double()

    def counted(name, network):
        def velocity(x, t):
            calls.append((name, torch.is_grad_enabled()))
            return network(x, t)

        return velocity

    two_step_loss(
        counted("student", student), counted("flow", flow), noise, s, first_step=first_step
    ).mean().backward()
    assert calls == [("student", True)] + frozen * [("flow", False)]
    assert all(part.grad is None for part in flow.parameters())
    found = [part.grad.clone() for part in student.parameters()]
    student.zero_grad()
    ones = torch.ones(16, dtype=torch.float64)
    own = student(noise, ones)
    first = (own if first_step == "practice" else flow(noise, ones)).detach()
    target = two_step_target(first, flow, noise, s)
    (noise - own - target).square().mean().backward()
    for mine, part in zip(found, student.parameters(), strict=True):
        assert torch.allclose(mine, part.grad, rtol=1e-9, atol=1e-12)


def test_one_step_losses_are_distances_of_samples():
    """L2 of x0_hat = noise - velocity; of the perceptual premetrics LPIPS alone is left at t = 1."""
    x0, noise, ones = normal(8, 2), normal(8, 2, seed=1), torch.ones(8, dtype=torch.float64)
    x_hat = noise - curved(noise, ones)
    assert torch.allclose(distill_loss(curved, x0, noise), (x_hat - x0).square().mean(1))
    lpips = PerceptualHuber(lambda a, b: (a - b).abs().sum(1), per_time=True)
    assert torch.allclose(distill_loss(curved, x0, noise, lpips), (x_hat - x0).abs().sum(1))
    s = torch.full((8,), 0.5)
    target = two_step_target(curved(noise, ones), curved, noise, s)
    for metric, expected in (
        (L2(), (x_hat - target).square().mean(1)),
        (lpips, (x_hat - target).abs().sum(1)),
    ):
        assert torch.allclose(two_step_loss(curved, curved, noise, s, metric), expected)


def test_middle_times():
    draws = [Draws(0, range(2000), "s") for _ in FIRST_STEPS]
    for found, (rule, (low, high)) in zip(draws, FIRST_STEPS.items(), strict=True):
        s = middle_times(found, rule)
        assert s.shape == (2000,) and low <= s.min() < low + 0.01 and high - 0.01 < s.max() <= high
        assert s.mean() == pytest.approx(0.5, abs=0.02)
    for wrong in (lambda: middle_times(draws[0], "code"), lambda: two_step_loss(
            curved, curved, normal(2, 2), torch.ones(2), first_step="code")):  # fmt: skip
        with pytest.raises(OptionError, match="no first step"):
            wrong()


# ---------------------------------------------------------------- mirrored pairs


class Mirror(nn.Module):
    """A network of which mirroring the input mirrors the output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()

    def forward(self, x, t):
        return self.conv(x) + self.conv(x.flip(-1)).flip(-1) + t.view(-1, 1, 1, 1).to(x)


def test_mirrored_pairs():
    """Check 6 of the card: the loss is the same, and each sample is mirrored or not."""
    x0, noise, t = normal(64, 3, 8, 8), normal(64, 3, 8, 8, seed=1), torch.rand(64).double()
    flags = Draws(0, range(64), "flip").integers(2) > 0
    assert flags.float().mean() == pytest.approx(0.5, abs=0.2)
    mirrored_x0, mirrored = flip(flags, x0, noise)
    for one, before, after in zip(flags, x0, mirrored_x0, strict=True):
        assert torch.equal(after, before.flip(-1) if one else before)
    network = Mirror()
    plain = flow_loss(network, x0, noise, t, coupling="paired")
    assert torch.allclose(flow_loss(network, mirrored_x0, mirrored, t, coupling="paired"), plain, atol=1e-6)
    halves = flow_loss(network, mirrored_x0, noise, t, coupling="paired")
    assert (halves - plain)[flags].abs().median() > 0.01 * plain.mean(), "a sample alone must not be mirrored"
    assert torch.equal(*flip(flags, *flip(flags, x0)), x0)


# ---------------------------------------------------------------- the toy of the card


@pytest.mark.slow
def test_toy():
    """Check 7 of the card, in 3000 + 1500 updates; benchmarks/flow_toys.py makes its 4000 + 2000.

    Three seeds gave: 1000 ED of 10 to 15 annealed and 58 to 62 switched, a ratio of 0.16 to 0.25; errors of
    0.129 to 0.155 with two steps of practice, 0.52 to 0.56 of the flow's, and 0.164 to 0.186 of the paper.
    """
    coupled, (noise, x0), real = ring.pairs(4000, 100), ring.pairs(2048, 200), ring.data(4096, 300)
    noise, x0, real = noise.float(), x0.float(), real.float()
    flows = ring.slim_flows(0, coupled, 3000)
    students = ring.slim_students(flows.part(1), 0, coupled, 1500, batch=256)
    one = {name: [euler(found.part(place), noise, 1) for place in range(3)]
           for name, found in (("flows", flows), ("students", students))}  # fmt: skip
    scratch, annealed, switched = (ring.energy_distance(found, real) for found in one["flows"])
    assert annealed < 0.3 * switched and scratch < switched / 5, (scratch, annealed, switched)
    naive, practice, paper = (ring.rmse(found, x0) for found in one["students"])
    before = ring.rmse(one["flows"][1], x0)
    assert practice < 0.65 * before and practice < paper and naive < paper, (before, naive, practice, paper)

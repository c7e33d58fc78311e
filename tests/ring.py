"""The toy of the flow cards: 8 modes on a ring, the exact field, its map, and small networks side by side."""

import itertools
import math
from functools import partial

import torch
from torch import nn

from diffaccel.distill.premetrics import Premetric
from diffaccel.distill.reflow import euler, euler_anchored, flow_loss, heun, straightness
from diffaccel.distill.slimflow import annealed_noise, distill_loss, middle_times, two_step_loss

RADIUS, STD, MODES = 2.0, 0.15, 8


def modes(dtype=torch.float64):
    angles = torch.arange(MODES, dtype=torch.float64) * 2 * math.pi / MODES
    return (RADIUS * torch.stack([angles.cos(), angles.sin()], 1)).to(dtype)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def data(count, seed):
    """Samples (count, 2) of the ring, float64."""
    source = generator(seed)
    places = modes()[torch.randint(MODES, (count,), generator=source)]
    return places + STD * torch.randn(count, 2, generator=source, dtype=torch.float64)


def field(x, t):
    """The exact velocity, regular at t = 0: the mean over modes of that of a single one."""
    t = t.to(x)[:, None]
    variance = ((1 - t) * STD) ** 2 + t**2
    apart = x[:, None] - (1 - t)[..., None] * modes(x.dtype)
    share = (-apart.square().sum(-1) / (2 * variance)).softmax(1)
    rate = (t - (1 - t) * STD**2) / variance
    return (share[..., None] * (rate[..., None] * apart - modes(x.dtype))).sum(1)


def pairs(count, seed, steps=96):
    """Noise and the samples that the exact ODE makes of it, float64: Heun on a cosine grid."""
    noise = torch.randn(count, 2, generator=generator(seed), dtype=torch.float64)
    times = [(1 + math.cos(math.pi * n / steps)) / 2 for n in range(steps)]
    return noise, heun(field, noise, times)


class Networks(nn.Module):
    """K networks side by side, of 3 hidden layers with SiLU; rows k B to (k + 1) B - 1 belong to network k.

    They do not touch each other, so that training them at once is training each alone.
    """

    def __init__(self, seed, count=1, width=96):
        super().__init__()
        self.count, source = count, generator(seed)
        sizes = [3, width, width, width, 2]
        for layer, (fan, out) in enumerate(itertools.pairwise(sizes)):
            bound = 1 / math.sqrt(fan)
            weight = (2 * torch.rand(1, fan, out, generator=source) - 1) * bound
            bias = (2 * torch.rand(1, 1, out, generator=source) - 1) * bound
            self.register_parameter(f"w{layer}", nn.Parameter(weight.repeat(count, 1, 1)))
            self.register_parameter(f"b{layer}", nn.Parameter(bias.repeat(count, 1, 1)))

    def forward(self, x, t, part=slice(None)):
        h = torch.cat([x, 2 * t.to(x)[:, None] - 1], 1).view(len(self.w0[part]), -1, 3)
        for layer in range(4):
            h = torch.baddbmm(getattr(self, f"b{layer}")[part], h, getattr(self, f"w{layer}")[part])
            h = nn.functional.silu(h) if layer < 3 else h
        return h.reshape(-1, 2)

    def beside(self, *others):
        """A copy of these networks with others beside them."""
        states = [networks.state_dict() for networks in (self, *others)]
        made = Networks(0, self.count + sum(other.count for other in others), self.w0.shape[-1])
        made.load_state_dict({key: torch.cat([state[key] for state in states]) for key in states[0]})
        return made

    def part(self, k):
        """One of the networks."""
        made = Networks(0, 1, self.w0.shape[-1])
        made.load_state_dict({key: v[k : k + 1] for key, v in self.state_dict().items()})
        return made.requires_grad_(False)


class Numbers:
    """Stands for Draws where samples need no generator each."""

    def __init__(self, count, source):
        self.count, self.source = count, source

    def uniform(self, *shape):
        return torch.rand(self.count, *shape, generator=self.source)


def train(networks, loss, iterations, seed, lr=2e-3, decay=0.998):
    """Trains by Adam with a cosine schedule; returns the moving average.

    Arguments:
        loss: Of (networks, iteration, generator), with shape (K B).
    """
    source = generator(seed)
    average = networks.beside()
    mean, own = list(average.parameters()), list(networks.parameters())
    optimizer = torch.optim.Adam(own, lr, fused=True)
    for n in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * n / iterations)) / 2
        optimizer.zero_grad()
        (loss(networks, n, source).mean() * networks.count).backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean, own, 1 - min(decay, (1 + n) / (10 + n)))
    return average.requires_grad_(False)


# ---------------------------------------------------------------- rectified flows


class Each(Premetric):
    """A premetric of its own for each of K networks side by side."""

    def __init__(self, *premetrics):
        self.premetrics = premetrics

    def __call__(self, residual, x0, t):
        parts = zip(*(part.chunk(len(self.premetrics)) for part in (residual, x0, t)), strict=True)
        return torch.cat([one(*part) for one, part in zip(self.premetrics, parts, strict=True)])


def first_flow(seed, iterations, batch=512):
    """A 1-RF: data and noise are independent, t is uniform."""

    def loss(networks, n, source):
        x0 = modes(torch.float32)[torch.randint(MODES, (batch,), generator=source)]
        x0 = x0 + STD * torch.randn(batch, 2, generator=source)
        noise = torch.randn(batch, 2, generator=source)
        t = torch.rand(batch, generator=source)
        return flow_loss(networks, x0, noise, t, coupling="independent")

    return train(Networks(seed), loss, iterations, seed)


def reflows(networks, coupled, densities, premetrics, iterations, seed, batch=512):
    """2-RFs side by side, each with a density of t and a premetric, on the same pairs and quantiles of t."""
    noise, x0 = (part.float() for part in coupled)

    def loss(networks, n, source):
        rows = torch.randint(len(noise), (batch,), generator=source)
        u = torch.rand(batch, generator=source).double()
        t = torch.cat([law.quantile(u).clamp(1e-5, 1 - 1e-5).float() for law in densities])
        rows = rows.repeat(networks.count)
        return flow_loss(networks, x0[rows], noise[rows], t, Each(*premetrics), coupling="paired")

    return train(networks, loss, iterations, seed)


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|, without bias."""
    own = [torch.cdist(part, part).sum() / (len(part) * (len(part) - 1)) for part in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - own[0] - own[1])


def rmse(a, b):
    return float((a - b).square().mean().sqrt())


def figures(network, coupled, real):
    """1000 times the energy distance, error of one step, straightness as a sum, errors of 4 and 8 steps."""
    noise, x0 = (part.float() for part in coupled)
    one = euler(network, noise, 1)
    found = {"ED": 1000 * energy_distance(one, real.float()), "1": rmse(one, x0),
             "S": 2 * float(straightness(network, noise))}  # fmt: skip
    for steps in (4, 8):
        found[f"{steps}"] = rmse(euler(network, noise, steps), x0)
        found[f"{steps} anchored"] = rmse(euler_anchored(network, noise, steps), x0)
    return found


TIMES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@torch.no_grad()
def losses(network, coupled):
    """The loss, a sum over elements, at each of the times, with noise and samples as they are."""
    noise, x0 = (part.float() for part in coupled)
    parts = [flow_loss(network, x0, noise, torch.full((len(x0),), t), coupling="independent") for t in TIMES]
    return [2 * float(part.mean()) for part in parts]


# ---------------------------------------------------------------- slim flows


def slim_flows(seed, coupled, iterations, batch=512):
    """Three small flows side by side: reflow from scratch; annealed; a 1-RF that is switched to reflow."""
    noise, x0 = (part.float() for part in coupled)
    until = 0.6 * iterations

    def loss(networks, n, source):
        rows = torch.randint(len(noise), (batch,), generator=source)
        fresh = torch.randn(batch, 2, generator=source)
        t = torch.rand(batch, generator=source).repeat(3)
        shares = (0.0, max(0.0, 1 - n / until), float(n < until))
        mixed = torch.cat([annealed_noise(noise[rows], fresh, b) for b in shares])
        return flow_loss(networks, x0[rows].repeat(3, 1), mixed, t, coupling="independent")

    one = Networks(seed, 1, 24)
    return train(one.beside(one, one), loss, iterations, seed)


def slim_students(flow, seed, coupled, iterations, batch=512):
    """Three one-step students of a flow: without two steps, with those of practice, and of the paper."""
    noise, x0 = (part.float() for part in coupled)

    def loss(networks, n, source):
        rows = torch.randint(len(noise), (batch,), generator=source).repeat(3)
        terms = list(distill_loss(networks, x0[rows], noise[rows]).view(3, -1))
        fresh = torch.randn(batch, 2, generator=source)
        for place, rule in enumerate(("practice", "paper"), 1):
            student = partial(networks, part=slice(place, place + 1))
            s = middle_times(Numbers(batch, source), rule)
            terms[place] = terms[place] + two_step_loss(student, flow, fresh, s, first_step=rule)
        return torch.cat(terms)

    return train(flow.beside(flow, flow), loss, iterations, seed)

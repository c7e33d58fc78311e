"""The toy of the card of LCSC: checkpoints of a consistency distillation on a ring, and what scores them."""

import itertools
import math

import numpy as np
import ring
import torch
from safetensors.torch import save_file
from torch import nn

WIDTH, LEVELS, BATCH, FEATURES = 64, 18, 128, 32


def network(seed):
    """An MLP of 3 hidden layers for v(x, t); the student is f(x, t) = x - t v(x, t)."""
    torch.manual_seed(seed)
    sizes = [3, WIDTH, WIDTH, WIDTH, 2]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def student(net, x, t):
    return x - t[:, None] * net(torch.cat([x, t[:, None]], 1))


def heun_step(x, t, s):
    """One step of Heun's method on the exact field, float32."""
    first = ring.field(x, t)
    ahead = x + (s - t)[:, None] * first
    return x + (s - t)[:, None] * 0.5 * (first + ring.field(ahead, s))


def samples(source, count):
    x = ring.modes(torch.float32)[torch.randint(ring.MODES, (count,), generator=source)]
    return x + ring.STD * torch.randn(count, 2, generator=source)


def distill(seed, folder, flow=1500, iterations=6000, window=2000, interval=50, averages=()):
    """Trains; writes a checkpoint every ``interval`` iterations of the last ``window`` ones.

    Returns the files, and for each rate of ``averages`` the weights of a moving average from ``flow`` on.
    """
    source, net = ring.generator(seed), network(seed)
    optimizer = torch.optim.Adam(net.parameters(), 1.5e-3)
    times = torch.linspace(1, 0, LEVELS + 1)
    own, files = list(net.parameters()), []
    means = {rate: [p.detach().clone() for p in own] for rate in averages}
    for n in range(flow + iterations):
        x0 = samples(source, BATCH)
        noise = torch.randn(BATCH, 2, generator=source)
        if n < flow:
            t = torch.rand(BATCH, generator=source)
            x = (1 - t)[:, None] * x0 + t[:, None] * noise
            loss = (net(torch.cat([x, t[:, None]], 1)) - (noise - x0)).square().mean()
        else:
            place = torch.randint(LEVELS, (BATCH,), generator=source)
            t, s = times[place], times[place + 1]
            x = (1 - t)[:, None] * x0 + t[:, None] * noise
            with torch.no_grad():
                target = student(net, heun_step(x, t, s), s)
            error = (student(net, x, t) - target).square().sum(1)
            loss = ((error + 0.03**2).sqrt() - 0.03).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = n + 1 - flow - (iterations - window)
        with torch.no_grad():
            for rate, mean in means.items():
                torch._foreach_lerp_(mean, own, 1 - rate if n > flow else 1.0)
        if done > 0 and done % interval == 0:
            files.append(folder / f"student-{n + 1:06d}.safetensors")
            save_file(net.state_dict(), files[-1])
    return files, means


class Score:
    """The Frechet distance, times 1000, of random cosine features of one-step samples, on fixed noise.

    Arguments:
        seed: Decides the noise and the data.
        count: The number of samples.
        features: The seed of the features, the same for search and held-out.
    """

    def __init__(self, seed, count, features=7):
        source = ring.generator(features)
        self.matrix = 1.5 * torch.randn(2, FEATURES, generator=source)
        self.phase = 2 * math.pi * torch.rand(FEATURES, generator=source)
        self.noise = torch.randn(count, 2, generator=ring.generator(seed))
        self.data = ring.data(count, seed + 1).float()
        self.mean, self.cov = self.moments(self.data)
        values, vectors = np.linalg.eigh(self.cov)
        self.root = vectors * np.sqrt(values.clip(0)) @ vectors.T

    def moments(self, x):
        features = torch.cos(x @ self.matrix + self.phase).double().numpy()
        return features.mean(0), np.cov(features.T)

    @torch.no_grad()
    def make(self, net):
        return student(net, self.noise, torch.ones(len(self.noise)))

    def __call__(self, net):
        mean, cov = self.moments(self.make(net))
        middle = np.linalg.eigvalsh(self.root @ cov @ self.root).clip(0)
        shift = mean - self.mean
        return 1000 * float(shift @ shift + np.trace(cov) + np.trace(self.cov) - 2 * np.sqrt(middle).sum())

    def energy(self, net, count=4000):
        """1000 times the energy distance of the first samples."""
        return 1000 * ring.energy_distance(self.make(net)[:count], self.data[:count])

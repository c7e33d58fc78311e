"""Mixtures of Gaussians with exact predictions, and particles driven through them as a pipeline does it."""

import itertools
import math

import numpy as np
import torch

from diffaccel.noise import NoiseLevel, prediction_coefficients
from diffaccel.pipelines.particles import Particles, Rules

F64 = torch.float64
A = [(0.7, [-2.0], 0.6), (0.3, [2.0], 1.0)]
B1, B2 = [(0.5, [-2.0], 0.7), (0.5, [1.0], 0.7)], [(0.3, [-1.0], 0.8), (0.7, [3.0], 1.0)]
CU, CC = [(0.5, [-1.5], 1.0), (0.5, [1.5], 1.0)], [(0.9, [1.5], 1.0), (0.1, [-1.5], 1.0)]
D1 = [(0.4, [-2.0, 0.0], 0.9), (0.6, [2.0, 0.0], 0.7)]
D2 = [(0.5, [-2.0, 1.0], 0.8), (0.3, [2.0, 1.0], 0.8), (0.2, [0.0, -2.0], 1.0)]
EULER = 1e4
"""The data_std that makes steps of Euler-Maruyama."""


def _log_joint(mixture, y, ratio):
    weights, means, stds = (torch.tensor(part, dtype=F64) for part in zip(*mixture, strict=True))
    variance = stds**2 + ratio**2
    squares = (y[:, None] - means).square().sum(-1)
    logs = weights.log() - means.shape[1] / 2 * (2 * math.pi * variance).log() - squares / (2 * variance)
    return logs, means, variance


def log_density(mixture, y, ratio):
    """log q at y = x / alpha, (n)."""
    return _log_joint(mixture, y, ratio)[0].logsumexp(-1)


def eps_of(mixture, y, ratio):
    """The exact prediction of the noise at y, (n, D)."""
    logs, means, variance = _log_joint(mixture, y, ratio)
    share = logs.softmax(-1) / variance
    return ratio * (share.sum(-1, keepdim=True) * y - share @ means)


def level_of(log_snr, kind="ve"):
    """The level of a path, with the output that is usual there."""
    ratio = math.exp(-log_snr)
    norm = {"ve": 1.0, "vp": math.hypot(1, ratio), "flow": 1 + ratio}[kind]
    alpha, sigma = 1 / norm, ratio / norm
    prediction = {"ve": "epsilon", "vp": "v_prediction", "flow": "flow_prediction"}[kind]
    return NoiseLevel(alpha, sigma, *prediction_coefficients(prediction, alpha, sigma))


def outputs_of(mixtures, x, level):
    """What networks would predict, (E, n, D)."""
    y, ratio = x / level.alpha, level.sigma / level.alpha
    eps = torch.stack([eps_of(mixture, y, ratio) for mixture in mixtures])
    return level.output(y - ratio * eps, x) if level.p else eps * level.q


def drive(mixtures, exponents, steps, first=-3.5, last=5.0, kind="ve", groups=8, particles=2000, seed=0,
          start=None, log_weights=None, **options):  # fmt: skip
    """Particles after steps that are uniform in lambda, and their y = x / alpha, (G, K, D)."""
    levels = [level_of(float(log_snr), kind) for log_snr in np.linspace(first, last, steps + 1)]
    rules = Rules(tuple(exponents), groups, particles, **options)
    generator = torch.Generator().manual_seed(seed)
    dimension = len(mixtures[0][0][1])
    if start is None:
        noise = torch.randn(groups * particles, dimension, generator=generator, dtype=F64) * levels[0].sigma
    else:
        noise = start * levels[0].alpha * math.sqrt(sum(exponents))
    swarm = Particles(rules, noise, generator)
    if log_weights is not None:
        swarm.log_weights = log_weights
    for level, target in itertools.pairwise(levels):
        swarm.step([level] * len(mixtures), outputs_of(mixtures, swarm.samples, level), target)
    return swarm, (swarm.samples / levels[-1].alpha).reshape(groups, particles, dimension)


def estimate(swarm, values):
    """The mean over groups of weighted means of values (G, K), and its standard error."""
    means = (swarm.log_weights.softmax(-1) * values).sum(-1)
    return means.mean().item(), means.std().item() / math.sqrt(len(means))

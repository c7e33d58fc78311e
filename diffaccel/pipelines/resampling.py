"""Resampling of weighted particles: which particle takes the place of which, group by group.

Every function is pure: the log-weights (G, K) of G independent groups of K particles and uniform numbers go
in, and the parents (G, K) come out, so that a group depends on its own row only.  All of it is float64 on the
CPU, where the decision to resample is made anyway.

References:
    | Feynman-Kac Correctors in Diffusion (2025), arXiv 2503.02819 (the jump process: Proposition 4.1)
    | Douc, Cappe and Moulines: Comparison of Resampling Schemes for Particle Filtering (2005)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RESAMPLERS", "Resampler", "effective_size", "jump", "log_mean", "multinomial", "systematic"]


class Resampler(NamedTuple):
    """A way of resampling.

    Arguments:
        parents: The function: log-weights (G, K) and uniform numbers (G, U) to parents (G, K).
        uniforms: The numbers U that a group of K particles needs.
        always: Whether it acts at every step, and not where the effective size is small.
    """

    parents: Callable[[Tensor, Tensor], Tensor]
    uniforms: Callable[[int], int]
    always: bool = False


def effective_size(log_weights: Tensor) -> Tensor:
    """Returns the effective sample sizes (sum w)^2 / sum w^2, (G), of log-weights (G, K): from 1 to K."""
    return 1 / log_weights.softmax(-1).square().sum(-1)


def log_mean(log_weights: Tensor) -> Tensor:
    """Returns the logarithms of the mean weights, (G), of log-weights (G, K)."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def systematic(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Returns parents (G, K) at the positions (u + j) / K of the cumulated weights.

    A particle of the normalized weight w gets floor(K w) or ceil(K w) copies, K w on average; equal weights
    leave every particle in its place.

    Arguments:
        log_weights: The log-weights, with shape (G, K).
        uniforms: One number u in [0, 1) a group, with shape (G, 1).
    """
    count = log_weights.shape[-1]
    return _at((uniforms + torch.arange(count, dtype=uniforms.dtype)) / count, log_weights.softmax(-1))


def multinomial(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Returns K independent draws from the weights of each group, (G, K).

    Arguments:
        log_weights: The log-weights, with shape (G, K).
        uniforms: Numbers in [0, 1), with shape (G, K); or any other number of draws a group.
    """
    return _at(uniforms, log_weights.softmax(-1))


def jump(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Returns the parents of one step of the jump process of Proposition 4.1 of arXiv 2503.02819, (G, K).

    With the increments d of the log-weights in a step and their excess e_k = d_k - mean(d), particle k dies
    with the probability 1 - exp(-max(-e_k, 0)) and is replaced by particle j with a probability proportional
    to max(e_j, 0).  To first order in the step that carries the weights, which are not kept.

    Arguments:
        log_weights: The increments, with shape (G, K).
        uniforms: Numbers in [0, 1) for deaths and for replacements, with shape (G, 2 K).
    """
    death, choice = uniforms.chunk(2, -1)
    excess = log_weights - log_weights.mean(-1, keepdim=True)
    births = excess.clamp(min=0)
    dies = death < -torch.expm1(excess.clamp(max=0))
    parents = _at(choice, births / births.sum(-1, keepdim=True).clamp(min=torch.finfo(births.dtype).tiny))
    return torch.where(dies, parents, torch.arange(log_weights.shape[-1]))


def _at(positions: Tensor, weights: Tensor) -> Tensor:
    """Returns the particles whose intervals of the cumulated weights (G, K) hold positions (G, *)."""
    edges = weights.cumsum(-1)
    edges[:, -1] = 1.0  # whatever rounding made of it
    return torch.searchsorted(edges, positions.contiguous(), right=True).clamp(max=weights.shape[-1] - 1)


RESAMPLERS: dict[str, Resampler | None] = {
    "systematic": Resampler(systematic, lambda count: 1),
    "multinomial": Resampler(multinomial, lambda count: count),
    "jump": Resampler(jump, lambda count: 2 * count, always=True),
    "none": None,
}
"""The ways of resampling, by name."""

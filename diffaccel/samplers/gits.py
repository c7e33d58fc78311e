r"""Grids by dynamic programming over a teacher's trajectory (GITS).

In the coordinates y = x / alpha over S = sigma / alpha the trajectory of the probability-flow ODE has the
slope eps, and all of them bend in nearly the same way. The cost of an Euler step from node i to node j is how
much farther its end lies from the chord of the whole trajectory than the trajectory itself at j,

.. math:: c_{ij} = E[ d(y_i + (S_j - S_i) \epsilon_i) - d(y_j) ]

with d the distance to the chord, and the grid of K steps minimizes V_k(i) = min_j c_ij + a V_{k-1}(j).
Of the fine solution only samples are kept: eps_i is the slope of its step from i to i + 1.

References:
    | On the Trajectory Regularity of ODE-based Diffusion Sampling (2024), https://arxiv.org/abs/2405.11326
"""

import math

import numpy as np
from torch import Tensor

from .fitting import Trajectory
from .paths import TrainingPath

__all__ = ["COEFFICIENTS", "gits_grid", "gits_grids", "step_costs"]

COEFFICIENTS = (0.85, 1.0, 1.15)
"""Those that are tried; the publication has 1.15, and 0.8 to 1.2 for Stable Diffusion."""


def step_costs(ys: list[Tensor], ratios: list[float]) -> np.ndarray:
    """Returns the costs of Euler steps (M, M) from node i to a later node j; infinite where j <= i.

    Arguments:
        ys: The trajectory's y at each node, each with shape (B, *).
        ratios: The ratios S of the nodes, falling.
    """
    flat = [y.flatten(1).double() for y in ys]
    start, chord = flat[0], flat[-1] - flat[0]
    unit = chord / chord.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def deviation(y: Tensor) -> Tensor:
        offset = y - start
        return (offset - (offset * unit).sum(1, keepdim=True) * unit).norm(dim=1)

    own = [deviation(y) for y in flat]
    costs = np.full((len(flat), len(flat)), math.inf)
    for i in range(len(flat) - 1):
        slope = (flat[i + 1] - flat[i]) / (ratios[i + 1] - ratios[i])
        for j in range(i + 1, len(flat)):
            end = flat[i] + (ratios[j] - ratios[i]) * slope
            costs[i, j] = float((deviation(end) - own[j]).mean())
    return costs


def gits_grid(costs: np.ndarray, count: int, coefficient: float = 1.15) -> list[int]:
    """Returns the nodes of the cheapest way of ``count`` steps from the first to the last, both included.

    Arguments:
        costs: The costs of single steps (M, M).
        count: The number of steps, less than M.
        coefficient: What the cost of all later steps is multiplied by.
    """
    values = [np.where(np.arange(len(costs)) == len(costs) - 1, 0.0, math.inf)]
    choices = []
    for _ in range(count):
        totals = costs + coefficient * values[-1][None]
        choices.append(totals.argmin(1))
        values.append(totals.min(1))
    places = [0]
    for choice in reversed(choices):
        places.append(int(choice[places[-1]]))
    return places


def gits_grids(trajectory: Trajectory, path: TrainingPath, count: int) -> list[tuple[float, ...]]:
    """Returns grids of ``count`` evaluations for a model, one for each of the coefficients.

    Arguments:
        trajectory: The fine solution, whose last sample lies at S = 0.
        path: The model's path.
        count: The number of evaluations, less than the fine solution's.
    """
    ratios = [math.exp(-position) for position in trajectory.positions]  # S = 0 at infinity
    kept = [place for place, ratio in enumerate(ratios) if ratio < 1e3]  # y is infinite in pure noise
    ys = [trajectory.samples[place] / path.level(ratios[place]).alpha for place in kept]
    costs = step_costs(ys, [ratios[place] for place in kept])
    found = []
    for coefficient in COEFFICIENTS:
        nodes = [ratios[kept[place]] for place in gits_grid(costs, count, coefficient)]
        grid = (path.noisiest, *nodes[1:])
        if grid not in found:
            found.append(grid)
    return found

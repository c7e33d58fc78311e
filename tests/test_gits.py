"""Grids by dynamic programming over a trajectory."""

import itertools
import math

import numpy as np
import pytest
import torch
from toy_mixture import drive, exact, rms, solver

from diffaccel.samplers import GRIDS, solver_schedule
from diffaccel.samplers.fitting import Trajectory
from diffaccel.samplers.gits import gits_grid, gits_grids, step_costs
from diffaccel.samplers.grids import grid


@pytest.mark.parametrize("coefficient", [0.8, 1.0, 1.15])
def test_the_grid_is_the_cheapest_of_all(coefficient):
    rng = np.random.default_rng(0)
    costs = np.where(np.triu(np.ones((9, 9)), 1) > 0, rng.uniform(0, 1, (9, 9)), math.inf)

    def total(places):
        steps = [costs[a, b] for a, b in itertools.pairwise(places)]
        return sum(coefficient**n * cost for n, cost in enumerate(steps))

    for count in (1, 2, 4):
        ways = [(0, *middle, 8) for middle in itertools.combinations(range(1, 8), count - 1)]
        assert gits_grid(costs, count, coefficient) == list(min(ways, key=total))


def test_a_straight_trajectory_costs_nothing_and_single_steps_of_it_are_free():
    start, end = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    ratios = [8.0, 4.0, 1.0, 0.0]
    ys = [end + (start - end) * ratio / 8 for ratio in ratios]
    costs = step_costs(ys, ratios)
    assert (
        np.allclose(costs[np.triu_indices(4, 1)], 0, atol=1e-6) and np.isinf(costs[np.tril_indices(4)]).all()
    )
    ys[2] = ys[2] + 1.0
    costs = step_costs(ys, ratios)
    assert np.allclose(np.diag(costs, 1), 0, atol=1e-6), "to the next node the slope is exact"


def test_grids_of_a_model():
    """As many falling nodes as asked for; with DDIM they are better than the worst of the known grids."""
    path = solver().path
    ratios = [path.largest, *grid("log_snr", 60, path)[1:]]
    y = np.stack([np.linspace(-3, 3, 16) * math.hypot(path.largest, 1)])
    samples, value = [], y[0]
    for high, low in itertools.pairwise(ratios):
        samples.append(value)
        value = exact(value, high, max(low, 1e-4))
    samples.append(value)
    tensors = [torch.tensor(s * path.level(r).alpha)[None] for s, r in zip(samples, ratios, strict=True)]
    trajectory = Trajectory([-math.log(r) if r else math.inf for r in ratios], tensors)
    grids = gits_grids(trajectory, path, 6)
    assert 1 <= len(grids) <= 3
    for nodes in grids:
        assert len(nodes) == 7 and nodes[-1] == 0 and nodes[0] == path.noisiest
        assert all(a > b for a, b in itertools.pairwise(nodes))

    def error(nodes):
        return rms(drive(solver_schedule("ddim", nodes), start=y[0]) - samples[-1])

    known = [error(grid(name, 6, path)) for name in GRIDS]
    assert min(map(error, grids)) < sorted(known)[1], "at least the second of all grids"

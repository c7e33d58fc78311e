"""Resampling: what the counts are, on average and at most, and what stays where it is."""

import math

import pytest
import torch

from diffaccel.pipelines.resampling import (
    RESAMPLERS,
    effective_size,
    jump,
    log_mean,
    multinomial,
    systematic,
)

K = 8


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counts_of(parents, count=K):
    return torch.nn.functional.one_hot(parents, count).sum(1).double()


@pytest.fixture
def log_weights():
    return torch.randn(1, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_effective_size_and_mean_weight(log_weights):
    weights = log_weights.exp()
    assert effective_size(log_weights).item() == pytest.approx(
        (weights.sum() ** 2 / (weights**2).sum()).item()
    )
    assert log_mean(log_weights).item() == pytest.approx(weights.mean().log().item())
    assert effective_size(torch.zeros(2, 5, dtype=torch.float64)).tolist() == pytest.approx([5, 5])
    assert effective_size(torch.tensor([[0.0, 1e4]])).item() == 1  # no overflow


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 100, 1000])
def test_systematic_leaves_equal_weights_alone(count):
    draws = uniforms(200, 1)
    parents = systematic(torch.full((len(draws), count), -3.7, dtype=torch.float64), draws)
    assert torch.equal(parents, torch.arange(count).expand(len(draws), count))


def test_systematic_counts_are_those_next_to_the_mean(log_weights):
    parents = systematic(log_weights.expand(20_000, K), uniforms(20_000, 1))
    counts, expected = counts_of(parents), K * log_weights.softmax(-1)[0]
    assert bool(((counts >= expected.floor()) & (counts <= expected.ceil())).all())
    error = counts.std(0) / math.sqrt(len(counts))
    assert bool(((counts.mean(0) - expected).abs() < 4 * error + 1e-9).all())
    assert bool((parents.diff(dim=1) >= 0).all())


def test_multinomial_counts_are_right_on_average_and_vary_more(log_weights):
    many = log_weights.expand(20_000, K)
    counts, expected = counts_of(multinomial(many, uniforms(20_000, K))), K * log_weights.softmax(-1)[0]
    error = counts.std(0) / math.sqrt(len(counts))
    assert bool(((counts.mean(0) - expected).abs() < 4 * error).all())
    assert bool((counts.var(0) > counts_of(systematic(many, uniforms(20_000, 1))).var(0)).all())
    weights = expected / K
    assert torch.allclose(counts.var(0), K * weights * (1 - weights), rtol=0.06)  # binomial


def test_jump_process_moves_mass_at_the_rate_of_the_weights(log_weights):
    """To first order in the increments: E[counts] - 1 = d_k - mean(d)."""
    step = 0.02
    increments = step * log_weights
    counts = counts_of(jump(increments.expand(400_000, K), uniforms(400_000, 2 * K)))
    excess = (increments - increments.mean())[0]
    error = counts.std(0) / math.sqrt(len(counts))
    assert bool(((counts.mean(0) - 1 - excess).abs() < 4 * error + 2 * step**2).all())
    assert not torch.equal(excess, torch.zeros_like(excess))


def test_jump_process_kills_with_the_probability_of_the_proposition():
    increments = torch.tensor([[0.0, 0.0, 3.0, -1.0]], dtype=torch.float64)
    parents = jump(increments.expand(100_000, 4), uniforms(100_000, 8))
    assert bool((parents[:, 2] == 2).all())  # the only one above the mean never dies, and has all children
    stays = (parents == torch.arange(4)).double().mean(0)
    assert torch.allclose(stays, torch.exp(torch.tensor([-0.5, -0.5, 0.0, -1.5])).double(), atol=0.006)
    assert bool(((parents == torch.arange(4)) | (parents == 2)).all())


@pytest.mark.parametrize("size", [0.0, -5.0])
def test_jump_process_without_differences_does_nothing(size):
    parents = jump(torch.full((50, K), size, dtype=torch.float64), uniforms(50, 2 * K))
    assert torch.equal(parents, torch.arange(K).expand(50, K))


@pytest.mark.parametrize("name", ["systematic", "multinomial", "jump"])
def test_groups_know_nothing_of_each_other(name):
    resampler = RESAMPLERS[name]
    weights = torch.randn(3, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    draws = uniforms(3, resampler.uniforms(K))
    together = resampler.parents(weights, draws)
    for group in range(3):
        alone = resampler.parents(weights[group : group + 1], draws[group : group + 1])
        assert torch.equal(together[group], alone[0])


@pytest.mark.parametrize("name", ["systematic", "multinomial"])
def test_one_particle_with_all_the_weight_has_all_the_children(name):
    weights = torch.full((1, K), -2000.0, dtype=torch.float64)
    weights[0, 5] = 2000.0
    resampler = RESAMPLERS[name]
    for seed in range(5):
        assert resampler.parents(weights, uniforms(1, resampler.uniforms(K), seed=seed)).tolist() == [[5] * K]

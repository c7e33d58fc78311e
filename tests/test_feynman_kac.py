"""The weights and steps of Feynman-Kac correctors against exact densities, through the pipeline's functions.

The numbers are those of the card: one-dimensional mixtures A (squared), B (a product), C (guidance), and a
product in two dimensions.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from exact_particles import (
    B1,
    B2,
    CC,
    CU,
    D1,
    D2,
    EULER,
    F64,
    A,
    drive,
    eps_of,
    estimate,
    level_of,
    log_density,
    outputs_of,
)

from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.noise import NoiseLevel
from diffaccel.pipelines.feynman_kac import CLEAN, blend, exposure, moves, total_of
from diffaccel.pipelines.particles import Particles, Rules
from diffaccel.pipelines.rewards import Tilt

CASES = {
    "A": ([A], (2.0,), -3.5),
    "B": ([B1, B2], (1.0, 1.0), -3.5),
    "C2": ([CU, CC], (-1.0, 2.0), -4.0),
    "C4": ([CU, CC], (-3.0, 4.0), -4.0),
    "D": ([D1, D2], (1.0, 1.0), -3.0),
}


@functools.cache
def result(case, zeta, steps=400, **options):
    mixtures, exponents, first = CASES[case]
    return drive(mixtures, exponents, steps, first, zeta=zeta, **{"data_std": EULER, **options})


def assert_close(found, exact):
    """The card's tolerance: 3 standard errors and 2 % of discretization."""
    value, error = found
    assert abs(value - exact) < 3 * error + 0.02 * abs(exact), (value, error, exact)


# ---------------------------------------------------------------- 1: without Monte Carlo


def flow(mixtures, exponents, steps, kind="ve"):
    """Mean, variance, P(y > 0) of points that follow the flow (zeta = 0) with weights; and the plain mean."""
    ratio = math.exp(4)
    wide = 6 * ratio / math.sqrt(sum(exponents))
    start = torch.linspace(-wide, wide, 8001, dtype=F64)[:, None]
    logs = sum(b * log_density(m, start, ratio) for b, m in zip(exponents, mixtures, strict=True))[None]
    swarm, y = drive(mixtures, exponents, steps, -4.0, kind=kind, groups=1, particles=8001, start=start,
                     log_weights=logs, zeta=0.0, resampling="none")  # fmt: skip
    weights, y = swarm.log_weights.softmax(-1)[0], y[0, :, 0]
    plain = (logs.softmax(-1)[0] * y).sum()
    mean = (weights * y).sum()
    return torch.stack([mean, (weights * (y - mean) ** 2).sum(), weights[y > 0].sum(), plain]).numpy()


def extrapolated(*args, **options):
    """The limit of small steps, from two numbers of first-order steps."""
    return 2 * flow(*args, 800, **options) - flow(*args, 400, **options)


@pytest.mark.parametrize(
    ("mixtures", "exponents", "exact", "plain"),
    [
        ([CU, CC], (-1.0, 2.0), (1.5855, 0.9718, 0.9579), 1.930),
        ([CU, CC], (-3.0, 4.0), (1.7615, 0.7037, 0.9942), 2.657),
        ([A], (0.5,), (-0.1536, 5.4209, 0.4355), None),
    ],
)  # fmt: skip
def test_weighted_flow_is_the_target(mixtures, exponents, exact, plain):
    found = extrapolated(mixtures, exponents)
    assert found[:3] == pytest.approx(exact, abs=1.2e-3)
    if plain is not None:
        assert found[3] == pytest.approx(plain, abs=2e-3)  # without weights: far off


def test_weighted_flow_is_the_same_on_all_paths():
    one, *others = (flow([CU, CC], (-1.0, 2.0), 100, kind=kind) for kind in ("ve", "vp", "flow"))
    for other in others:
        assert other == pytest.approx(one, rel=1e-9)


def test_exponents_that_change_need_the_density():
    """b rises from 1 to 2 in lambda: the weight has b' log q dlambda more."""

    def ramp(steps):
        grid = np.linspace(-4.0, 5.0, steps + 1)
        y = torch.linspace(-12 * math.exp(4), 12 * math.exp(4), 8001, dtype=F64)[:, None]
        logs = log_density(A, y, math.exp(4))
        for here, there in itertools.pairwise(grid):
            level, target = level_of(here), level_of(there)
            b = 1 + ((here + there) / 2 + 4) / 9
            found = blend(eps_of(A, y, level.sigma)[None], (b,))
            logs = logs + exposure(level, target).increment(found)
            logs = logs + (there - here) / 9 * log_density(A, y, level.sigma)
            y = moves(level, target, b, 0.0).move(y - level.sigma * found.mean, found.mean, torch.zeros(()))
        weights, y = logs.softmax(0), y[:, 0]
        mean = (weights * y).sum()
        return torch.stack([mean, (weights * (y - mean) ** 2).sum(), weights[y > 0].sum()]).numpy()

    assert 2 * ramp(400) - ramp(200) == pytest.approx((-1.6019, 1.6409, 0.0989), abs=1e-3)


# ---------------------------------------------------------------- 2: Monte Carlo


@pytest.mark.parametrize(
    ("case", "zeta", "what", "exact"),
    [
        ("A", 1.0, "positive", 0.0989), ("A", 2.0, "positive", 0.0989), ("A", 2.0, "mean", -1.6019),
        ("B", 1.0, "mean", -0.0773), ("B", 2.0, "mean", -0.0773),
        ("C2", 1.0, "mean", 1.5855), ("C4", 2.0, "mean", 1.7615), ("C4", 2.0, "variance", 0.7037),
    ],
)  # fmt: skip
def test_weighted_particles_sample_the_target(case, zeta, what, exact):
    swarm, y = result(case, zeta)
    y = y[..., 0]
    center = (swarm.log_weights.softmax(-1) * y).sum(-1, keepdim=True)
    values = {"mean": y, "positive": (y > 0).to(F64), "variance": (y - center) ** 2}[what]
    assert_close(estimate(swarm, values), exact)


def test_more_noise_reduces_the_variance():
    """The card has -0.0545(1278) at zeta = 0.71, -0.0661(176) at 2."""
    (little, error), (_, least) = (
        estimate(*result("B", zeta)[:1], result("B", zeta)[1][..., 0]) for zeta in (0.71, 2.0)
    )
    assert abs(little + 0.0773) < 0.4 and error > 2 * least


@pytest.mark.parametrize(
    ("case", "zeta", "exact", "plain"),
    [
        ("A", 2.0, -1.6019, -1.4363), ("B", 1.0, -0.0773, 0.5267), ("C2", 1.0, 1.5855, 1.7903),
        ("C4", 2.0, 1.7615, 1.8990),
    ],
)  # fmt: skip
def test_particles_without_weights_do_not(case, zeta, exact, plain):
    _, y = result(case, zeta, particles=500, resampling="none")
    means = y[..., 0].mean(1)
    assert_close((means.mean().item(), means.std().item() / math.sqrt(8)), plain)
    assert abs(means.mean().item() - exact) > 0.1


def test_product_in_two_dimensions():
    swarm, y = result("D", 2.0)
    for axis, exact in enumerate((0.054, 0.433)):
        assert_close(estimate(swarm, y[..., axis]), exact)
    weights = swarm.log_weights.softmax(-1)[..., None]
    variance = (weights * (y - (weights * y).sum(1, keepdim=True)) ** 2).sum(1)
    for axis, exact in enumerate((4.189, 0.399)):
        found = variance[:, axis]
        assert_close((found.mean().item(), found.std().item() / math.sqrt(8)), exact)


# ---------------------------------------------------------------- 3 and 4: paths, stationary variance


@pytest.mark.parametrize("data_std", [0.0, 1.0, EULER])
def test_paths_give_the_same_particles(data_std):
    ends = [
        drive([CU, CC], (-1.0, 2.0), 50, kind=kind, groups=1, particles=50, data_std=data_std)[1]
        for kind in ("ve", "vp", "flow")
    ]
    assert torch.allclose(ends[1], ends[0], rtol=1e-6, atol=1e-9)
    assert torch.allclose(ends[2], ends[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("zeta", "data_std", "steps"),
    [(0.5, 1.0, 400), (1.0, 1.0, 400), (2.0, 1.0, 400), (1.0, EULER, 400), (1.0, 0.0, 400), (2.0, 0.0, 1600)],
)
def test_variance_without_weights_is_the_stationary_one(zeta, data_std, steps):
    """Of standard normal data, squared: zeta^2 / (b (1 + zeta^2) - 1); the target's is 1 / b."""
    _, y = drive([[(1.0, [0.0], 1.0)]], (2.0,), steps, zeta=zeta, data_std=data_std, groups=1,
                 particles=20_000, resampling="none")  # fmt: skip
    assert y.var().item() == pytest.approx(zeta**2 / (2 * (1 + zeta**2) - 1), rel=0.05)


@pytest.mark.parametrize(
    ("zeta", "low", "high"),
    [(2.0, 0.47, 0.53), (1.0, 0.45, 0.53), (0.5, 0.0, 0.4)],  # too little noise wrecks the weights
)
def test_variance_with_weights(zeta, low, high):
    swarm, y = drive([[(1.0, [0.0], 1.0)]], (2.0,), 400, zeta=zeta, data_std=EULER)
    found = (swarm.log_weights.softmax(-1) * y[..., 0] ** 2).sum(-1).mean()
    assert low < found < high
    least = min(min(moment.effective) for moment in swarm.history) / 2000
    assert least < 0.5


# ---------------------------------------------------------------- 5 and 6: normalizer, resamplers


@pytest.mark.parametrize("zeta", [1.0, 2.0])
def test_normalizer(zeta):
    """The card has 0.4133 for the integral, and 0.4114 and 0.4112 for the particles."""
    swarm, _ = result("C2", zeta)
    y = torch.linspace(-4000, 4000, 200_001, dtype=F64)[:, None]

    def log_integral(log_snr):
        ratio = math.exp(-log_snr)
        logs = -log_density(CU, y, ratio) + 2 * log_density(CC, y, ratio)
        return logs.logsumexp(0).item()

    exact = log_integral(5.0) - log_integral(-4.0)
    assert exact == pytest.approx(0.4133, abs=1e-3)
    assert swarm.log_normalizer.mean().item() == pytest.approx(exact, abs=0.01)


def test_resamplers_differ_in_their_variance():
    def error(**options):
        swarm, y = result("B", 2.0, steps=150, particles=1000, **options)
        return estimate(swarm, (y[..., 0] > 0).to(F64))[1]

    systematic, often = error(), error(resampling="multinomial", ess_threshold=1.0)
    assert error(resampling="jump") < often / 2
    assert systematic < often / 2
    assert error(resampling="multinomial") < often


@pytest.mark.parametrize("resampling", ["jump", "multinomial", "systematic"])
def test_resamplers_agree_on_the_target(resampling):
    swarm, y = result("C2", 1.0, steps=200, resampling=resampling)
    assert_close(estimate(swarm, y[..., 0]), 1.5855)
    assert swarm.log_normalizer.mean().item() == pytest.approx(0.4133, abs=0.02)


# ---------------------------------------------------------------- 7: where nothing is to be corrected


@pytest.mark.parametrize("resampling", ["systematic", "multinomial", "jump"])
def test_one_density_has_no_weights(resampling):
    swarm, _ = drive([A], (1.0,), 20, groups=2, particles=50, resampling=resampling)
    assert torch.equal(swarm.log_weights, torch.zeros(2, 50, dtype=F64))
    assert not any(any(moment.resampled) for moment in swarm.history)
    assert torch.equal(swarm.ancestors, torch.arange(50).expand(2, 50))
    assert swarm.log_normalizer.tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.3, 7.5, 0.1, 20.0])
def test_experts_that_agree_have_no_weights(scale):
    for exponents in ((1 - scale, scale), (scale, 1 - scale)):
        eps = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)).expand(2, 40, 16)
        found = blend(eps, exponents)
        assert torch.equal(found.mean, eps[0])
        assert not found.sharpening.any() and not found.disagreement.any()


def test_parts_of_the_weight_add_up_to_the_formula():
    """|E|^2 - sum b |eps|^2, and the special cases of the paper."""
    eps = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    for b in ((0.5, 2.0, -1.0), (1.0, 1.0, 1.0), (2.0, 0.1, 0.3)):
        found, exponents = blend(eps, b), torch.tensor(b, dtype=F64)[:, None, None]
        combined = (exponents * eps).sum(0)
        exact = combined.square().sum(-1) - (exponents * eps**2).sum((0, 2))
        assert torch.allclose(found.sharpening + found.disagreement, exact)
        assert torch.allclose(found.mean, combined / sum(b))
    scale = 3.0
    guided, product = blend(eps[:2], (1 - scale, scale)), blend(eps[:2], (1.0, 1.0))
    expected = scale * (scale - 1) * (eps[0] - eps[1]).square().sum(-1)
    assert torch.allclose(guided.disagreement, expected) and not guided.sharpening.any()
    assert torch.allclose(product.sharpening + product.disagreement, 2 * (eps[0] * eps[1]).sum(-1))
    cooled = blend(eps[:1], (1.5,))
    assert torch.allclose(cooled.sharpening, 0.75 * eps[0].square().sum(-1)) and not cooled.disagreement.any()


# ---------------------------------------------------------------- 8, 9, 10: interval, steps, dimension


def test_interval():
    """Weights between lambda -2 and 2 are enough here; a half of the others is not."""
    means = {
        interval: estimate(swarm, y[..., 0])[0]
        for interval in ((-2.0, 2.0), (-4.0, 0.0), (0.0, 5.0))
        for swarm, y in [result("C4", 1.0, steps=200, particles=1000, interval=interval)]
    }
    assert means[-2.0, 2.0] == pytest.approx(1.7615, abs=0.09)
    assert means[-4.0, 0.0] > 1.9 and means[0.0, 5.0] > 1.95


def test_intervals_add_up():
    level, target, middle = level_of(-1.0), level_of(0.5), -0.2
    for data_std in (0.0, 0.7, EULER):
        whole = exposure(level, target, None, data_std)
        parts = [exposure(level, target, part, data_std) for part in ((-9.0, middle), (middle, 9.0))]
        assert [sum(pair) for pair in zip(*parts, strict=True)] == pytest.approx(whole, rel=1e-9)
        assert exposure(level, target, (0.5, 2.0), data_std) == (0, 0)
        assert exposure(level, target, (-2.0, -1.0), data_std) == (0, 0)


@pytest.mark.parametrize(("data_std", "steps"), [(EULER, 25), (EULER, 50), (0.0, 25), (0.0, 50), (1.0, 100)])
def test_few_steps(data_std, steps):
    """Steps and weights that hold the same thing constant are near the target (1.7615) in few steps."""
    swarm, y = result("C4", 1.0, steps=steps, data_std=data_std)
    value, error = estimate(swarm, y[..., 0])
    assert abs(value - 1.7615) < 3 * error + 0.05


def test_dimension_ruins_weights():
    """sd(log w) = 0.12 sqrt(D) for N(0, I)^1.05."""
    for dimension in (4, 64):
        swarm, _ = drive([[(1.0, [0.0] * dimension, 1.0)]], (1.05,), 200, last=3.0, groups=4, particles=500,
                         resampling="none", data_std=1.0)  # fmt: skip
        assert swarm.log_weights.std(1).mean().item() == pytest.approx(0.12 * math.sqrt(dimension), rel=0.12)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", ["ve", "vp", "flow"])
@pytest.mark.parametrize("zeta", [0.0, 0.5, 1.0, 2.0])
def test_one_step_is_exact_for_gaussian_data(kind, zeta):
    """Any two levels, data N(3, data_std^2): mean and variance of the marginal are kept."""
    level, target = level_of(-2.0, kind), level_of(1.3, kind)
    here = level.sigma / level.alpha
    for std in (0.0, 0.4):
        step = moves(level, target, 1.0, zeta, std)
        x = level.alpha * 3 + torch.tensor([0.0, math.hypot(level.alpha * std, level.sigma)], dtype=F64)
        eps = here * (x / level.alpha - 3) / (std**2 + here**2)
        mean, one = step.move((x - level.sigma * eps) / level.alpha, eps, torch.zeros(2)).tolist()
        assert mean == pytest.approx(target.alpha * 3)
        variance = target.alpha**2 * std**2 + target.sigma**2
        assert (one - mean) ** 2 + step.noise**2 == pytest.approx(variance)


def test_steps_contain_ddim_and_ancestral_sampling_and_euler_maruyama():
    level, target = level_of(-1.0, "vp"), level_of(0.4, "vp")
    ratio = target.sigma / target.alpha / (level.sigma / level.alpha)
    assert moves(level, target, 1.0, 0.0) == pytest.approx((target.alpha, target.sigma, 0))
    ancestral = (target.alpha, target.sigma * ratio, target.sigma * math.sqrt(1 - ratio**2))
    assert moves(level, target, 1.0, 1.0) == pytest.approx(ancestral)
    high, low, zeta, total = math.exp(1.0), math.exp(-0.4), 1.5, 2.5
    step = moves(level, target, total, zeta, 1e6)
    drift = (1 + zeta**2) / 2 * total / high * (low**2 - high**2)  # y' = x0 + S ebar + drift ebar + noise
    expected = (1.0, high + drift, zeta * math.sqrt(high**2 - low**2))
    assert [part / target.alpha for part in step] == pytest.approx(expected, rel=1e-6)
    scale = (1 - (low / high) ** 2) / 2
    assert exposure(level, target, None, 1e6) == pytest.approx((scale, scale), rel=1e-6)


def test_exposure_of_constant_predictions():
    """Of a constant x0: disagreement |dx0|^2 / S^2 dlambda, and sharpening of a constant size."""
    level, target = level_of(-1.0), level_of(0.4)
    high, low = math.exp(1.0), math.exp(-0.4)
    assert exposure(level, target) == pytest.approx((1.4, (high**2 / low**2 - 1) / 2))


def test_power_of_one_over_two_without_contraction():
    """(1 + zeta^2) B = 1, where the formulas have a limit."""
    level, target = level_of(-1.0), level_of(0.4)
    near, at = (moves(level, target, total, 1.0) for total in (0.5 + 1e-9, 0.5))
    assert at == pytest.approx(near, rel=1e-6)


def test_ends_of_the_path():
    """From pure noise, and to the data: no noise, no weight; the end is the mean of the predictions."""
    pure, middle = NoiseLevel(0.0, 1.0, -1.0, 1.0), level_of(0.0, "flow")
    for level, target in ((pure, middle), (middle, CLEAN)):
        assert exposure(level, target) == (0, 0)
        assert moves(level, target, 2.0, 1.0) == (target.alpha, target.sigma, 0)
    rules = Rules((2.0, 1.0), 1, 4)
    swarm = Particles(rules, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert swarm.samples.std().item() < 1
    x0 = torch.tensor([1.0, 4.0])[:, None, None].expand(2, 4, 3)
    start = swarm.samples
    moved = swarm.step([pure, pure], pure.output(x0, start), middle)
    assert torch.allclose(moved, middle.alpha * 2.0 + middle.sigma * start)
    last = swarm.step([middle, middle], middle.output(x0, swarm.samples), CLEAN)
    assert torch.allclose(last, torch.full((4, 3), 2.0))
    assert not swarm.log_weights.any()


def test_the_prior_is_that_of_the_product():
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Particles(Rules((2.0, 2.0), 1, 5), noise).samples, noise / 2)


# ---------------------------------------------------------------- groups


def test_groups_do_not_share_their_resampling():
    """A group comes out the same beside another one, whose weights are others."""

    def run(second):
        generator = torch.Generator().manual_seed(0)
        swarm = Particles(
            Rules((-3.0, 4.0), 2, 20), torch.randn(40, 1, generator=generator, dtype=F64), generator
        )
        grid = [level_of(snr) for snr in np.linspace(-3, 3, 30)]
        for level, target in itertools.pairwise(grid):
            outputs = outputs_of([CU, CC], swarm.samples, level)
            outputs[1, 20:] *= second
            swarm.step([level, level], outputs, target)
        return swarm

    one, other = run(1.0), run(3.0)
    assert torch.equal(one.samples[:20], other.samples[:20])
    assert torch.equal(one.log_weights[0], other.log_weights[0])
    assert any(moment.resampled[0] for moment in one.history)
    assert [moment.resampled[1] for moment in one.history] != [
        moment.resampled[1] for moment in other.history
    ]


def test_everything_of_a_particle_moves_with_it():
    """Potentials and ancestors follow the parents: children of one parent differ in their noise only."""
    tilt = Tilt(lambda x0: 4000 * x0[:, 0])
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(30, 1, generator=generator, dtype=F64) * 20
    swarm = Particles(Rules((1.0,), 1, 30, tilt=tilt), noise, generator)
    first, middle, last = level_of(-3.0), level_of(0.0), level_of(2.0)
    before = swarm.samples
    x0 = before - first.sigma * eps_of(A, before, first.sigma)
    swarm.step([first], outputs_of([A], before, first), middle)
    expected = tilt.strength(first) * 4000 * x0[swarm.ancestors[0], 0]
    assert swarm.history[0].resampled == (True,)
    assert torch.allclose(swarm._potential, expected)
    swarm.step([middle], outputs_of([A], swarm.samples, middle), last)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"exponents": (1.0, -1.0)}, "sum to 0"), ({"exponents": (1.0, -2.0)}, "sum to -1"),
        ({"exponents": (math.nan,)}, "finite"), ({"exponents": (math.inf, 1.0)}, "finite"),
        ({"exponents": ()}, "finite"), ({"particles": 1}, "one particle"),
        ({"particles": 0}, "num_particles"),
        ({"particles": 2.5}, "num_particles"), ({"groups": 0}, "num_images_per_prompt"),
        ({"zeta": 0.0}, "zeta=0"), ({"zeta": -1.0}, "zeta"), ({"zeta": math.nan}, "zeta"),
        ({"resampling": "stratified"}, "systematic"), ({"ess_threshold": 1.5}, "ess_threshold"),
        ({"interval": (2.0, -2.0)}, "empty"), ({"interval": (math.nan, 1.0)}, "empty"),
        ({"data_std": -1.0}, "data_std"),
        ({"zeta": 0.0, "resampling": "none", "tilt": Tilt(lambda x0: x0, 1.0, True)}, "reward_gradient"),
    ],
)  # fmt: skip
def test_rules_refuse(options, what):
    with pytest.raises(OptionError, match=what):
        Rules(**{"exponents": (1.0,), **options})


def test_one_particle_and_no_noise_go_without_resampling():
    assert Rules((1.0,), particles=1, resampling="none").count == 1
    assert Rules((1.0,), zeta=0.0, resampling="none").zeta == 0


def test_totals_are_rounded():
    assert all(total_of((1 - b, b)) == 1 for b in (0.1, 0.3, 3.3, 7.7, 12.1))


def test_weights_that_are_not_finite_are_an_error():
    swarm = Particles(Rules((-1.0, 2.0), 1, 4), torch.zeros(4, 2))
    outputs = torch.zeros(2, 4, 2)
    outputs[0, 1] = math.nan
    with pytest.raises(UnsupportedPipeline, match="not finite"):
        swarm.step([level_of(-1.0)] * 2, outputs, level_of(0.0))

"""The formulas of APG: limits, invariances, the published ones against those of diffusers, and a toy."""

import itertools
import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from diffaccel import APG
from diffaccel.guidance import Trajectory, apg, clip_norm, combination_scale, project, take_apart
from diffaccel.noise import NoiseLevel
from diffaccel.pipelines.branches import Layout

SHAPE = (3, 4, 5, 6)
W = 5.0
EPS = NoiseLevel(0.6, 0.8, 0.0, 1.0)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def predictions(shape=SHAPE, dtype=torch.float64):
    return normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=dtype)


def dot(one, other):
    return (one * other).flatten(1).sum(1)


def guided(cond, uncond, w=W, **options):
    """The paper's result for predictions of x0."""
    return cond + (w - 1) * apg(cond - uncond, cond, **options)[0]


def step(level, cond, uncond, sample, layout=None, **options):
    return APG(**options).step(level, cond, uncond, sample, Trajectory(), layout or Layout())


def test_plain_guidance():
    cond, uncond = predictions()
    update, running = apg(cond - uncond, cond, eta=1.0)
    assert torch.equal(update, cond - uncond) and running is not None
    torch.testing.assert_close(guided(cond, uncond, eta=1.0), uncond + W * (cond - uncond))


@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_pythagoras(radius):
    cond, uncond = predictions()
    update, _ = apg(cond - uncond, cond, radius=radius)
    result = cond + (W - 1) * update
    square = dot(cond, cond)
    torch.testing.assert_close(
        dot(result, result), square + (W - 1) ** 2 * dot(update, update), rtol=1e-10, atol=0
    )
    torch.testing.assert_close(dot(result, cond), square, rtol=1e-10, atol=0)
    if radius:
        assert (dot(result, result) <= square + (W - 1) ** 2 * radius**2).all()


def test_eta_is_the_part_of_the_parallel_component():
    cond, uncond = predictions()
    delta = cond - uncond
    full, half, none = (project(delta, cond, eta, (1, 2, 3)) for eta in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half, (full + none) / 2)
    parallel = full - none
    share = dot(delta, cond) / dot(cond, cond)
    torch.testing.assert_close(parallel, share.view(-1, 1, 1, 1) * cond, rtol=1e-12, atol=1e-14)


def test_rotation_equivariance_and_no_translation_equivariance():
    cond, uncond = predictions((3, 60))
    rotation = torch.linalg.qr(normal(60, 60, seed=3)).Q
    one = guided(cond @ rotation, uncond @ rotation, radius=2.0)
    other = guided(cond, uncond, radius=2.0) @ rotation
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    moved = guided(cond + 1, uncond + 1) - 1
    assert (moved - guided(cond, uncond)).norm() > 0.1 * cond.norm()


def test_origin_at_the_mean_leaves_the_average_color_alone():
    cond, uncond = predictions()
    color = normal(3, 4, 1, 1, seed=4)
    options = {"dims": (1, 2, 3), "center": (2, 3)}
    moved = guided(cond + color, uncond + color, **options) - color
    torch.testing.assert_close(moved, guided(cond, uncond, **options))
    level, sample = NoiseLevel(0.6, 0.8, 1.0, 0.0), normal(*SHAPE)
    found = step(level, cond, uncond, sample, origin="mean")
    torch.testing.assert_close(found, apg(cond - uncond, cond, **options)[0])


def test_a_threshold_to_zero_gives_the_conditional_prediction():
    """The form of diffusers gives the unconditional one instead."""
    cond, uncond = predictions()
    radius = 1e-8
    assert (guided(cond, uncond, radius=radius) - cond).norm() < 1e-6
    theirs = normalized_guidance(cond, uncond, W, None, 0.0, radius)
    assert (theirs - uncond).norm() < 1e-6 < (theirs - cond).norm()


def test_the_formula_of_diffusers():
    """Equal in the original formulation with w - 1; else eta is -1 / (w - 1) in fact."""
    cond, uncond = predictions()
    memory, previous = MomentumBuffer(-0.5), None
    for seed in range(4):
        uncond = uncond + normal(*SHAPE, seed=seed)
        theirs = normalized_guidance(cond, uncond, W - 1, memory, 0.3, 2.0, use_original_formulation=True)
        options = {"momentum": -0.5, "eta": 0.3, "radius": 2.0}
        update, previous = apg(cond - uncond, cond, previous, **options)
        torch.testing.assert_close(cond + (W - 1) * update, theirs, rtol=1e-12, atol=1e-13)
    native = normalized_guidance(cond, uncond, W, None, 0.0)
    torch.testing.assert_close(native, guided(cond, uncond, eta=-1 / (W - 1)), rtol=1e-12, atol=1e-13)


def test_clip():
    tensor = normal(4, 30)
    norm = tensor.norm(dim=1, keepdim=True)
    radius = float(norm.median())
    clipped = clip_norm(tensor, radius, (1,))
    torch.testing.assert_close(clipped.norm(dim=1, keepdim=True), norm.clamp(max=radius))
    assert torch.equal(clipped[norm[:, 0] < radius], tensor[norm[:, 0] < radius])
    assert clip_norm(tensor, 0.0, (1,)) is tensor
    assert torch.equal(clip_norm(0 * tensor, 1.0, (1,)), 0 * tensor), "no division by zero"


def test_a_prediction_of_zero_is_no_direction():
    _, uncond = predictions()
    cond = torch.zeros_like(uncond)
    assert torch.equal(apg(cond - uncond, cond)[0], -uncond)


def test_momentum_of_a_constant_difference():
    """No moving average: the limit is 1 / (1 - beta)."""
    delta, running = torch.ones(1, 8), None
    for _ in range(60):
        _, running = apg(delta, delta, running, momentum=-0.5)
    torch.testing.assert_close(running, torch.full_like(delta, 2 / 3))


def test_trajectory():
    """One level counts once; an increase of noise begins anew, as do samples of another shape."""
    trajectory, one = Trajectory(), torch.ones(2, 3)

    def add(log_snr, value, like=one):
        previous = trajectory.previous(log_snr, like)
        trajectory.keep(value * like if previous is None else value * like - 0.5 * previous)
        return float(trajectory._running[0, 0])

    assert add(-math.inf, 1) == 1 and add(0.0, 1) == 0.5
    assert add(1.0, 1) == 0.75 and add(1.0, 2) == 1.75, "the second evaluation at a level"
    assert add(2.0, 1) == 1 - 1.75 / 2
    assert add(-1.0, 1) == 1, "more noise"
    assert add(0.0, 1) == 0.5 and add(1.0, 1, torch.ones(1, 3)) == 1


@pytest.mark.parametrize("level", [
    EPS, NoiseLevel(0.6, 0.8, -0.8, 0.6), NoiseLevel(0.3, 0.7, -1.0, 1.0), NoiseLevel(0.3, 0.7, 1.0, -1.0),
    NoiseLevel(1.0, 3.0, 0.0, 1.0), NoiseLevel(0.6, 0.8, 1.0, 0.0),
])  # fmt: skip
def test_one_formula_for_all_predictions(level):
    """u' + w (c - u') and c + g (c - u') are the paper's result in x0 space, for every w."""
    x0, eps = predictions()
    sample = level.alpha * x0 + level.sigma * eps
    cond = level.p * x0 + level.q * eps
    uncond = cond + normal(*SHAPE, seed=5)
    x0_uncond = level.x0(uncond, sample)
    torch.testing.assert_close(level.x0(cond, sample), x0)
    changed = cond - step(level, cond, uncond, sample, rescale=2.0, rescale_unit="norm", eta=0.2)
    for w in (0.5, 1.0, 5.0, 12.0):
        expected = guided(x0, x0_uncond, w, radius=2.0, eta=0.2)
        for combined in (changed + w * (cond - changed), cond + (w - 1) * (cond - changed)):
            torch.testing.assert_close(level.x0(combined, sample), expected, rtol=1e-11, atol=1e-11)


def test_x0_space_is_not_output_space():
    cond, uncond = predictions()
    sample = normal(*SHAPE)
    ours = cond + (W - 1) * step(EPS, cond, uncond, sample)
    theirs = guided(cond, uncond)
    assert 0.5 < float((ours - theirs).norm() / theirs.norm()) < 1


def test_units_of_the_threshold():
    cond, uncond = predictions()
    sample, size = normal(*SHAPE), math.prod(SHAPE[1:])
    one = step(EPS, cond, uncond, sample, rescale=0.2)
    other = step(EPS, cond, uncond, sample, rescale=0.2 * math.sqrt(size), rescale_unit="norm")
    torch.testing.assert_close(one, other)
    assert APG.presets["sdxl"]["rescale"] == pytest.approx(15 / math.sqrt(4 * 128 * 128), rel=1e-3)


@pytest.mark.parametrize("layout", [Layout(), Layout(channel=2, frame=1)])
def test_frames_are_samples(layout):
    shape = (2, 4, 3, 5, 6)
    cond, uncond = predictions(shape)
    sample, options = normal(*shape), {"dims": "frame", "rescale": 0.1, "origin": "mean"}
    result = step(EPS, cond, uncond, sample, layout=layout, **options)
    flat = [x.movedim(layout.frame, 1).flatten(0, 1) for x in (cond, uncond, sample)]
    alone = step(EPS, *flat, **{**options, "dims": "all"})
    torch.testing.assert_close(result.movedim(layout.frame, 1).flatten(0, 1), alone)


@pytest.mark.parametrize("level", [
    NoiseLevel(0.0, 1.0, 0.0, 1.0), NoiseLevel(1.0, 0.0, 0.0, 1.0), NoiseLevel(1.0, 0.0, -1.0, 1.0)
])  # fmt: skip
def test_singular_levels_are_left_to_the_pipeline(level):
    cond, uncond = predictions()
    assert step(level, cond, uncond, normal(*SHAPE)) is None


def test_half_precision_computes_in_float32():
    cond, uncond = predictions(dtype=torch.bfloat16)
    sample = normal(*SHAPE, dtype=torch.bfloat16)
    result = step(EPS, cond, uncond, sample)
    exact = step(EPS, cond.double(), uncond.double(), sample.double())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("w", [1.5, 7.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_take_apart(w, dtype):
    cond, uncond = predictions(dtype=dtype)
    output = uncond + w * (cond - uncond)
    tolerance = {"rel": 0.02 if dtype is torch.bfloat16 else 1e-5}
    for first, second in ((cond, uncond), (uncond, cond)):
        parts = take_apart(first, second, output)
        assert parts is not None and parts.cond is cond and parts.uncond is uncond
        assert parts.scale == pytest.approx(w, **tolerance)
    assert float(combination_scale(uncond, cond, output)) == pytest.approx(w, **tolerance)


def test_what_cannot_be_taken_apart():
    cond, uncond = predictions()
    output = uncond + W * (cond - uncond)
    assert take_apart(cond, uncond, 0.7 * output) is None, "rescaled"
    assert take_apart(cond, uncond, output + normal(*SHAPE, seed=7)) is None, "a third part"
    assert take_apart(cond, uncond, -output) is None
    assert take_apart(cond, uncond, (cond + uncond) / 2) is None, "both orders explain it"
    assert take_apart(cond, cond.clone(), cond) is None
    assert float(combination_scale(cond, cond.clone(), cond)) == 0


def sample_of_the_toy(w, steps=50, count=500, size=64, **options):
    """Euler steps of a flow between two classes N(off +- 3 e1, 1/4) with off = 2 e2, guided to the first."""
    x = normal(count, size)
    means = torch.zeros(2, size, dtype=torch.float64)
    means[:, 0], means[:, 1] = torch.tensor([3.0, -3.0]), 2.0
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, after in itertools.pairwise(times):
        variance = (1 - t) ** 2 / 4 + t**2
        rest = x[:, None] - (1 - t) * means
        x0 = means + (1 - t) / 4 / variance * rest
        posterior = torch.softmax(-rest.square().sum(2) / (2 * variance), 1)
        x0 = torch.stack([x0[:, 0], (posterior[:, :, None] * x0).sum(1)])
        cond, uncond = (x - x0) / t  # the velocity eps - x0
        difference = step(NoiseLevel(1 - t, t, -1.0, 1.0), cond, uncond, x, **options)
        x = x + (after - t) * (cond + (w - 1) * difference)
    return [float(x.norm(dim=1).mean()), float(x[:, 0].mean()), float(x[:, 1].mean())]


@pytest.mark.parametrize(
    ("w", "options", "expected"),
    [
        (1, {"eta": 1.0}, [5.30, 3.01, 1.995]),
        (10, {"eta": 1.0}, [6.17, 4.37, 1.995]),
        (10, {}, [5.36, 3.66, 1.007]),
        (10, {"rescale": 1.0, "rescale_unit": "norm"}, [5.28, 3.42, 1.39]),
    ],
)
def test_saturation(w, options, expected):
    """The mean norm, the guided coordinate, and one that guidance should not touch but does."""
    assert sample_of_the_toy(w, **options) == pytest.approx(expected, abs=0.03)

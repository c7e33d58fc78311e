"""The formulas of distribution matching: their gradient, their fixed point, and subintervals of noise."""

import math

import pytest
import torch
from torch.nn import functional

from diffaccel.distill.matching import (
    FLOOR,
    Levels,
    fake_loss,
    kl_weight,
    matching_gradient,
    pseudo_pair,
    straight,
    subinterval_weight,
    surrogate,
    transition,
)
from diffaccel.errors import OptionError

MEAN, STD = 1.3, 0.7  # the teacher's Gaussian
KINDS = ["flow", "vp"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def levels(kind, t):
    """Levels at times: of the straight path, of a cosine one, or sigma = 3 t."""
    t = torch.as_tensor(t, dtype=torch.float64)
    if kind == "flow":
        return straight(t)
    if kind == "ve":
        return Levels(torch.ones_like(t), 3 * t)
    alpha = torch.cos(math.pi * t / 2)
    return Levels(alpha, (-torch.expm1(2 * alpha.log())).sqrt())


def hermite(count):
    """Nodes and weights of a standard normal: two dimensions, flat."""
    import numpy

    nodes, weights = (torch.from_numpy(part) for part in numpy.polynomial.hermite_e.hermegauss(count))
    weights = weights / weights.sum()
    z, e = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.flatten(), e.flatten(), (weights[:, None] * weights).flatten()


def gaussian_x0(x_t, t, mean, variance):
    """E[x0 | x_t] where x_t is N(mean, variance): (x_t + sigma^2 score) / alpha."""
    return (x_t + t.sigma**2 * (mean - x_t) / variance) / t.alpha


def gaussian_step(kind, s, t, a, b, z, e):
    """x_s = a z + b, and what teacher and fake score say of x_t."""
    between = transition(kind, s, t)
    x_s = a * z + b
    x_t = (between.alpha * x_s + between.sigma * e).detach()
    a_d, b_d = (float(torch.as_tensor(part, dtype=torch.float64).detach()) for part in (a, b))
    real = gaussian_x0(x_t, t, t.alpha * MEAN, t.alpha**2 * STD**2 + t.sigma**2)
    fake = gaussian_x0(x_t, t, between.alpha * b_d, between.alpha**2 * a_d**2 + between.sigma**2)
    return x_s, x_t, real, fake


def weighted(gradient, x_s, weights):
    return surrogate((gradient * weights * len(weights))[:, None], x_s[:, None])


def mean_kl(kind, s, times, a, b):
    """The mean over t of KL(student || teacher), in closed form."""
    t = levels(kind, times)
    between = transition(kind, s, t)
    own = between.alpha**2 * a**2 + between.sigma**2
    other = t.alpha**2 * STD**2 + t.sigma**2
    apart = between.alpha * b - t.alpha * MEAN
    return (0.5 * ((other / own).log() + (own + apart**2) / other - 1)).mean()


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0.0, 0.5, 0.8333])
def test_gradient_is_that_of_the_divergence(kind, start):
    """Check A of DMD2 at s = 0, check C of Phased DMD at the others: to 1e-10, in both forms."""
    a, b = double(0.4)[0].requires_grad_(), double(-0.6)[0].requires_grad_()
    s, (z, e, weights) = levels(kind, [start]), hermite(40)
    times = start + (1 - start) * torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    total = 0
    for time in times:
        t = levels(kind, [float(time)])
        x_s, x_t, real, fake = gaussian_step(kind, s, t, a, b, z, e)
        by_x0 = matching_gradient(real[:, None], fake[:, None], x_s[:, None], kl_weight(kind, s, t))[:, 0]
        velocities = [(x_t - t.alpha * x0) / t.sigma - x0 for x0 in (real, fake)]
        factor = t.alpha * transition(kind, s, t).alpha / (t.alpha * t.sigma + t.sigma**2)
        torch.testing.assert_close(factor * (velocities[0] - velocities[1]), by_x0, atol=1e-11, rtol=1e-9)
        total = total + weighted(by_x0, x_s, weights) / len(times)
    found = torch.autograd.grad(total, (a, b))
    exact = torch.autograd.grad(mean_kl(kind, s, times, a, b), (a, b))
    for mine, other in zip(found, exact, strict=True):
        assert abs(mine - other) < 1e-10


def test_gradient_of_samples_is_that_of_the_divergence():
    """Check A of DMD2 by Monte Carlo: within three standard errors."""
    a, b, count = 0.4, -0.6, 200_000
    z, e = normal(count), normal(count, seed=1)
    times = 0.02 + 0.96 * torch.rand(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s, t = levels("flow", torch.zeros(count)), levels("flow", times)
    x_s, _, real, fake = gaussian_step("flow", s, t, a, b, z, e)
    gradient = matching_gradient(real[:, None], fake[:, None], x_s[:, None], kl_weight("flow", s, t))[:, 0]
    grid = torch.linspace(0.02, 0.98, 4001, dtype=torch.float64)
    point = [double(a)[0].requires_grad_(), double(b)[0].requires_grad_()]
    exact = torch.autograd.grad(mean_kl("flow", levels("flow", [0.0]), grid, *point), point)
    for part, wanted in zip((gradient * z, gradient), exact, strict=True):
        assert abs(part.mean() - wanted) < 3 * part.std() / count**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_zero_at_the_teacher(kind):
    """Check B of DMD2: at every sample and time, by any normalizer."""
    z, e = normal(64), normal(64, seed=1)
    s = levels(kind, [0.0])
    for time in (0.02, 0.3, 0.7, 0.98):
        t = levels(kind, [time])
        x_s, _, real, fake = gaussian_step(kind, s, t, STD, MEAN, z, e)
        for weight in (None, kl_weight(kind, s, t).expand(64)):
            assert matching_gradient(real[:, None], fake[:, None], x_s[:, None], weight).abs().max() < 1e-9


@pytest.mark.parametrize("start", [0.0, 0.5, 0.8333])
@pytest.mark.parametrize("kind", KINDS)
def test_descent_finds_the_teacher_at_the_level(kind, start):
    """Check C of Phased DMD: |a| = hypot(a_s 0.7, s_s), b = 1.3 a_s, to 1e-5; B of DMD2 at s = 0."""
    s, (z, e, weights) = levels(kind, [start]), hermite(8)
    times = [start + (1 - start) * part for part in (0.05, 0.2, 0.4, 0.6, 0.8)]
    point = double(0.1, -2.0).requires_grad_()
    optimizer = torch.optim.LBFGS([point], lr=0.5, max_iter=300, tolerance_change=1e-14, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        total = 0
        for time in times:
            t = levels(kind, [time])
            x_s, _, real, fake = gaussian_step(kind, s, t, *point, z, e)
            gradient = matching_gradient(real[:, None], fake[:, None], x_s[:, None], kl_weight(kind, s, t))
            total = total + weighted(gradient[:, 0], x_s, weights)
        total.backward()
        return total

    optimizer.step(closure)
    a, b = abs(point[0].item()), point[1].item()
    assert a == pytest.approx(math.hypot(float(s.alpha) * STD, float(s.sigma)), abs=1e-5)
    assert b == pytest.approx(MEAN * float(s.alpha), abs=1e-5)


def test_stochastic_descent_finds_the_teacher():
    """Check B of DMD2 with its normalizer; in one dimension that has to be of the batch."""
    point = double(0.1, -2.0).requires_grad_()
    optimizer = torch.optim.Adam([point], lr=2e-2)
    source, s = torch.Generator().manual_seed(0), levels("flow", [0.0])
    for step in range(2000):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 if step < 1400 else 2e-3
        z, e = torch.randn(2, 128, generator=source, dtype=torch.float64)
        time = 0.02 + 0.96 * torch.rand(128, generator=source, dtype=torch.float64)
        x_s, _, real, fake = gaussian_step("flow", s, levels("flow", time), *point, z, e)
        gradient = matching_gradient(real[None], fake[None], x_s[None])
        optimizer.zero_grad()
        surrogate(gradient, x_s[None]).backward()
        optimizer.step()
    assert abs(point[0].item()) == pytest.approx(STD, abs=5e-3)
    assert point[1].item() == pytest.approx(MEAN, abs=5e-3)


def test_surrogate_is_the_gradient_over_the_number():
    """Check D of DMD2: to 1e-6 in float32; its value is half the mean square, as that of a pseudo-target."""
    x, g = normal(4, 3, 8, 8, dtype=torch.float32).requires_grad_(), normal(4, 3, 8, 8, seed=1).float()
    loss = surrogate(g, x)
    found = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(found, g / x.numel(), atol=1e-6 / x.numel(), rtol=1e-6)
    other = 0.5 * (x - (x - g).detach()).square().mean()
    torch.testing.assert_close(torch.autograd.grad(other, x)[0], found, atol=1e-6 / x.numel(), rtol=1e-4)
    torch.testing.assert_close(loss, other)


@pytest.mark.parametrize(("size", "lost"), [(0.1, 0.01), (0.01, 0.1), (0.001, 0.5)])
def test_bfloat16_does_not_lose_the_gradient(size, lost):
    """Check D of DMD2, and trap 1 of other code: a pseudo-target in bfloat16 does."""
    x = normal(8, 512, dtype=torch.float32).bfloat16().requires_grad_()
    real = x.detach().float() + normal(8, 512, seed=1).float()
    fake = real + size * normal(8, 512, seed=2).float() * (x.detach().float() - real).abs().mean()
    g = matching_gradient(real, fake, x)
    assert g.dtype == torch.float32
    found = torch.autograd.grad(surrogate(g, x), x)[0].float() * x.numel()
    assert (found - g).norm() < 0.01 * g.norm()
    pseudo = functional.mse_loss(x, (x - g.bfloat16()).detach()) / 2
    bad = torch.autograd.grad(pseudo, x)[0].float() * x.numel()
    assert (bad - g).norm() > lost * g.norm()


def test_normalizer_is_of_each_sample():
    """Trap 9 of other code, and gradients that are not finite."""
    real, fake, x = normal(3, 5), normal(3, 5, seed=1), normal(3, 5, seed=2)
    found = matching_gradient(real, fake, x)
    alone = torch.cat([matching_gradient(real[n : n + 1], fake[n : n + 1], x[n : n + 1]) for n in range(3)])
    assert torch.equal(found, alone)
    expected = (fake - real) / ((x - real).abs().mean(1, keepdim=True) + FLOOR)
    torch.testing.assert_close(found, expected)
    assert matching_gradient(real, fake * math.nan, x).abs().max() == 0
    assert matching_gradient(x, x, x).abs().max() == 0


# ---------------------------------------------------------------- subintervals

WEIGHTS_K, MEANS, STDS = double(0.2, 0.3, 0.1, 0.4), double(-1.5, -0.3, 0.6, 2), double(0.15, 0.4, 0.25, 0.6)


WRONG = {
    ("flow", 0.3): [0.29, 0.49, 0.63],
    ("flow", 0.5): [0.36, 0.61, 0.59],
    ("flow", 0.8333): [0.40, 0.53, 0.46],
    ("vp", 0.3): [0.12, 0.16, 0.16],
    ("vp", 0.5): [0.16, 0.25, 0.21],
    ("vp", 0.8333): [0.26, 0.37, 0.31],
}
"""How wrong scores are of a target e' - x_s, of x_s as clean samples, and of x_s as x0; the card's."""


def posterior(x_t, alpha, sigma):
    """Score of x_t = alpha x_s + sigma e, E[x_s | x_t], E[e | x_t] and density, for x_s of a mixture."""
    variance = alpha**2 * STDS**2 + sigma**2
    apart = x_t[:, None] - alpha * MEANS
    parts = WEIGHTS_K.log() - 0.5 * variance.log() - apart**2 / (2 * variance)
    share, density = parts.softmax(1), parts.logsumexp(1).exp()
    score = (share * -apart / variance).sum(1)
    x_s = (share * (MEANS + alpha * STDS**2 / variance * apart)).sum(1)
    return score, x_s, (x_t - alpha * x_s) / sigma, density


def relative(found, exact, density=1.0):
    return float(((density * (found - exact) ** 2).sum() / (density * exact**2).sum()).sqrt())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0.3, 0.5, 0.8333])
def test_pseudo_pairs_have_the_right_minimizer(kind, start):
    """Check A of Phased DMD: flow, eps, x0 and v to 1e-10; and three wrong targets do not."""
    x, s, wrong = torch.linspace(-6, 6, 241, dtype=torch.float64), levels(kind, [start]), []
    for time in torch.linspace(start + 0.02, 0.99, 25).tolist():
        t = levels(kind, [time])
        alpha, sigma = t
        between = transition(kind, s, t)
        score, mean, noise, density = posterior(x, *between)
        x0, eps = (part[:, 0] for part in pseudo_pair(kind, mean[:, None], noise[:, None], *(
            Levels(level.alpha.expand(241), level.sigma.expand(241)) for level in (s, t))))  # fmt: skip
        exact_x0, exact_eps = (x + sigma**2 * score) / alpha, -sigma * score
        assert relative(x0, exact_x0) < 1e-10 and relative(eps, exact_eps) < 1e-10
        flow = -(sigma + sigma**2 / alpha) * score - x / alpha
        assert relative(eps - x0, flow) < 1e-10
        assert relative(alpha * eps - sigma * x0, alpha * exact_eps - sigma * exact_x0) < 1e-10
        implied = -((noise - mean) + x / alpha) / (sigma + sigma**2 / alpha)
        clean = posterior(x, alpha, sigma)[0]
        wrong.append([relative(found, score, density) for found in
                      (implied, clean, (alpha * mean - x) / sigma**2)])  # fmt: skip
    assert torch.tensor(wrong).mean(0).tolist() == pytest.approx(WRONG[kind, start], abs=0.01)


def test_pseudo_pairs_of_clean_samples_are_the_pairs():
    """Check B of Phased DMD: to the bit at s = 0; x_t is that of the pair at any s, to 1e-6."""
    x_s, noise = normal(32, 3, dtype=torch.float32), normal(32, 3, seed=1, dtype=torch.float32)
    times = torch.linspace(0.6, 0.999, 32)
    for kind in ("flow", "vp", "ve"):
        s, t = (levels(kind, part) for part in (torch.zeros(32), times))
        x0, eps = pseudo_pair(kind, x_s, noise, s, t)
        assert torch.equal(x0, x_s) and torch.equal(eps, noise)
        for start in (0.3, 0.5):
            s = levels(kind, torch.full((32,), start))
            between = transition(kind, s, t)
            x0, eps = pseudo_pair(kind, x_s.double(), noise.double(), s, t)
            x_t = between.alpha[:, None] * x_s + between.sigma[:, None] * noise
            joined = t.alpha[:, None] * x0 + t.sigma[:, None] * eps
            torch.testing.assert_close(joined, x_t, atol=1e-6, rtol=1e-6)
    assert pseudo_pair("flow", x_s.bfloat16(), noise.bfloat16(), s, t)[0].dtype == torch.float32


def test_fresh_noise_needs_no_pseudo_pair():
    """Check B of Phased DMD: samples that reach s with fresh noise have at t the scores of x0 led to t."""
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    for kind in KINDS:
        s, t = levels(kind, [0.6]), levels(kind, [0.8])
        between = transition(kind, s, t)
        straight_on = posterior(x, *t)[0]
        alpha, sigma = between.alpha * s.alpha, torch.hypot(between.alpha * s.sigma, between.sigma)
        variance = alpha**2 * STDS**2 + sigma**2
        apart = x[:, None] - alpha * MEANS
        share = (WEIGHTS_K.log() - 0.5 * variance.log() - apart**2 / (2 * variance)).softmax(1)
        torch.testing.assert_close((share * -apart / variance).sum(1), straight_on, atol=1e-12, rtol=1e-12)


def test_coefficients():
    """Check G of Phased DMD: the forms agree, and are finite in float32 at both ends."""
    for kind in ("flow", "vp", "ve"):
        s, t = levels(kind, [0.3, 0.5, 0.8333]), levels(kind, [0.4, 0.9, 0.99])
        between = transition(kind, s, t)
        torch.testing.assert_close(between.alpha, t.alpha / s.alpha)
        torch.testing.assert_close(between.sigma**2, t.sigma**2 - between.alpha**2 * s.sigma**2)
    s = straight(torch.tensor([0.8333]))
    for time in (0.8343, 0.999):
        t = straight(torch.tensor([time]))
        x0, eps = pseudo_pair("flow", torch.ones(1, 2), torch.ones(1, 2), s, t)
        assert torch.isfinite(torch.cat([x0, eps])).all() and kl_weight("flow", s, t) > 0
    exact = transition("flow", straight(double(0.8333)), straight(double(0.8343))).sigma
    near = transition("flow", s, straight(torch.tensor([0.8343]))).sigma
    assert near == pytest.approx(float(exact), rel=1e-3)
    with pytest.raises(OptionError, match="no kind"):
        transition("edm", s, s)


def test_weights():
    """Check G of Phased DMD: min(1, 10 s_{t|s}^2); "eps" makes the target's noise that of unit variance."""
    between, unit = double(0.1, 0.3, 0.9), double(4.0, 2.0, 1.0)
    clamped = subinterval_weight("clamp", between, unit)
    torch.testing.assert_close(clamped, double(0.1, 0.9, 1.0))
    paper = (1 / between**2).clamp(0, 10) * between**2
    torch.testing.assert_close(clamped, paper)
    assert torch.equal(subinterval_weight("clamp", between, unit, math.inf), torch.ones(3).double())
    assert torch.equal(subinterval_weight("none", between, unit), torch.ones(3).double())
    torch.testing.assert_close(subinterval_weight("eps", between, unit), double(1 / 16, 1 / 4, 1))
    s, t = straight(double(0.5)), straight(double(0.7))
    sigma = transition("flow", s, t).sigma
    x_s = -sigma / transition("flow", s, t).alpha  # at x_t = 0 and e' = 1
    x0, eps = pseudo_pair("flow", x_s[:, None], double(1.0)[:, None], s, t)
    target = (eps - x0)[:, 0]
    torch.testing.assert_close(target, (t.sigma + t.sigma**2 / t.alpha) / sigma)
    with pytest.raises(OptionError, match="no weight"):
        subinterval_weight("snr", between, unit)
    loss = fake_loss(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([1.0, 3.0]))
    assert loss.shape == () and loss == 2

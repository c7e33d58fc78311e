"""One step and its order against formulas written out here, references and closed forms."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from toy_mixture import HIGH, LOW, START, drive, ending, log_grid, rms, solver

from diffaccel.samplers import SOLVERS, Schedule, Step, solver_schedule
from diffaccel.samplers.exponential import Level, combine, phi
from diffaccel.samplers.grids import karras

RATIOS, TARGET = (0.8, 1.7, 3.1, 6.0), 0.45  # newest first


# ---------------------------------------------------------------- phi


@pytest.mark.parametrize("k", range(6))
def test_phi(k):
    mpmath.mp.dps = 110  # at z = 1e-9 and k = 5 half of them cancel
    sizes = (1e-9, 1e-7, 1e-3, 9.9e-3, 0.1, 0.5, 1, 1.99, 2.0, 2.01, 3, 7, 25)
    for z in [sign * size for size in sizes for sign in (1, -1)]:
        power = mpmath.mpf(z)
        expected = (mpmath.exp(power) - sum(power**j / mpmath.factorial(j) for j in range(k))) / power**k
        assert abs(phi(k, z) / expected - 1) < 1e-14, (k, z)
    assert phi(k, 0.0) == 1 / math.factorial(k)


# ---------------------------------------------------------------- reductions


def vp(ratio):
    return Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))


def flow(ratio):
    return Level(1 / (1 + ratio), ratio / (1 + ratio))


PATHS = {"vp": vp, "ve": lambda ratio: Level(1.0, ratio), "flow": flow}


class History:
    """Four nodes with random x0 and eps, and the usual abbreviations."""

    def __init__(self, path="vp", seed=0):
        rng = np.random.default_rng(seed)
        self.levels, self.t = [PATHS[path](ratio) for ratio in RATIOS], PATHS[path](TARGET)
        self.d, self.e = rng.standard_normal((2, 4, 5))
        self.s = self.levels[0]
        self.x = self.s.alpha * self.d[0] + self.s.sigma * self.e[0]
        lams = [-math.log(ratio) for ratio in RATIOS]
        self.h = -math.log(TARGET) - lams[0]
        self.r = [(lam - lams[0]) / self.h for lam in lams[1:]]  # negative

    def __call__(self, step, order=None):
        rule = combine(step, self.levels, self.t, order or step.order)
        return rule.sample * self.x + np.array(rule.x0) @ self.d + np.array(rule.eps) @ self.e


def ddim(k):
    return k.t.alpha * k.d[0] + k.t.sigma * k.e[0]


def midpoint(k):
    slope = (k.d[0] - k.d[1]) / (-2 * k.r[0])
    return k.t.sigma / k.s.sigma * k.x + k.t.alpha * (1 - math.exp(-k.h)) * (k.d[0] + slope)


def heun(k):
    first = k.t.sigma / k.s.sigma * k.x + k.t.alpha * (1 - math.exp(-k.h)) * k.d[0]
    return first + k.t.alpha * (k.h - 1 + math.exp(-k.h)) * (k.d[0] - k.d[1]) / (-k.r[0] * k.h)


def midpoint_eps(k):
    slope = (k.e[0] - k.e[1]) / (-2 * k.r[0])
    return k.t.alpha / k.s.alpha * k.x - k.t.sigma * math.expm1(k.h) * (k.e[0] + slope)


def lagrange(points, j, z):
    return math.prod((z - p) / (points[j] - p) for i, p in enumerate(points) if i != j)


def deis(k, order):
    """Adams-Bashforth on eps in the ratio, interpolated in its logarithm."""
    logs = [math.log(ratio) for ratio in RATIOS[:order]]
    weights = [quad(lambda rho, j=j: lagrange(logs, j, math.log(rho)), RATIOS[0], TARGET, epsabs=1e-14,
                    epsrel=1e-14)[0] for j in range(order)]  # fmt: skip
    return k.t.alpha * (k.x / k.s.alpha + np.array(weights) @ k.e[:order])


def unip(k, order, kind):
    """UniP of the paper: sum_j rho_j r_j^(i - 1) = i! phi-terms / B."""
    z = -k.h
    scale = z if kind == "bh1" else math.expm1(z)
    term, right = math.expm1(z) / z - 1, []
    for i in range(1, order):
        right.append(term * math.factorial(i) / scale)
        term = term / z - 1 / math.factorial(i + 1)
    r = np.array(k.r[: order - 1])
    rho = [0.5] if order == 2 else np.linalg.solve(np.vander(r, order - 1, increasing=True).T, right)
    slopes = np.stack([(k.d[j + 1] - k.d[0]) / r[j] for j in range(order - 1)])
    first = k.t.sigma / k.s.sigma * k.x - k.t.alpha * math.expm1(z) * k.d[0]
    return first - k.t.alpha * scale * (np.array(rho) @ slopes)


def diffusers_3m(k):
    """Third order as diffusers has it."""
    r0, r1 = -k.r[0], k.r[0] - k.r[1]
    a, b = (k.d[0] - k.d[1]) / r0, (k.d[1] - k.d[2]) / r1
    first, second, e = a + r0 / (r0 + r1) * (a - b), (a - b) / (r0 + r1), math.exp(-k.h)
    result = k.t.sigma / k.s.sigma * k.x - k.t.alpha * (e - 1) * k.d[0]
    result = result + k.t.alpha * ((e - 1) / k.h + 1) * first
    return result - k.t.alpha * ((e - 1 + k.h) / k.h**2 - 0.5) * second


def theta_ab(k, order, std):
    """Adams-Bashforth on F in the angle."""
    angles = [math.atan2(ratio, std) for ratio in (TARGET, *RATIOS)]
    outputs = [math.sin(a) * d / std - math.cos(a) * e for a, d, e in zip(angles[1:], k.d, k.e, strict=True)]
    nodes = angles[1 : order + 1]
    weights = [quad(lambda a, j=j: lagrange(nodes, j, a), angles[1], angles[0], epsabs=1e-15)[0]
               for j in range(order)]  # fmt: skip
    v = k.x / k.s.alpha / math.hypot(std, RATIOS[0]) - np.array(weights) @ np.stack(outputs[:order])
    return k.t.alpha * math.hypot(std, TARGET) * v


REDUCTIONS = {
    "ddim": (Step(1, "epsilon"), ddim),
    "dpm++1": (Step(1), ddim),
    "dpm++2m": (SOLVERS["dpm++2m"], midpoint),
    "dpm++2m-heun": (SOLVERS["dpm++2m-heun"], heun),
    "dpm++3m-damped": (Step(3, damping=0.5), diffusers_3m),
    "dpmsolver-2": (Step(2, "epsilon", scaling="bh2"), midpoint_eps),
    "deis2": (SOLVERS["deis2"], lambda k: deis(k, 2)),
    "deis3": (SOLVERS["deis3"], lambda k: deis(k, 3)),
    "deis4": (Step(4, "epsilon"), lambda k: deis(k, 4)),
    "unip2-bh1": (Step(2, scaling="bh1"), lambda k: unip(k, 2, "bh1")),
    "unip2-bh2": (SOLVERS["unip2"], lambda k: unip(k, 2, "bh2")),
    "unip3-bh1": (Step(3), lambda k: unip(k, 3, "bh1")),
    "unip3-bh2": (Step(3), lambda k: unip(k, 3, "bh2")),
    "unip4-bh1": (Step(4), lambda k: unip(k, 4, "bh1")),
    "unip4-bh2": (Step(4), lambda k: unip(k, 4, "bh2")),
    "theta2": (Step(2, "theta"), lambda k: theta_ab(k, 2, 0.5)),
    "theta4": (Step(4, "theta"), lambda k: theta_ab(k, 4, 0.5)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name, path):
    step, formula = REDUCTIONS[name]
    k = History(path)
    np.testing.assert_allclose(k(step), formula(k), rtol=0, atol=1e-12)


def test_third_order_differs_from_diffusers_by_half_a_second_derivative():
    k = History()
    lams = [-math.log(ratio) for ratio in RATIOS[:3]]
    slopes = [(k.d[j] - k.d[j + 1]) / (lams[j] - lams[j + 1]) for j in range(2)]
    second = 2 * (slopes[0] - slopes[1]) / (lams[0] - lams[2])
    expected = k.t.alpha * k.h**3 * phi(3, -k.h) * second / 2
    np.testing.assert_allclose(k(Step(3)) - diffusers_3m(k), expected, rtol=0, atol=1e-12)
    assert np.abs(expected).max() > 1e-3


def test_stencil_is_exact_for_polynomials_from_any_start():
    """f of degree 2 in lambda: order 3 is exact for any three nodes and any start."""
    lams = np.array([-math.log(ratio) for ratio in RATIOS])
    f = lambda lam: 0.3 - 1.1 * lam + 0.7 * lam**2  # noqa: E731
    exact = lambda s, t: quad(lambda u: math.exp(u) * f(u), s, t, epsabs=1e-14)[0]  # noqa: E731
    end = -math.log(TARGET)
    for start, points in ((0, None), (0, (1, 3)), (1, (0, 2)), (2, None), (3, (2, 1)), (1, (1, 0, 3))):
        step = Step(3, points=points, start=start)
        rule = combine(step, [vp(ratio) for ratio in RATIOS], vp(TARGET), 3)
        x = 0.9  # y' = f - y, so that e^lambda y grows by the integral of e^lambda f
        truth = math.exp(lams[start] - end) * x + math.exp(-end) * exact(lams[start], end)
        level = vp(RATIOS[start])
        result = (rule.sample * level.alpha * x + np.array(rule.x0) @ f(lams)) / vp(TARGET).alpha
        assert abs(result - truth) < 1e-12


def test_more_nodes_may_estimate_the_first_derivative():
    """With three nodes beside the start, the first derivative of a cubic is exact."""
    lams = np.array([-math.log(ratio) for ratio in RATIOS])
    rule = combine(Step(2, estimate=3), [vp(ratio) for ratio in RATIOS], vp(TARGET), 2)
    h = -math.log(TARGET) - lams[0]
    expected = vp(TARGET).alpha * h**2 * phi(2, -h) * 3  # f = (lambda - lambda_s)^3 + 3 (lambda - lambda_s)
    values = (lams - lams[0]) ** 3 + 3 * (lams - lams[0])
    assert abs(np.array(rule.x0) @ values - expected) < 1e-12


# ---------------------------------------------------------------- orders


def repeated(step, sigmas, exact_start=True):
    """A schedule of one step; with an exact start, the first two are not corrected."""
    steps = []
    for n in range(len(sigmas) - 1):
        order = min(step.order, n + 1)
        corrector = step.corrector and n < len(sigmas) - 2 and (n >= 2 or not exact_start)
        steps.append(
            Step(order, step.prediction, step.scaling if order <= 2 else "none", corrector=corrector)
        )
    return Schedule(sigmas, tuple(steps))


def slope(step, counts, rough=False, exact_start=True):
    schedules = [repeated(step, log_grid(count, rough=rough), exact_start) for count in counts]
    errors = [rms(drive(schedule, exact_nodes=3 if exact_start else 1) - ending()) for schedule in schedules]
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "theta"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_from_an_exact_start(order, prediction, rough):
    found = slope(Step(order, prediction), (256, 512) if order == 4 else (128, 256), rough)
    assert found >= 3.8 if order == 4 else abs(found - order) < 0.12


@pytest.mark.parametrize("step", [Step(2, scaling="bh2"), Step(2, "epsilon"), Step(3), Step(3, "epsilon")])
def test_order_on_the_grid_of_karras(step):
    errors = []
    for count in (128, 256):
        sigmas = tuple(karras(count + 1, HIGH, LOW, 7.0).tolist())
        errors.append(rms(drive(repeated(step, sigmas), exact_nodes=3) - ending()))
    assert abs(math.log2(errors[0] / errors[1]) - step.order) < 0.12


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_corrector_adds_an_order(order):
    found = slope(Step(order, scaling="bh2" if order < 3 else "none", corrector=True), (128, 256))
    assert order + 1 - 0.15 < found < order + 1.4


@pytest.mark.parametrize(("order", "corrector"), [(2, False), (3, False), (4, False), (2, True), (3, True)])
def test_order_from_a_start_of_order_1(order, corrector):
    """The first step limits the order; this is not a mistake."""
    found = slope(Step(order, corrector=corrector), (256, 512), exact_start=False)
    assert found > 2.85 if corrector else abs(found - 2) < 0.12


def test_a_midpoint_step_at_the_start_keeps_the_third_order():
    """From node 0 to 1 by order 1, then again from node 0 to 2 by order 2."""

    def error(count):
        sigmas = log_grid(count)
        steps = [Step(1), Step(2, start=1, points=(0,)), *[Step(3)] * (count - 2)]
        return rms(drive(Schedule(sigmas, tuple(steps))) - ending())

    assert math.log2(error(256) / error(512)) > 2.85


def test_bh2_keeps_order_2_and_relaxation_lowers_order_3():
    assert abs(slope(Step(2, scaling="bh1"), (128, 256)) - 2) < 0.12
    steps = tuple(Step(min(3, n + 1), relaxation=0.1 if n else 0.0) for n in range(256))
    errors = [rms(drive(Schedule(log_grid(count), steps[:count]), exact_nodes=3) - ending())
              for count in (128, 256)]  # fmt: skip
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.15


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("name", [n for n in SOLVERS])
def test_paths_agree(name):
    """VP, VE and flow of the same ratios, whatever the network predicts."""
    schedule = solver_schedule(name, (*log_grid(9), 0.0))
    expected = drive(schedule, "vp")
    for kind, prediction in (("ve", "epsilon"), ("flow", "flow_prediction"), ("flow", "epsilon"),
                             ("vp", "v_prediction"), ("vp", "sample")):  # fmt: skip
        assert np.abs(drive(schedule, kind, prediction) - expected).max() < 1e-10


@pytest.mark.parametrize("kind", ["noise", "mean"])
def test_paths_agree_about_the_analytic_first_step(kind):
    schedule = Schedule((*log_grid(5), 0.0), (Step(), *[Step(2)] * 4, Step()), kind)
    expected = drive(schedule, "vp")
    for path, prediction in (("ve", "epsilon"), ("flow", "flow_prediction"), ("vp", "v_prediction")):
        assert np.abs(drive(schedule, path, prediction) - expected).max() < 1e-10


@pytest.mark.parametrize("kind", ["noise", "mean"])
def test_analytic_first_step_is_exact_from_pure_noise(kind):
    """Against the evaluation of Gaussian data, x0 = c^2 / (c^2 + S^2) y: what is missing falls as 1 / S."""
    c, errors = 0.37, []
    for high in (30.0, 300.0, 3000.0):
        schedule = Schedule((high, 1.0, 0.0), (Step(), Step()), kind)
        scheduler = solver("flow", "flow_prediction", schedules=[schedule.to_dict()])
        scheduler.set_timesteps(1)
        level, target = scheduler.levels[:2]
        rule = combine(Step(), [level], target, 1)
        evaluated = rule.sample + rule.x0[0] * c**2 / (c**2 + high**2) / level.alpha
        errors.append(abs(scheduler._advance() / evaluated - 1))
    assert errors[1] < 0.12 * errors[0] and errors[2] < 0.12 * errors[1]


# ---------------------------------------------------------------- Gaussian data


@pytest.mark.parametrize("low", [0.3, 0.0])
@pytest.mark.parametrize("path", PATHS)
def test_theta_is_exact_for_gaussian_data(path, low):
    c, high, y = 0.37, 8.0, 5.0
    start, target = PATHS[path](high), PATHS[path](low)
    rule = combine(Step(1, "theta"), [start], target, 1, std=c)
    x0 = c**2 / (c**2 + high**2) * y
    result = rule.sample * start.alpha * y + rule.x0[0] * x0 + rule.eps[0] * (y - x0) / high
    assert abs(result / target.alpha - y * math.hypot(c, low) / math.hypot(c, high)) < 1e-13


@pytest.mark.parametrize("zeta", [0.0, 0.5, 1.0, 2.0])
def test_first_order_step_with_noise(zeta):
    s, t = vp(3.1), vp(0.8)
    h, rule = t.log_snr - s.log_snr, combine(Step(), [s], t, 1, zeta)
    assert rule.sample == pytest.approx(t.sigma / s.sigma * math.exp(-(zeta**2) * h), rel=1e-13)
    assert rule.x0[0] == pytest.approx(t.alpha * (1 - math.exp(-(1 + zeta**2) * h)), rel=1e-13)
    assert rule.noise == pytest.approx(t.sigma * math.sqrt(1 - math.exp(-2 * zeta**2 * h)), rel=1e-13)
    if zeta == 1:  # the posterior of DDPM
        variance = t.sigma**2 / s.sigma**2 * (1 - s.alpha**2 / t.alpha**2)
        assert rule.noise**2 == pytest.approx(variance, rel=1e-12)


def weak_error(order, zeta, count, c=0.6, scaling="none"):
    """The relative error of the end's variance, by exact recursion of the covariance of two nodes."""
    sigmas = log_grid(count)
    levels = [Level(1.0, sigma) for sigma in sigmas]
    gain = [c**2 / (c**2 + sigma**2) for sigma in sigmas]
    cov = np.diag([c**2 + sigmas[0] ** 2, 0.0])
    for n in range(count):
        known = levels[n::-1][:2] if n else levels[:1]
        rule = combine(
            Step(min(order, n + 1), scaling=scaling), known, levels[n + 1], min(order, n + 1), zeta
        )
        back = rule.x0[1] * gain[n - 1] if len(known) > 1 else 0.0
        move = np.array([[rule.sample + rule.x0[0] * gain[n], back], [1.0, 0.0]])
        cov = move @ cov @ move.T + np.diag([rule.noise**2, 0.0])
    return abs(cov[0, 0] / (c**2 + LOW**2) - 1)


@pytest.mark.parametrize("zeta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_moments_of_gaussian_data(order, zeta):
    errors = [weak_error(order, zeta, count) for count in (64, 128, 256)]
    assert math.log2(errors[1] / errors[2]) > (1.9 if order == 2 and zeta == 0 else 0.9)
    assert errors[2] < 0.02
    if order == 2:
        assert errors[2] < weak_error(1, zeta, 256)


@pytest.mark.parametrize(("name", "zeta"), [("dpm++1", 1.0), ("dpm++2m", 0.5), ("unipc1", 1.0),
                                            ("unipc2", 0.5), ("unipc2", 1.0)])  # fmt: skip
def test_the_scheduler_adds_the_noise(name, zeta):
    """The moments of 40 000 samples, also where a corrector makes the step again; the start is forgotten."""
    c, mean = 0.6, 0.4
    scheduler = solver(solver=name, zeta=zeta)
    scheduler.set_timesteps(sigmas=(*log_grid(80), 0.0))
    generator = torch.Generator().manual_seed(0)
    first = scheduler.levels[0]
    x = torch.randn(40_000, dtype=torch.float64, generator=generator)
    x = start = first.alpha * mean + math.hypot(first.alpha * c, first.sigma) * x
    for timestep, level in zip(scheduler.timesteps, scheduler.levels, strict=False):
        x0 = mean + c**2 / (c**2 + level.ratio**2) * (x / level.alpha - mean)
        eps = (x - level.alpha * x0) / level.sigma
        x = scheduler.step(eps, timestep, x, generator=generator).prev_sample
    assert abs(float(x.mean()) - mean) < 0.015
    assert abs(float(x.std()) / c - 1) < 0.04
    assert float(torch.corrcoef(torch.stack([start, x]))[0, 1]) < {0.5: 0.7, 1.0: 0.2}[zeta]


def test_start_points_are_the_mixtures():
    assert START.shape == (8,) and rms(drive(solver_schedule("unipc3", log_grid(200))) - ending()) < 1e-7

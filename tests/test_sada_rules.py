"""SADA's parts: polynomials, both rules, replayed updates, refusals; checks 2-4, 6 and 9 of its card."""

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from sada_toys import VP, Loop, flow_toy, noise, plain, rms, skips, toy
from tiny_pipelines import TINY, run

from diffaccel import Accelerator, Sada, UnsupportedPipeline, accelerate
from diffaccel.noise import path_of
from diffaccel.pipelines.history import History, lagrange_weights
from diffaccel.pipelines.replay import Replay
from diffaccel.pipelines.sada_rules import ErrorRule, StabilityRule
from diffaccel.toy import toy_t

PAPER = (5 / 6, 5 / 6, -2 / 3)
REFERENCE = (0.625, 0.75, -0.375)


class Record(Accelerator):
    """Innermost: what the scheduler gets and gives, by step."""

    def start(self, run):
        self.calls, self.results, self.outputs = [], [], []
        self.kept.append(self)

    def evaluate(self, call, proceed):
        output = proceed(call)
        self.outputs.append((call.step, output.sample))
        return output

    def update(self, call, proceed):
        result = proceed(call)
        self.calls.append(call)
        self.results.append(result[0].clone())
        return result


def recorded(pipe, accel, *args, **options):
    """Returns the record of a run of ``pipe`` with an accelerator around it."""
    record = Record()
    record.kept = []
    accelerate(pipe, [*accel, record])
    pipe(*args, **options)
    return record.kept[-1]


def velocities(record):
    """Returns x and y = dx/dt in time coordinates and the path, from the record of a run."""
    path = record.calls[0].run.path
    xs, ys = [], []
    for call in record.calls:
        level = path[call.index]
        x0, eps = (getattr(level, name)(call.output, call.sample) for name in ("x0", "eps"))
        xs.append(path.to_time_coordinates(call.index, call.sample))
        ys.append(path.velocity(call.index, x0, eps))
    return xs, ys, path


def predicted(xs, ys, path, i, coefficients):
    slope = sum(c * ys[i - j] for j, c in enumerate(coefficients))
    return xs[i] - (path.time(i) - path.time(i + 1)) * slope


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "flow"])
def test_2_predicted_displacement_is_the_real_one(name):
    """The reference's time scale gave 0.049 of it at 50 steps; then y would play no role in the criterion."""
    pipe = flow_toy() if name == "flow" else toy(scheduler=getattr(diffusers, name)(**VP))
    pipe_record = recorded(pipe, [], noise(64))
    xs, ys, path = velocities(pipe_record)
    seen = []

    class Watch(StabilityRule):
        def _stable(self, call, result):
            stable = super()._stable(call, result)
            seen.append((call.index, self.predicted))
            return stable

    rule = Watch(0, math.inf, 4, 4)
    for call, result in zip(pipe_record.calls, pipe_record.results, strict=True):
        x0 = path[call.index].x0(call.output, call.sample)
        rule.plan(call, x0, (result,), np.ones(len(x0), bool))
    for i, guess in seen[10:45]:
        moved, real = guess - xs[i], xs[i + 1] - xs[i]
        assert 0.9 < float((moved * real).sum() / real.square().sum()) < 1.1, i
        torch.testing.assert_close(guess, predicted(xs, ys, path, i, PAPER))


def test_2_velocity_is_that_of_the_card():
    """y = -beta x / 2 + beta eps / (2 s), beta = T beta_n; the card's rate is 1 % off the table's."""
    record = recorded(toy(), [], noise(8))
    _, ys, path = velocities(record)
    betas = record.calls[0].run.scheduler.betas.double()
    for call, y in list(zip(record.calls, ys, strict=True))[5:45]:
        level = path[call.index]
        beta = 1000 * float(betas[int(call.timestep)])
        eps = level.eps(call.output, call.sample)
        card = -beta / 2 * call.sample + beta / (2 * level.sigma) * eps
        assert float((card - y).norm() / y.norm()) < 0.03


@pytest.mark.parametrize(
    ("coefficients", "order"),
    [
        (StabilityRule.PREDICTOR, 2.99),
        ((1, 0, 0), 1.98),
        (REFERENCE, 1.98),  # that of the reference's code: no better than Euler
        ((1.5, -0.5, 0), 3.0),
        ((23 / 12, -16 / 12, 5 / 12), 4.0),
    ],
)
def test_3_order_of_predictors(coefficients, order):
    def x(t):
        return math.exp(-t) * math.sin(3 * t)

    def y(t):
        return math.exp(-t) * (3 * math.cos(3 * t) - math.sin(3 * t))

    def error(h):  # t falls by h, as in sampling
        return abs(x(0.7 - h) - x(0.7) + h * sum(c * y(0.7 + j * h) for j, c in enumerate(coefficients)))

    assert sum(coefficients) == pytest.approx(1, abs=1e-12)
    assert math.log2(error(2e-3) / error(1e-3)) == pytest.approx(order, abs=0.1)


def test_3_the_predictor_is_that_of_the_paper():
    assert pytest.approx(PAPER) == StabilityRule.PREDICTOR


def euler_criterion(y0, y1, y2, delta, coefficients):
    """m of the exact Euler solver."""
    c0, c1, c2 = coefficients
    return ((-delta * y0 + delta * (c0 * y0 + c1 * y1 + c2 * y2)) * (y0 - 2 * y1 + y2)).sum(-1)


def test_4_identities_and_signs_with_exact_euler():
    """The code's coefficients are stable always, the paper's have either sign."""
    generator = torch.Generator().manual_seed(0)
    y1, slope, bend = torch.randn(3, 200, 8, generator=generator, dtype=torch.float64)
    growth = torch.linspace(0.5, 2.5, 200, dtype=torch.float64)[:, None]  # of the slope: of either sign
    y0, y2 = y1 + growth * slope + 0.1 * bend, y1 - slope
    second, delta = y0 - 2 * y1 + y2, 0.02
    reference = euler_criterion(y0, y1, y2, delta, REFERENCE)
    torch.testing.assert_close(reference, -0.375 * delta * second.square().sum(-1), rtol=1e-10, atol=0.0)
    assert (reference <= 0).all()
    paper = euler_criterion(y0, y1, y2, delta, StabilityRule.PREDICTOR)
    expected = -delta / 6 * second.square().sum(-1) + delta / 2 * ((y1 - y2) * second).sum(-1)
    torch.testing.assert_close(paper, expected, rtol=1e-10, atol=1e-14)
    assert (paper < 0).any() and (paper > 0).any()


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "flow"])
def test_4_decisions_and_reconstruction_of_the_paper(name):
    """From the record of a run: sign of the mean, step-wise x0 from the predictor, late Lagrange."""
    pipe = flow_toy() if name == "flow" else toy(scheduler=getattr(diffusers, name)(**VP))
    accel = Sada(criterion="stability", max_skips=1, skip_from=0.2, skip_until=0.94, correct=False)
    record, count = recorded(pipe, [accel], noise(24, seed=3)), 24
    chosen, (xs, ys, path) = [set(steps) for steps in skips(pipe, count)], velocities(record)
    x0 = [path[c.index].x0(c.output, c.sample) for c in record.calls]
    signs = set()
    for i in range(10, 24):
        second = ys[i] - 2 * ys[i - 1] + ys[i - 2]
        guess = predicted(xs, ys, path, i, PAPER)
        mean = ((xs[i + 1] - guess) * second).flatten(1).mean(1)
        scale = path.input_scale(i + 1) if path.kind == "ve" else 1.0
        alpha, sigma = scale * path[i + 1].alpha, scale * path[i + 1].sigma
        here = path[i]
        eps = (record.calls[i].sample - here.alpha * x0[i]) / here.sigma
        for n in range(count):
            if i not in chosen[n] and i > 10:  # max_skips=1: after a skip one runs
                assert (i + 1 in chosen[n]) == bool(mean[n] < 0)
                signs.add(bool(mean[n] < 0))
            if i + 1 in chosen[n]:
                wanted = (guess[n] - sigma * eps[n]) / alpha
                torch.testing.assert_close(x0[i + 1][n], wanted, rtol=1e-6, atol=1e-6)
    assert True in signs
    late = [s for s in range(26, 47) if s in chosen[0]]
    assert late == [s for s in range(26, 47) if s % 2 == late[0] % 2], "not adaptive, at most one in a row"
    for s in late:
        nodes = [k for k in range(s) if k % 4 == 1][-4:]
        weights = lagrange_weights(nodes, float(s))
        wanted = sum(w * x0[k] for w, k in zip(weights, nodes, strict=True))
        torch.testing.assert_close(x0[s], wanted, rtol=1e-6, atol=1e-6)


def test_paper_counts_only_skips_towards_max_skips(monkeypatch):
    """Card, section 3.6: outside of the range nothing is skipped, so that nothing counts there."""
    monkeypatch.setattr(StabilityRule, "_stable", lambda self, call, result: self.fake(call, result))

    def fake(self, call, result):
        self.predicted = call.run.path.to_time_coordinates(call.index + 1, result[0])
        return np.ones(len(call.sample), bool)

    monkeypatch.setattr(StabilityRule, "fake", fake, raising=False)
    pipe = toy().to(accel={"sada:paper": {"late": 1.0}})
    pipe(noise(2))
    wanted = [step for step in range(10, 47) if (step - 10) % 5 != 4]
    assert skips(pipe, 2) == [wanted, wanted], "four skipped, one run, from the beginning of the range"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_6_polynomials_are_exact(count):
    """Nodes in no order or distance, each sample at its own; both extrapolation and interpolation."""
    generator = np.random.default_rng(count)
    nodes = np.sort(generator.uniform(-4, 3, (count, 5)), 0)
    powers, history = generator.normal(size=(count, 5)), History(count + 1)

    def value(u):
        return torch.as_tensor(sum(powers[k] * u**k for k in range(count)))[:, None]

    for b in generator.permutation(np.arange(5).repeat(count)):
        j = np.broadcast_to(history.count(), 5)[b]
        history.push(value(nodes[j, b]), nodes[j, b], np.arange(5) == b)
    assert history.count().tolist() == [count] * 5
    np.testing.assert_allclose(sum(lagrange_weights(nodes, 1.2345)), 1, rtol=1e-10)
    np.testing.assert_allclose(history.distance(3.7, count), np.abs(3.7 - nodes).prod(0))
    torch.testing.assert_close(history.predict(3.7, count), value(3.7), atol=1e-10, rtol=1e-10)
    if count > 1:
        between = history.interpolate(3.4, count, value(3.9), 3.9)
        torch.testing.assert_close(between, value(3.4), atol=1e-10, rtol=1e-10)


def test_6_log_snr_of_a_real_schedule():
    """x0 a parabola in the half log-SNR of a Karras schedule: three nodes reproduce it in float64."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**VP, use_karras_sigmas=True)
    scheduler.set_timesteps(30)
    u = [path_of(scheduler)[i].log_snr for i in range(30)]
    a, b, c = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for skip in (1, 2, 3):
        history = History(3)
        for i in (10, 12, 15):
            history.push(a + b * u[i] + c * u[i] ** 2, u[i], np.ones(2, bool))
        at = u[15 + skip]
        torch.testing.assert_close(history.predict(at, 3), a + b * at + c * at**2, atol=1e-10, rtol=1e-10)


def test_6_amplification_of_spaced_nodes():
    """Spacing 4, distance 3: the weights' absolute sums are 2.5, 5.1 (quadratic) and 9.9 (cubic)."""
    for count, amplified in ((2, 2.5), (3, 5.1), (4, 9.9)):
        nodes = np.arange(-4.0 * (count - 1), 1, 4)
        assert np.abs(lagrange_weights(nodes, 3.0)).sum() == pytest.approx(amplified, abs=0.05)


def test_history_against_lists():
    """Random samples pushed at random places, repeated places among them."""
    generator, size, batch = np.random.default_rng(0), 3, 4
    history, lists, place = History(size), [[] for _ in range(batch)], 0.0
    for _ in range(60):
        place += generator.choice([0.0, 0.3, 1.7])
        rows, values = generator.random(batch) < 0.6, torch.as_tensor(generator.normal(size=(batch, 2)))
        everyone = generator.random() < 0.5
        history.push(values, place, None if everyone else rows)
        for n in range(batch) if everyone else np.flatnonzero(rows):
            known = [(u, v) for u, v in lists[n] if u != place]
            lists[n] = [*known, (place, values[n])][-size:]
        for n in range(batch):
            assert np.broadcast_to(history.count(), batch)[n] == len(lists[n])
            if lists[n]:
                stored = torch.stack([value[n] for value in history.values[-len(lists[n]) :]])
                torch.testing.assert_close(stored, torch.stack([v for _, v in lists[n]]), rtol=0, atol=0)
                nodes = [np.broadcast_to(node, batch)[n] for node in history.nodes[-len(lists[n]) :]]
                assert nodes == [u for u, _ in lists[n]]


class Guided(Loop):
    """Classifier-free guidance in one stacked call."""

    @torch.no_grad()
    def __call__(self, noise, scale=4.0):
        self.scheduler.set_timesteps(50)
        x, labels = noise, torch.tensor([6] * len(noise) + [1] * len(noise))
        for t in self.scheduler.timesteps:
            uncond, cond = self.unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
            x = self.scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
        return x


@pytest.mark.parametrize("order", [2, 3])
def test_9_guidance_commutes_with_reconstruction(order):
    """The x0 of a skipped step is that of both branches extrapolated on their own, then guided."""
    pipe = Guided(toy_t(), diffusers.DPMSolverMultistepScheduler(**VP, steps_offset=1))
    accel = Sada(tolerance=0.05, order=order, correct=False)
    record = recorded(pipe, [accel], noise(1, seed=4))
    path, skipped = record.calls[0].run.path, skips(pipe, 1)[0]
    outputs, known = dict(record.outputs), []
    assert len(skipped) > 10 and not set(outputs) & set(skipped)
    for call in record.calls:
        level = path[call.index]
        if call.step in outputs:
            branches = [level.x0(half, call.sample) for half in outputs[call.step].chunk(2)]
            known = [*known, (level.log_snr, branches)][-order:]
            continue
        weights = lagrange_weights([u for u, _ in known], level.log_snr)
        pairs = list(zip(weights, (b for _, b in known), strict=True))
        uncond, cond = (sum(w * branches[k] for w, branches in pairs) for k in (0, 1))
        reached = level.x0(call.output, call.sample)
        torch.testing.assert_close(uncond + 4 * (cond - uncond), reached, rtol=1e-6, atol=1e-6)


REPLAYED = {
    "DPMSolverMultistepScheduler": {}, "UniPCMultistepScheduler": {}, "EulerDiscreteScheduler": {},
    "DDIMScheduler": {"clip_sample": False}, "PNDMScheduler": {"skip_prk_steps": True},
    "HeunDiscreteScheduler": {}, "KDPM2DiscreteScheduler": {}, "LMSDiscreteScheduler": {},
    "DEISMultistepScheduler": {}, "DPMSolverSinglestepScheduler": {"lower_order_final": True},
}  # fmt: skip
GAPS = [{20, 21, 22}, {21}, set(), {22, 23, 26, 27, 29}]  # of four samples


@pytest.mark.parametrize("name", [*REPLAYED, "PNDM with Runge-Kutta", "FlowMatchHeunDiscreteScheduler"])
def test_replay_with_the_truth_gives_the_true_trajectory(name):
    """Wrong predictions at first; corrected where a sample's gap ends, whatever the other samples do."""
    gaps = [{step - 14 for step in gap} for gap in GAPS] if "Runge" in name else GAPS
    if name.startswith("Flow"):
        pipe = flow_toy()
        pipe.scheduler = getattr(diffusers, name)()
    else:
        cls = getattr(diffusers, "PNDMScheduler" if "Runge" in name else name)
        pipe = toy(scheduler=cls(**VP, **REPLAYED.get(name, {})))
    record = recorded(pipe, [], noise(4))
    truth = [call.run.path[call.index].x0(call.output, call.sample) for call in record.calls]
    outputs, samples = [call.output for call in record.calls], [call.sample for call in record.calls]

    class Wrong(Accelerator):
        def start(self, run):
            self.replay = Replay()

        def update(self, call, proceed):
            gap = np.array([call.step in steps for steps in gaps])
            call = self.replay.correct(call, ~gap, lambda old: truth[old.step])
            for n in np.flatnonzero(~gap):
                torch.testing.assert_close(call.sample[n], samples[call.step][n], atol=1e-6, rtol=1e-6)
            wrong = outputs[call.step].clone()
            wrong[gap] *= 1.1
            return self.replay.step(replace(call, output=wrong), proceed, gap)

    final = record.results[-1]
    accelerate(pipe, Wrong())
    torch.testing.assert_close(pipe(noise(4)), final, atol=1e-10, rtol=1e-10)


def test_error_rule_knows_nothing_before_it_has_seen_enough():
    """No plan before order + 1 computed predictions, none for reconstructed ones, none without tolerance."""
    record = recorded(toy(), [], noise(3))
    path, ran = record.calls[0].run.path, np.array([True, True, False])
    rule, never = ErrorRule(1e9, 3, 2), ErrorRule(0.0, 3, 2)
    for call in record.calls[:12]:
        x0 = path[call.index].x0(call.output, call.sample)
        allowed = rule.plan(call, x0, None, ran if call.step != 9 else ~ran)
        assert not never.plan(call, x0, None, ran).any()
        if call.step < 9:
            assert allowed.tolist() == [call.step >= 2] * 2 + [False], call.step
        if call.step == 9:
            assert rule.todo.tolist() == [2, 2, 0], "skipping one of three leaves two"
    assert rule.history.count().tolist() == [3, 3, 1]


@pytest.mark.parametrize("tolerance", [0.0, 0.002, 0.005])
def test_error_rule_decides_the_same_for_all_samples_at_once(tolerance):
    """``fresh=None`` looks first whether any sample may skip, at less expense."""
    record = recorded(toy(), [], noise(8))
    path, rules = record.calls[0].run.path, [ErrorRule(tolerance, 3, 2) for _ in range(2)]
    found = set()
    for call in record.calls:
        x0 = path[call.index].x0(call.output, call.sample)
        quick = rules[0].plan(call, x0, None, None)
        plain = rules[1].plan(call, x0, None, np.ones((8, 1), bool))
        assert plain.any() if quick is not None else not plain.any()
        assert quick is None or quick.tolist() == plain.tolist()
        assert np.array_equal(np.zeros(8) + rules[0].todo, rules[1].todo)
        found.add(quick is None)
    assert found == ({True, False} if tolerance else {True})


def test_error_rule_is_relative():
    """A thousandfold x0 gives the same plan."""
    record, plans = recorded(toy(), [], noise(8)), {}
    path, ran = record.calls[0].run.path, np.ones(8, bool)
    for factor in (1.0, 1000.0):
        rule = ErrorRule(0.005, 3, 2)
        x0 = [path[c.index].x0(c.output, c.sample) * factor for c in record.calls[:49]]
        plans[factor] = [rule.plan(c, x, None, ran).tolist() for c, x in zip(record.calls, x0, strict=False)]
    assert plans[1.0] == plans[1000.0] and any(map(any, plans[1.0])) and not all(map(all, plans[1.0]))


def test_smaller_tolerance_smaller_error():
    pipe, errors, calls = toy(), [], []
    for tolerance in (1e-4, 1e-3, 1e-2):
        pipe.to(accel={"sada": {"tolerance": tolerance, "max_skips": 8}})
        errors.append(rms(pipe(noise(256)), plain()))
        calls.append(pipe.accel.report.evaluated)
    assert sorted(errors) == errors and sorted(calls, reverse=True) == calls


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "accel", ["sada", "sada:paper", {"sada": {"skip_from": 0, "tolerance": 1e9}}], ids=str
)
def test_few_steps(steps, accel):
    pipe, x = toy(), noise(3)
    before = pipe(x, num_inference_steps=steps)
    after = pipe.to(accel=accel)(x, num_inference_steps=steps)
    assert steps == 5 or torch.equal(after, before), "the first three steps and the last one always run"
    assert torch.isfinite(after).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("accel", [{}, {"criterion": "stability"}], ids=["error", "stability"])
def test_half_precision(dtype, accel):
    """Formulas in float32: the errors are those of skipping, not of the format."""
    kept = []

    class Watched(Sada):
        name = ""

        def start_rule(self, run):
            kept.append(super().start_rule(run))
            return kept[-1]

    pipe, x = toy(model=toy_t().to(dtype)), noise(8).to(dtype)
    before = pipe(x)
    after = accelerate(pipe, Watched(**accel))(x)
    assert after.dtype == dtype and pipe.accel.report.skipped > 10
    assert kept[0].history.values[0].dtype == torch.float32
    assert rms(after.float(), before.float()) < 0.02
    double = toy()
    wide = accelerate(double, Watched(**accel))(noise(8))
    assert rms(after.double(), wide) < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipeline(dtype):
    case = TINY["sd"]
    pipe = accelerate(case.build().to(dtype), {"sada": {"tolerance": 0.1}})
    result = run(case, pipe, 20)
    assert result.dtype == dtype and torch.isfinite(result).all() and pipe.accel.report.skipped > 0


STOCHASTIC = {
    "EulerAncestralDiscreteScheduler": {}, "DDPMScheduler": {}, "LCMScheduler": {}, "TCDScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "KDPM2AncestralDiscreteScheduler": {}, "SASolverScheduler": {},
}  # fmt: skip


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("accel", ["sada", "sada:paper"])
def test_stochastic_solvers_are_refused(name, accel):
    pipe = toy()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **STOCHASTIC[name])
    with pytest.raises(UnsupportedPipeline, match="random"):
        pipe.to(accel=accel)
    assert not hasattr(pipe, "accel")


def test_eta_and_later_schedulers_are_refused_at_the_call():
    case = TINY["sd"]
    pipe = case.build().to(accel="sada")
    with pytest.raises(UnsupportedPipeline, match="eta=1"):
        run(case, pipe, 5, eta=1.0)
    run(case, pipe, 5)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedPipeline, match="random"):
        run(case, pipe, 5)


def test_check_leaves_the_scheduler_alone():
    scheduler = diffusers.DPMSolverMultistepScheduler(**VP)
    Sada().check(toy(scheduler=scheduler))
    assert scheduler.num_inference_steps is None
    scheduler.set_timesteps(7)
    assert len(path_of(scheduler)) == 7

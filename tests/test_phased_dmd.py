"""Phased DMD: learned scores and students of toys, its phases, and runs that go on in the second one."""

import itertools
import math
from dataclasses import asdict

import pytest
import torch
from forking import together
from test_dmd2 import assert_same, fit_and_save, gradients, teachers, turn, weights
from test_dmd2 import config as dmd2_config
from test_matching import double, levels
from torch import nn

from diffaccel.distill.config import merge
from diffaccel.distill.distribution_matching import FAKE
from diffaccel.distill.grid import scheduler_for
from diffaccel.distill.matching import (
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
from diffaccel.distill.phased_dmd import phases_of
from diffaccel.distill.runs import resume, start
from diffaccel.distill.walk import walk
from diffaccel.errors import OptionError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with tiny teachers and 24 pairs of each."""
    return teachers(tmp_path_factory.mktemp("phased"))


def config(made, run, teacher="dit", **changes):
    return dmd2_config(made, run, teacher, **{"method": "phased-dmd", "images": 16, **changes})


# ---------------------------------------------------------------- learned scores


class Networks(nn.Module):
    """K networks side by side, of 3 hidden layers: of x and t (K, B) each."""

    def __init__(self, count, width=64, inputs=2):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.layers = nn.ParameterList()
        for fan, out in itertools.pairwise((inputs, width, width, width, 1)):
            for shape in ((1, fan, out), (1, 1, out)):
                drawn = (2 * torch.rand(shape, generator=source) - 1) / fan**0.5
                self.layers.append(nn.Parameter(drawn.repeat(count, 1, 1)))

    def forward(self, *inputs):
        h = torch.stack(inputs, -1)
        for place in range(0, len(self.layers), 2):
            h = torch.baddbmm(self.layers[place + 1], h, self.layers[place])
            h = nn.functional.silu(h) if place + 2 < len(self.layers) else h
        return h[..., 0]


POINTS = double(-1, 0, 1, 2)


def score_of_points(x, alpha, sigma):
    apart = x[..., None] - alpha[..., None] * POINTS
    share = (-(apart**2) / (2 * sigma[..., None] ** 2)).softmax(-1)
    return -(share * apart).sum(-1) / sigma**2


def implied_score(kind, output, x, t):
    """The score of a prediction: of the velocity on the straight path, of eps on the other one."""
    if kind == "vp":
        return -output / t.sigma
    return -(output + x / t.alpha) / (t.sigma + t.sigma**2 / t.alpha)


def target_of(kind, x0, eps):
    return eps if kind == "vp" else eps - x0


def trajectory(kind, score, x, times):
    """The ends of deterministic steps along some times."""
    for now, then in itertools.pairwise(times):
        t, after = levels(kind, now), levels(kind, then)
        eps = -t.sigma * score(x, t, now)
        x = after.alpha * (x - t.sigma * eps) / t.alpha + after.sigma * eps
    return x


@pytest.mark.parametrize(("kind", "steps"), [("flow", 800), ("vp", 2000)])
def test_learned_scores(kind, steps):
    """Check D at s = 0.5: errors of the score and of trajectories below 0.04; wrong targets are far off."""
    source, batch, networks = torch.Generator().manual_seed(1), 384, Networks(3)
    s = levels(kind, torch.full((batch,), 0.5))
    optimizer = torch.optim.Adam(networks.parameters(), lr=6e-3, foreach=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        places = torch.randint(4, (batch,), generator=source)
        e, noise = torch.randn(2, batch, generator=source, dtype=torch.float64)
        times = 0.52 + 0.475 * torch.rand(batch, generator=source, dtype=torch.float64)
        t = levels(kind, times)
        x_s = s.alpha * POINTS[places] + s.sigma * e
        between = transition(kind, s, t)
        x_t, naive = between.alpha * x_s + between.sigma * noise, t.alpha * x_s + t.sigma * noise
        x0, eps = (part[:, 0] for part in pseudo_pair(kind, x_s[:, None], noise[:, None], s, t))
        wrong = target_of(kind, x_s, noise)
        output = networks(torch.stack([x_t, x_t, naive]).float(), (2 * times - 1).float().expand(3, -1))
        weight, ones = subinterval_weight("clamp", between.sigma, between.sigma), torch.ones(batch)
        loss = sum(fake_loss(own[:, None], target[:, None], w) for own, target, w in zip(
            output, (target_of(kind, x0, eps), wrong, wrong), (weight, ones, ones), strict=True))  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    errors, ends = scored(kind, networks, source)
    assert errors[0] < 0.04 and ends[0] < 0.04
    assert min(errors[1:]) > 2 * errors[0] and min(ends[1:]) > 3 * ends[0]


@torch.no_grad()
def scored(kind, networks, source):
    """The mean relative errors of the scores on (s, 1), and of the ends of trajectories over their spread."""
    count, errors = 2000, []

    def learned(x, t, time):
        place = torch.full(x.shape, 2 * time - 1)
        return implied_score(kind, networks(x.float(), place.float()).double(), x, t)

    for time in torch.linspace(0.53, 0.98, 16).tolist():
        t, places = levels(kind, time), torch.randint(4, (count,), generator=source)
        x = t.alpha * POINTS[places] + t.sigma * torch.randn(count, generator=source, dtype=torch.float64)
        exact = score_of_points(x, *t)
        errors.append((learned(x.expand(3, -1), t, time) - exact).square().mean(1) / exact.square().mean())
    noise = torch.randn(count, generator=source, dtype=torch.float64)
    times = torch.linspace(0.98, 0.52, 60).tolist()
    right = trajectory(kind, lambda x, t, time: score_of_points(x, *t), noise, times)
    found = trajectory(kind, learned, noise.expand(3, -1), times)
    apart = (found - right).square().mean(1).sqrt() / right.std()
    return torch.stack(errors).sqrt().mean(0).tolist(), apart.tolist()


# ---------------------------------------------------------------- students of a toy

SHARES, MEANS, STDS = double(0.25, 0.35, 0.4), double(-2, 0, 1.8), double(0.15, 0.25, 0.2)
SPREAD = float((SHARES * (STDS**2 + MEANS**2)).sum() - (SHARES * MEANS).sum() ** 2) ** 0.5


def real_x0(x, t):
    """The teacher's E[x0 | x_t] of the mixture."""
    alpha, sigma = (part[:, None] for part in t)
    variance = alpha**2 * STDS**2 + sigma**2
    apart = x[:, None] - alpha * MEANS
    share = (SHARES.log() - 0.5 * variance.log() - apart**2 / (2 * variance)).softmax(1)
    return (share * (MEANS + alpha * STDS**2 / variance * apart)).sum(1)


def bank_means(x, bank, levels_of):
    """E[x_s | x_t] and E[e | x_t] of samples of a bank, led to x_t by alpha and sigma."""
    alpha, sigma = (part[:, None] for part in levels_of)
    share = (-((x[:, None] - alpha * bank) ** 2) / (2 * sigma**2)).softmax(1)
    mean = share @ bank
    return mean, (x - alpha[:, 0] * mean) / sigma[:, 0]


def fake_velocity(kind, x_t, bank, s, t):
    """What a fake score has learned in the end, from the right target and from two wrong ones."""
    if kind == "clean":
        mean, noise = bank_means(x_t, bank, t)
        return noise - mean
    mean, noise = bank_means(x_t, bank, transition("flow", s, t))
    if kind == "wrong":
        return noise - mean
    x0, eps = pseudo_pair("flow", mean[:, None], noise[:, None], s, t)
    return (eps - x0)[:, 0]


@pytest.mark.parametrize(("kind", "low", "high"), [("right", 0, 0.05), ("wrong", 0.1, 9), ("clean", 0.4, 9)])
def test_first_phase(kind, low, high):
    """Check E: W1 of x_s over its spread; taken for clean, x_s becomes the clean data."""
    source, network, batch = torch.Generator().manual_seed(0), Networks(1, width=32, inputs=1).double(), 256
    s = straight(torch.full((batch,), 0.6).double())
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * step / 400)) / 2
        z, noise, other = torch.randn(3, batch, generator=source, dtype=torch.float64)
        t = straight(0.62 + 0.36 * torch.rand(batch, generator=source, dtype=torch.float64))
        x_s = network(z[None])[0]
        with torch.no_grad():
            between = t if kind == "clean" else transition("flow", s, t)
            x_t, bank = between.alpha * x_s + between.sigma * noise, network(other[None])[0]
            fake = x_t - t.sigma * fake_velocity(kind, x_t, bank, s, t)
            real = real_x0(x_t, t)
        gradient = matching_gradient(real[:, None], fake[:, None], x_s[:, None], kl_weight("flow", s, t))
        optimizer.zero_grad()
        surrogate(gradient, x_s[:, None]).backward()
        optimizer.step()
    count = 20_000
    with torch.no_grad():
        made = network(torch.randn(1, count, generator=source, dtype=torch.float64))[0]
    places = torch.multinomial(SHARES, count, replacement=True, generator=source)
    x0 = MEANS[places] + STDS[places] * torch.randn(count, generator=source, dtype=torch.float64)
    exact = 0.4 * x0 + 0.6 * torch.randn(count, generator=source, dtype=torch.float64)
    distance = float((made.sort()[0] - exact.sort()[0]).abs().mean() / exact.std())
    assert low <= distance <= high
    if kind == "clean":  # it is drawn to the clean data, whose spread is 1.78 of that at s
        assert made.std() / exact.std() == pytest.approx(1.75, abs=0.15)


def test_truncation_spreads_what_is_between():
    """Check F: after an affine first step x_s is 1.3 times too wide if its x0 is matched, not if x_s is."""
    source, found = torch.Generator().manual_seed(0), {}
    for begin in (0.0, 0.6):
        point, batch = double(0.8, 0.0).requires_grad_(), 2000
        optimizer, s = torch.optim.Adam([point], lr=2e-2), straight(torch.full((batch,), begin).double())
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 2e-2 * (1 + math.cos(math.pi * step / 400)) / 2
            z, noise = torch.randn(2, batch, generator=source, dtype=torch.float64)
            t = straight(begin + 0.02 + (0.96 - begin) * torch.rand(batch, generator=source).double())
            between, x0 = transition("flow", s, t), point[0] * z + point[1]
            x_s = (1 - begin) * x0 + begin * z
            with torch.no_grad():
                x_t = between.alpha * x_s + between.sigma * noise
                mean, spread = (1 - begin) * point[1], (1 - begin) * point[0] + begin
                variance = between.alpha**2 * spread**2 + between.sigma**2
                fake = (x_t + t.sigma**2 * (between.alpha * mean - x_t) / variance) / t.alpha
                real = real_x0(x_t, t)
            optimizer.zero_grad()
            surrogate(matching_gradient(real[None], fake[None], x0[None]), x_s[None]).backward()
            optimizer.step()
        found[begin] = (0.4 * abs(point[0].item()) + 0.6) / math.hypot(0.4 * SPREAD, 0.6)
    assert found[0.0] > 1.25 and found[0.6] == pytest.approx(1, abs=0.05)


# ---------------------------------------------------------------- phases


def test_phases_take_turns(made, tmp_path):
    """Each begins as the teacher, with a fresh fake score; the expert before is its average, and stays."""
    run = start(config(made, tmp_path / "run", images=24, options={"fake_rate": 0.5}))
    method, trainer = run.method, run.trainer
    teacher = {key: value.clone() for key, value in run.host.network.state_dict().items()}
    assert method.boundaries == (12,) and method.spans == [range(0, 2), range(2, 4)]
    assert [expert.boundary for expert in method.experts()] == [0]
    assert method.ends == [method.trained.times[2], 0]
    trainer.fit(stop=12)
    assert trainer.phase == 0
    student = trainer.roles["student"]
    average = dict(zip(student.keys, map(torch.clone, student.average.shadow_params), strict=True))
    entered, before = method.enter, []
    method.enter = lambda phase: (entered(phase), before.append({
        name: {key: value.clone() for key, value in denoiser.network.state_dict().items()}
        for name, denoiser in method.networks.items()}))  # fmt: skip
    trainer.update()
    for name, state in before[0].items():
        assert all(torch.equal(value, teacher[key]) for key, value in state.items()), name
    frozen = method.frozen["expert-1"].network
    kept = {key: value.clone() for key, value in frozen.state_dict().items()}
    assert all(torch.equal(kept[key], value) for key, value in average.items())
    assert trainer.roles["student"].average.optimization_step == 1
    assert all(int(entry["step"]) == 1 for entry in trainer.roles["student"].optimizer.state.values())
    trainer.fit()
    assert all(torch.equal(kept[key], value) for key, value in frozen.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters())
    high, low = method.experts()
    times = method.trained.times
    assert high.denoiser.network is frozen and times[2] < high.boundary < times[1] and low.boundary == 0
    assert low.denoiser is method.networks["student"]


@pytest.mark.parametrize("teacher", ["dit", "sd"])
def test_a_run_killed_in_the_second_phase_goes_on(made, tmp_path, teacher):
    """Bit by bit, with the frozen expert; for adapters it is one more of them."""
    changes = {"lora_rank": 2, "images": 8, "batch": 2} if teacher == "sd" else {}
    whole = start(config(made, tmp_path / "whole", teacher, **changes))
    whole.trainer.fit()
    stop = whole.config.images * 3 // 4
    start(config(made, tmp_path / "part", teacher, **changes)).trainer.fit(stop=stop)
    again = resume(tmp_path / "part")
    assert (again.trainer.images, again.trainer.phase) == (stop, 1)
    again.trainer.fit()
    assert_same(weights(whole), weights(again))
    one, two = (run.method.frozen["expert-1"].state() for run in (whole, again))
    assert_same(one, two)
    if changes:
        assert all(".lora_" in key and "expert-1" in key for key in one)
        moved = [value for key, value in one.items() if "lora_B" in key]
        assert max(value.abs().max() for value in moved) > 0
        assert again.method.frozen["expert-1"].network is again.host.network


def test_two_processes_make_the_course_of_one(made, tmp_path):
    """Over both phases."""
    changes = {"optimizer": "SGD", "lr": 1e-3, "images": 8}
    settings = config(made, tmp_path / "one", **changes)
    one = start(settings)
    one.trainer.fit()
    second = merge({**asdict(settings), "run": str(tmp_path / "two")})

    together(fit_and_save, second, tmp_path / "two.pt")
    found = torch.load(tmp_path / "two.pt")
    for name, role in one.trainer.roles.items():
        for key, p in zip(role.keys, role.parameters, strict=True):
            torch.testing.assert_close(found[name][key], p, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


def test_gradients_are_those_of_one_jump_to_the_end_of_the_phase(made, tmp_path):
    """In each phase: the steps before have no graph, and x_s is matched, by the normalizer of x0."""
    run = start(config(made, tmp_path / "run"))
    method, calls, student = run.method, [], run.method.setup.student
    role = run.trainer.roles["student"]
    for _ in range(3):  # into the second phase
        run.trainer.update()
    student.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    times = (*method.trained.times, 0.0)
    for phase, place in itertools.product((1, 0), (0, 1)):
        method.phase, method.place = phase, lambda name, batch, count, place=place: place
        calls.clear()
        batch = turn(run, "student")
        assert calls == [False] * place + [True]
        found = gradients(role)
        role.optimizer.zero_grad()
        batch = run.trainer.data.batch(batch.draws.numbers, "student", batch.images)
        noises, step, s = method.noise(batch, 2), 2 * phase + place, times[2 * phase + 2]
        x = method.first(noises[0])
        with torch.no_grad():
            for n in range(step):
                network = student if n >= 2 * phase else method.frozen["expert-1"]
                said = network(x, torch.full((4,), times[n]).double(), batch.inputs)
                x = x + (times[n + 1] - times[n]) * said.velocity
        said = student(x, torch.full((4,), times[step]).double(), batch.inputs)
        x_s = x + (s - times[step]) * said.velocity
        t = method.law.between(*method.parts[phase]["student"], batch.draws.uniform())
        assert t.min() > s
        start_level = Levels(*(part.float().view(-1, 1, 1, 1) for part in straight(torch.full_like(t, s))))
        between = transition("flow", start_level, straight(t.float().view(-1, 1, 1, 1)))
        x_t = between.alpha * x_s.detach() + between.sigma * noises[1]
        with torch.no_grad():
            fake, real = method._fake(x_t, t, batch.inputs).x0, method.real(x_t, t, batch.inputs)
        g = (fake - real) / ((said.x0 - real).abs().mean((1, 2, 3), keepdim=True) + 1e-4)
        (g.detach() * x_s).mean().backward()
        pairs = [(a, b) for a, b in zip(found, gradients(role), strict=True) if b is not None]
        apart = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
        assert apart < 1e-3 * torch.cat([b.flatten() for _, b in pairs]).norm()
        role.optimizer.zero_grad()


def test_fake_scores_learn_from_pseudo_pairs(made, tmp_path):
    """The loss is that of the network's own output, eps here, for the pseudo pair, with the weight."""
    run = start(config(made, tmp_path / "run"))
    method = run.method
    inputs, t = run.host.encode([0, 1]), double(0.85, 0.95)
    x_s, noise = torch.randn(2, 2, *run.host.shape, generator=torch.Generator().manual_seed(0))
    s = straight(torch.full_like(t, 0.8))
    low, high = s, straight(t)
    between = transition("flow", low, high)
    x_t = between.alpha.view(-1, 1, 1, 1).float() * x_s + between.sigma.view(-1, 1, 1, 1).float() * noise
    with torch.no_grad():
        eps = method._fake(x_t, t, inputs).eps
        _, target = pseudo_pair("flow", x_s, noise, low, high)
        error = (eps - target).square().mean((1, 2, 3))
        own = between.sigma / torch.hypot(1 - t, t)  # on the path of the network, alpha^2 + sigma^2 = 1
        for weight, factor in (("none", torch.ones(2)), ("clamp", (10 * own**2).clamp(max=1)),
                               ("eps", (between.sigma / t) ** 2)):  # fmt: skip
            found = method.fake_turn(x_s, 0.8, t, noise, inputs, weight)
            torch.testing.assert_close(found, (factor * error).mean().to(found), rtol=1e-4, atol=0)


def test_one_phase_of_fresh_noise_is_dmd2(made, tmp_path):
    """Bit by bit, for student and fake score; and it needs no pseudo pairs."""
    options = {"phases": 1, "transition": "fresh", "weight": "none"}
    settings = [
        config(made, tmp_path / "one", options=options),
        config(made, tmp_path / "two", method="dmd2"),
    ]
    runs = [start(each) for each in settings]
    assert runs[0].method.trained == runs[1].method.trained
    for name, key in (("student", "matching"), (FAKE, "denoising")):
        batches = [run.trainer.data.batch(range(4), name, 8) for run in runs]
        terms = [run.method.loss(name, batch)[key] for run, batch in zip(runs, batches, strict=True)]
        assert torch.equal(*terms)


def test_fresh_noise_is_judged_above_the_end_of_the_phase(made, tmp_path):
    """What is led to noise is x0 itself, and no time is below s."""
    run = start(config(made, tmp_path / "run", options={"transition": "fresh", "interval": "disjoint"}))
    method, seen = run.method, []
    drawn = method.led
    method.led = lambda x, s, t, noise: seen.append((s, t)) or drawn(x, s, t, noise)
    run.trainer.fit()
    assert all(s == 0 for s, _ in seen)
    end = method.ends[0]
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert min(t.min() for _, t in first) > end and max(t.max() for _, t in second) < end


@pytest.mark.parametrize(("teacher", "transition_"), [("dit", "euler"), ("sd", "euler"), ("sd", "fresh")])
def test_simulation_is_what_the_scheduler_makes(made, tmp_path, teacher, transition_):
    """The steps of training are those of the scheduler that the student leaves with."""
    run = start(config(made, tmp_path / "run", teacher, options={"transition": transition_}))
    method, host = run.method, run.host
    scheduler = scheduler_for(host.pipe.scheduler, method.grid(4))
    inputs, noise = host.encode(run.store.conditions[:2]), torch.randn(2, *host.shape)
    scheduler.set_timesteps(4)
    generator, x = torch.Generator().manual_seed(7), noise
    for time in scheduler.timesteps:
        output = inputs.call(host.network, x, time.expand(2).float())[0][:, : x.shape[1]]
        x = scheduler.step(output, time, x, generator=generator, return_dict=False)[0]
    generator.manual_seed(7)
    fresh = [torch.randn(2, *host.shape, generator=generator) for _ in range(4)]
    ask = method.ask(method.setup.teacher, inputs)
    found = walk([ask] * 4, method.first(noise), (*method.trained.times, 0.0), fresh if method.jumps else ())
    assert (found - x).abs().max() < 1e-5 * x.abs().max()


# ---------------------------------------------------------------- what is refused

EVEN = (1.0, 0.75, 0.5, 0.25)


def test_phases_divide_the_steps():
    assert phases_of(EVEN, 2, ()) == ([range(0, 2), range(2, 4)], [0.625, 0])
    assert phases_of(EVEN, 3, ())[0] == [range(0, 2), range(2, 3), range(3, 4)]
    assert phases_of(EVEN, 2, [0.9]) == ([range(0, 1), range(1, 4)], [0.9, 0])
    assert phases_of(EVEN, 4, ()) == ([range(n, n + 1) for n in range(4)], [0.875, 0.625, 0.375, 0])
    assert phases_of(EVEN, 1, ()) == ([range(0, 4)], [0])


@pytest.mark.parametrize(("phases", "switches", "words"), [
    (3, [0.4, 0.6], "not in order"), (3, [0.6, 0.6], "not in order"), (2, [1.5], "not in order"),
    (2, [0.0], "not in order"), (3, [0.7, 0.6], "overlap: a phase has none of the steps"),
    (2, [0.2], "overlap: a phase has none"), (2, [0.5], "rounding decides which expert makes it"),
    (2, [0.7501], "at the step 0.75, where rounding"), (2, [0.9, 0.4], "2 phases with the switches"),
    (5, (), "5 phases of 4 steps"),
])  # fmt: skip
def test_phases_that_do_not_fit_are_refused(phases, switches, words):
    with pytest.raises(OptionError, match=words):
        phases_of(EVEN, phases, switches)


@pytest.mark.parametrize(("changes", "words"), [
    ({"student": "random"}, None),
    ({"student": "random", "student_changes": {"num_layers": 1}}, "student=teacher"),
    ({"options": {"margin": 1.0}}, "phase 1 has no times for scores"),
    ({"options": {"phases": 5}}, "5 phases of 4 steps"), ({"steps": [1, 2, 4]}, "trains one number of steps"),
    ({"options": {"switches": [0.7], "times": [0.9, 0.7, 0.5, 0.3]}}, "rounding decides"),
])  # fmt: skip
def test_runs_that_do_not_fit_are_refused(made, tmp_path, changes, words):
    settings = config(made, tmp_path / "run", **changes)
    if words is None:
        assert start(settings).method.phases == 2
        return
    with pytest.raises(OptionError, match=words):
        start(settings)


def test_other_grids_are_refused(made, tmp_path):
    """A sampler with another number of steps, or at other times."""
    run = start(config(made, tmp_path / "run"))
    with pytest.raises(OptionError, match=r"trained at the times .* not for 2"):
        run.method.grid(2)
    scheduler = scheduler_for(run.host.pipe.scheduler, run.method.grid(4))
    assert len(run.method.trained) == 4 and scheduler.config.timestep_spacing == "trailing"

"""DMD2: a toy to which it converges, its turns and truncation, its discriminator, and runs that go on."""

import math
from dataclasses import asdict

import diffusers
import pytest
import torch
from forking import together
from tiny_pipelines import TINY
from torch import nn

from diffaccel.distill import checkpoints
from diffaccel.distill.checkpoints import CheckpointError
from diffaccel.distill.config import merge
from diffaccel.distill.discriminator import Features, Head, middle_of
from diffaccel.distill.distribution_matching import FAKE
from diffaccel.distill.grid import Grid, scheduler_for
from diffaccel.distill.matching import matching_gradient, surrogate
from diffaccel.distill.pairs import make_pairs
from diffaccel.distill.runs import export_run, resume, start
from diffaccel.distill.units import EDMUnits, FlowUnits, TableUnits
from diffaccel.distill.validation import Validation
from diffaccel.distill.walk import ScoreTimes, walk
from diffaccel.errors import OptionError


def teachers(folder):
    """Writes tiny teachers and 24 pairs of each into a folder, and returns it."""
    for name, conditions in (("dit", [0, 1, 2]), ("sd", ["a red boot", "a shirt"])):
        pipe = TINY[name].build()
        pipe.save_pretrained(folder / name)
        make_pairs(folder / f"{name}-pairs", pipe, conditions, count=24, steps=2, guidance=2.0, batch=8)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with tiny teachers and 24 pairs of each."""
    return teachers(tmp_path_factory.mktemp("dmd2"))


def config(made, run, teacher="dit", **changes):
    settings = {
        "method": "dmd2", "teacher": str(made / teacher), "pairs": str(made / f"{teacher}-pairs"),
        "run": str(run), "images": 12, "batch": 4, "warmup_images": 0, "ema_images": 8, "eval_count": 0,
        "log_images": 4, "lr": 1e-4, "steps": [4], **changes,
    }  # fmt: skip
    return merge({**settings, "options": {"ratio": 2, **changes.get("options", {})}})


def weights(run):
    """The trained weights and averages of all roles, and their optimizers' memories."""
    found = {}
    for name, role in run.trainer.roles.items():
        parts = {key: p.detach() for key, p in zip(role.keys, role.parameters, strict=True)}
        parts |= {} if role.average is None else dict(enumerate(role.average.shadow_params))
        for n, entry in enumerate(role.optimizer.state.values()):
            parts |= {(n, key): torch.as_tensor(value) for key, value in entry.items()}
        found |= {(name, key): value.clone() for key, value in parts.items()}
    return found


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def turn(run, name):
    """Makes the gradients of one turn, and returns the batch."""
    trainer = run.trainer
    role = trainer.roles[name]
    for other in trainer.roles.values():
        other.trains(other is role)
    batch, weight, last = next(iter(trainer._parts(role)))
    trainer._backward(role, batch, weight, last)
    return batch


def fit_and_save(settings, file):
    """Trains, and saves the weights of all roles: for processes that train together."""
    run = start(settings)
    run.trainer.fit()
    if run.trainer.accelerator.is_main_process:
        torch.save({name: dict(zip(role.keys, role.parameters, strict=True))
                    for name, role in run.trainer.roles.items()}, file)  # fmt: skip


def gradients(role):
    return [None if p.grad is None else p.grad.clone() for p in role.parameters]


# ---------------------------------------------------------------- a toy


CENTERS = torch.tensor([[2 * math.cos(math.pi * n / 3), 2 * math.sin(math.pi * n / 3)] for n in range(6)])
MASSES = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2, 0.2])


def mean_x0(x_t, t, centers, masses, std):
    """E[x0 | x_t] of Gaussians around some centers, on the straight path; t is (B, 1)."""
    variance = ((1 - t) * std) ** 2 + t**2
    near = (1 - t) * (x_t @ centers.T) - 0.5 * (1 - t) ** 2 * centers.square().sum(1)  # |x_t|^2 is shared
    share = (near / variance + masses.log()).softmax(1)
    gain = (1 - t) * std**2 / variance
    center = share @ centers
    return center + gain * (x_t - (1 - t) * center)


def sliced(first, second):
    """The sliced Wasserstein distance of two sets of points."""
    angles = torch.arange(64) * math.pi / 64
    rays = torch.stack([angles.cos(), angles.sin()])
    return float(((first @ rays).sort(0).values - (second @ rays).sort(0).values).abs().mean())


def test_toy_converges_to_the_teacher():
    """Check C: a ring of Gaussians, by exact scores: SW1 below 0.15, masses within 0.05."""
    source = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    steps = 900
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        z, noise = torch.randn(2, 256, 2, generator=source)
        t = 0.02 + 0.96 * torch.rand(256, 1, generator=source)
        x = network(z)
        x_t = (1 - t) * x.detach() + t * noise
        with torch.no_grad():
            bank = network(torch.randn(1024, 2, generator=source))
            fake = mean_x0(x_t, t, bank, torch.full((1024,), 1 / 1024), 1e-3)
            real = mean_x0(x_t, t, CENTERS, MASSES, 0.3)
        optimizer.zero_grad()
        surrogate(matching_gradient(real, fake, x), x).backward()
        optimizer.step()
    count = 6000
    with torch.no_grad():
        made = network(torch.randn(count, 2, generator=source))
    places = torch.multinomial(MASSES, count, replacement=True, generator=source)
    real = CENTERS[places] + 0.3 * torch.randn(count, 2, generator=source)
    masses = torch.cdist(made, CENTERS).argmin(1).bincount(minlength=6) / count
    assert sliced(made, real) < 0.15
    assert (masses - MASSES).abs().max() < 0.05


# ---------------------------------------------------------------- turns and truncation


def test_the_fake_score_has_its_own_time_scale(made, tmp_path):
    """Check F: R updates of the fake score for one of the student, whose average alone is kept."""
    run = start(config(made, tmp_path / "run", options={"ratio": 3, "fake_rate": 0.5}))
    run.trainer.fit()
    student, fake = run.trainer.roles["student"], run.trainer.roles[FAKE]
    assert (student.updates, fake.updates, run.trainer.step) == (3, 9, 3)
    assert student.average.optimization_step == 3 and fake.average is None
    assert student.optimizer.param_groups[0]["lr"] == 1e-4 and fake.optimizer.param_groups[0]["lr"] == 5e-5
    turns = [turn for step in range(4) for turn in run.method.turns(step)]
    for count in range(1, 13):  # after M updates of the fake score, ceil(M / R) of the student
        upto = [n for n, name in enumerate(turns) if name == FAKE][count - 1]
        assert turns[:upto].count("student") == math.ceil(count / 3)


def test_gradients_are_those_of_the_last_step_alone(made, tmp_path):
    """Check E: earlier steps have no graph, and the gradient is that of step j on what they made."""
    run = start(config(made, tmp_path / "run"))
    method, calls = run.method, []
    student = method.setup.student
    student.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for j in range(4):
        method.place = lambda name, batch, count, j=j: j
        calls.clear()
        batch = turn(run, "student")
        assert calls == [False] * j + [True]
        found = gradients(run.trainer.roles["student"])
        run.trainer.roles["student"].optimizer.zero_grad()
        batch = run.trainer.data.batch(batch.draws.numbers, "student", batch.images)
        noises, times = method.noise(batch, j + 2), method.trained.times
        x = method.first(noises[0])
        with torch.no_grad():
            for step in range(j):
                x0 = student(x, torch.full((4,), times[step]).double(), batch.inputs).x0
                x = (1 - times[step + 1]) * x0 + times[step + 1] * noises[step + 1]
        x0 = student(x, torch.full((4,), times[j]).double(), batch.inputs).x0
        t = method.law.between(0.02, 0.98, batch.draws.uniform())
        wide = t.float().view(-1, 1, 1, 1)
        x_t = (1 - wide) * x0.detach() + wide * noises[-1]
        with torch.no_grad():
            fake = method.networks[FAKE](x_t, t, batch.inputs).x0
        real = method.real(x_t, t, batch.inputs)
        g = (fake - real) / ((x0 - real).abs().mean((1, 2, 3), keepdim=True) + 1e-4)
        (g.detach() * x0).mean().backward()
        other = gradients(run.trainer.roles["student"])
        pairs = [(a, b) for a, b in zip(found, other, strict=True) if b is not None]
        apart = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
        size = torch.cat([b.flatten() for _, b in pairs]).norm()
        assert apart < 1e-4 * size
        run.trainer.roles["student"].optimizer.zero_grad()


def test_mixed_precision_has_the_same_gradient(made, tmp_path):
    """In bfloat16, earlier steps without a gradient must not leave weights behind that have none."""
    run = start(config(made, tmp_path / "run"))
    run.method.place = lambda name, batch, count: 3
    batch = run.trainer.data.batch(range(4), "student", 0)
    role, found = run.trainer.roles["student"], []
    for on in (False, True):
        batch = run.trainer.data.batch(range(4), "student", 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = run.method.loss("student", batch)["matching"]
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in role.parameters if p.grad is not None]))
        role.optimizer.zero_grad()
    assert found[0].shape == found[1].shape
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.9


def test_truncation_is_shared_by_an_update(made, tmp_path):
    """Trap 7: the number of steps is that of the update, the same for its parts; others have others."""
    run = start(config(made, tmp_path / "run", micro_batch=1))
    places, method = [], run.method
    drawn = method.place
    method.place = lambda *words: places.append((words[0], drawn(*words))) or places[-1][1]
    run.trainer.fit()
    parts = [places[n : n + 4] for n in range(0, len(places), 4)]
    assert all(len(set(part)) == 1 for part in parts) and len(parts) == 9
    assert len({part[0] for part in parts}) > 3


def test_one_step_is_the_case_of_one(made, tmp_path):
    """Check E: bit by bit the terms of the first step of more."""
    one, four = (start(config(made, tmp_path / str(n), steps=[n])) for n in (1, 4))
    four.method.place = lambda name, batch, count: 0
    for name in ("student", FAKE):
        terms = [run.method.loss(name, run.trainer.data.batch(range(4), name, 0)) for run in (one, four)]
        assert terms[0].keys() == terms[1].keys()
        assert all(torch.equal(value, terms[1][key]) for key, value in terms[0].items())


@pytest.mark.parametrize("teacher", ["sd", "dit"])
def test_simulation_is_what_the_scheduler_makes(made, tmp_path, teacher):
    """Check E: the steps of training are those of LCMScheduler on the same noise, from pure noise on."""
    run = start(config(made, tmp_path / "run", teacher))
    method, host = run.method, run.host
    grid = method.grid(4)
    scheduler = scheduler_for(host.pipe.scheduler, grid)
    assert type(scheduler) is diffusers.LCMScheduler
    inputs, noise = host.encode(run.store.conditions[:2]), torch.randn(2, *host.shape)
    scheduler.set_timesteps(4)
    generator, x = torch.Generator().manual_seed(7), noise
    for time in scheduler.timesteps:
        output = inputs.call(host.network, x, time.expand(2).float())
        output = output[0][:, : x.shape[1]]
        x = scheduler.step(output, time, x, generator=generator, return_dict=False)[0]
    generator.manual_seed(7)
    fresh = [torch.randn(2, *host.shape, generator=generator) for _ in range(3)]
    ask = method.ask(method.setup.teacher, inputs)
    found = walk([ask] * 4, method.first(noise), (*grid.times, 0.0), [*fresh, fresh[0]])
    assert (found - x).abs().max() < 1e-5 * x.abs().max()


def test_flows_leave_with_a_stock_scheduler():
    """A flow's grid has the teacher's shift: 1, .9375, .8333, .625 for a shift of 5 (trap 10)."""
    teacher = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    grid = Grid.stock(teacher, 4, jump=True)
    assert grid.times == pytest.approx((1, 0.9375, 0.8333, 0.625), abs=1e-4) and grid.kind == "x0-jump"
    stock = scheduler_for(teacher, Grid.stock(diffusers.FlowMatchEulerDiscreteScheduler(), 4, jump=True))
    assert stock.config.stochastic_sampling


def test_score_times():
    """Uniform in the network's own time, shifted; parts are the opposite of times."""
    law = ScoreTimes(FlowUnits(0, 1000), 5.0)
    parts = torch.linspace(0, 1, 11).double()
    torch.testing.assert_close(law.time(parts), 5 * parts / (1 + 4 * parts))
    assert law.part(5 / 6) == pytest.approx(0.5) and law.part(0.0) == pytest.approx(0)
    table = TableUnits(torch.linspace(0.999, 0.01, 50), "epsilon")
    times = ScoreTimes(table).time(parts)
    torch.testing.assert_close(table.level(1 - times, times).timestep, 49 * parts)
    edm = EDMUnits(0.5, "epsilon").time(parts)
    torch.testing.assert_close((edm / (1 - edm))[[0, -1]], torch.tensor([0.002, 80.0]).double())
    drawn = law.between(0.5, 1, torch.rand(1000))
    assert 0.8333 <= drawn.min() and drawn.max() < 1


# ---------------------------------------------------------------- guidance, discriminator, regression


def test_guidance_is_of_the_unconditional(made, tmp_path):
    """Check H, and trap 4: w = 1 is cond, w = 0 uncond, others uncond + w (cond - uncond)."""
    found = {}
    for w in (-1.0, 0.0, 1.0, 3.0):
        run = start(config(made, tmp_path / str(w), options={"guidance": w}))
        inputs, t = run.host.encode([0, 1]), torch.full((2,), 0.6)
        x_t = torch.randn(2, *run.host.shape, generator=torch.Generator().manual_seed(0))
        found[w] = run.method.real(x_t, t, inputs)
    teacher = run.method.setup.teacher
    with torch.no_grad():
        cond = teacher(x_t, t, inputs).x0
        uncond = teacher(x_t, t, run.host.encode_unconditional(2)).x0
    assert torch.equal(found[1.0], cond)
    torch.testing.assert_close(found[0.0], uncond)
    torch.testing.assert_close(found[3.0], uncond + 3 * (cond - uncond))
    torch.testing.assert_close(found[-1.0], uncond + 2 * (cond - uncond)), "the pairs have 2"


def test_the_discriminator_is_trained_in_its_own_turn(made, tmp_path):
    """Check G: the student's turn leaves no gradient in fake score and head, and changes neither."""
    run = start(config(made, tmp_path / "run", options={"adversarial": 0.1, "regression": 0.25}))
    fake, student = run.trainer.roles[FAKE], run.trainer.roles["student"]
    heads = [n for n, key in enumerate(fake.keys) if key.startswith("head.")]
    assert len(heads) == 6
    batch = turn(run, "student")
    assert all(p.grad is None for p in fake.parameters)
    assert any(g is not None and g.abs().max() > 0 for g in gradients(student))
    terms = run.method.loss("student", run.trainer.data.batch(batch.draws.numbers, "student", 0))
    assert terms.keys() == {"matching", "adversarial", "regression"}
    adversarial = torch.autograd.grad(terms["adversarial"], student.parameters, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in adversarial if g is not None) > 0
    student.optimizer.zero_grad()
    turn(run, FAKE)
    assert all(fake.parameters[n].grad.abs().max() > 0 for n in heads)
    assert all(p.grad is None for p in student.parameters)
    before = [p.clone() for p in fake.parameters]
    run.method.turns = lambda step: ("student",)
    run.trainer.update()
    assert all(torch.equal(a, b) for a, b in zip(before, fake.parameters, strict=True))
    assert run.trainer.roles["student"].network is not fake.network


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.mid_block = nn.Conv2d(4, 12, 8, stride=8)


def test_heads_take_any_size():
    """Check G: latents of 64 and 128, and the tokens of transformers."""
    network, head = Middle(), Head(12)
    features = Features(network)
    for size in (64, 128):
        network.mid_block(torch.randn(2, 4, size, size))
        assert head(features.take()).shape == (2, 1, (size // 8) ** 2)
    blocks = nn.Module()
    blocks.transformer_blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(5))
    assert middle_of(blocks) is blocks.transformer_blocks[2]
    features = Features(blocks)
    blocks.transformer_blocks[2](torch.randn(2, 9, 12))
    assert head(features.take()).shape == (2, 1, 9)


# ---------------------------------------------------------------- runs


def test_stopping_and_going_on_changes_no_bit(made, tmp_path):
    """Both networks, the discriminator, the student's average, and both optimizers."""
    options = {"adversarial": 0.1}
    whole = start(config(made, tmp_path / "whole", options=options))
    whole.trainer.fit()
    start(config(made, tmp_path / "part", options=options)).trainer.fit(stop=8)
    again = resume(tmp_path / "part")
    assert again.trainer.images == 8
    again.trainer.fit()
    assert_same(weights(whole), weights(again))
    with pytest.raises(CheckpointError, match=r"another run: steps is \[4\] there and \[2\] here"):
        resume(tmp_path / "part", ("steps=[2]",))


def test_two_adapters_share_one_base(made, tmp_path):
    """LoRA: student and fake score on the teacher's weights, which stay; a resume is exact."""
    whole = start(config(made, tmp_path / "whole", "sd", lora_rank=2))
    setup = whole.method.setup
    assert all(role.network is setup.teacher.network for role in whole.trainer.roles.values())
    inputs, t = whole.host.encode(["a red boot"]), torch.full((1,), 0.5)
    x_t = torch.randn(1, *whole.host.shape)
    with torch.no_grad():
        before = setup.teacher(x_t, t, inputs).x0
    whole.trainer.fit()
    with torch.no_grad():
        assert torch.equal(setup.teacher(x_t, t, inputs).x0, before)
        for denoiser in whole.method.networks.values():
            assert (denoiser(x_t, t, inputs).x0 - before).abs().max() > 1e-6
    assert not set(whole.trainer.roles["student"].keys) & set(whole.trainer.roles[FAKE].keys)
    start(config(made, tmp_path / "part", "sd", lora_rank=2)).trainer.fit(stop=8)
    again = resume(tmp_path / "part")
    again.trainer.fit()
    assert_same(weights(whole), weights(again))
    made_of = checkpoints.find(tmp_path / "part")[0]
    assert sum(file.stat().st_size for file in made_of.glob("model*.safetensors")) < 2**20


@pytest.mark.parametrize("changes", [
    {"options": {"adversarial": 0.1, "regression": 0.1}}, {"teacher": "sd", "lora_rank": 2},
])  # fmt: skip
def test_two_processes_make_the_course_of_one(made, tmp_path, changes):
    """Both networks, or two adapters of one, are the same to 1e-6."""
    changes = {**changes, "optimizer": "SGD", "lr": 1e-3, "ema_images": 0, "images": 8}
    settings = config(made, tmp_path / "one", **changes)
    one = start(settings)
    one.trainer.fit()
    second = merge({**asdict(settings), "run": str(tmp_path / "two")})

    together(fit_and_save, second, tmp_path / "two.pt")
    found = torch.load(tmp_path / "two.pt")
    for name, role in one.trainer.roles.items():
        for key, p in zip(role.keys, role.parameters, strict=True):
            torch.testing.assert_close(found[name][key], p, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


def test_collapse_is_detected(made, tmp_path):
    """A learning rate that is far too large has signs that the validation names."""
    signs = {}
    for lr in (1e-6, 1.0):
        run = start(config(made, tmp_path / str(lr), lr=lr, eval_count=8, images=8, ema_images=0))
        run.trainer.fit()
        signs[lr] = Validation(run)()["signs"]
    assert signs[1.0] and len(signs[1.0]) > len(signs[1e-6]), signs


def test_a_student_leaves_with_its_grid(made, tmp_path):
    """Exported, it makes the images of training, with LCM's stock scheduler."""
    run = start(config(made, tmp_path / "run", steps=[2]))
    run.trainer.fit()
    out = export_run(run, tmp_path / "student", torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe.scheduler) is diffusers.LCMScheduler


@pytest.mark.parametrize(("changes", "words"), [
    ({"steps": [1, 2]}, r"trains one number of steps; set steps=\[4\], not \[1, 2\]"),
    ({"options": {"times": [0.9, 0.5]}}, r"steps=\[4\], but 2 times are trained"),
    ({"steps": [2], "options": {"times": [0.5, 0.9]}}, "expected falling ones"),
    ({"options": {"times": "0.9, 0.5"}}, "no list of numbers"), ({"options": {"times": [True]}}, "no list"),
    ({"options": {"earliest": 0.5, "latest": 0.5}}, "scores are compared from 0.5 to 0.5"),
    ({"lora_rank": 2, "options": {"adversarial": 1.0}}, "set lora_rank=0"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(made, tmp_path, changes, words):
    with pytest.raises(OptionError, match=words):
        start(config(made, tmp_path / "run", **changes))


def test_other_grids_are_refused(made, tmp_path):
    run = start(config(made, tmp_path / "run", steps=[2], options={"times": [0.9, 0.5]}))
    assert run.method.grid(2).times == (0.9, 0.5)
    with pytest.raises(OptionError, match=r"trained at the times \(0.9, 0.5\), and for no other number"):
        run.method.grid(4)

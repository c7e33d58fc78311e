"""Students by condition: the partition, the route, what each is trained on, and one pipeline for all."""

import copy
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from test_experts import TINY, call_of, fresh, part_of, run, variants
from torch import nn

from diffaccel.distill import Denoiser, Host, PairStore
from diffaccel.distill.assembly import joined
from diffaccel.distill.config import Config, merge
from diffaccel.distill.data import PairData
from diffaccel.distill.matching import kl_weight, matching_gradient, straight, surrogate
from diffaccel.distill.method import Expert
from diffaccel.distill.msd import score_loss
from diffaccel.distill.pairs import make_pairs
from diffaccel.distill.partition import Partition, split_evenly, tree_of
from diffaccel.distill.runs import export_run, resume, start
from diffaccel.distill.validation import Validation
from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.pipelines import ConditionExperts
from diffaccel.pipelines.condition_experts import branch_of
from diffaccel.pipelines.unguided import unguided

# ---------------------------------------------------------------- A: the capacity law


LAW = {1: 0.08889, 2: 0.005556, 4: 0.000347}
"""The error h^4 / 180 of K students on slices of the width h = 2 / K."""


def test_capacity_law():
    """Affine students x = a z + b c + d of N(c^2, .7^2) on slices of c in [-1, 1]; K = 1, 2 and 4 at once.

    Our own gradient, by exact scores of both. The tolerance is the card's, 5 % + 3e-5.
    """
    size, generator = 512, torch.Generator().manual_seed(0)
    width = torch.tensor([2.0 / count for count in LAW for _ in range(count)], dtype=torch.float64)
    low = torch.tensor([-1 + 2.0 / count * place for count in LAW for place in range(count)]).double()
    a, b, d = (torch.full_like(low, value).requires_grad_() for value in (0.3, 0.0, 0.0))
    optimizer = torch.optim.Adam([a, b, d], 2e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        z, e = torch.randn(2, size, 1, dtype=torch.float64, generator=generator)
        u, v = torch.rand(2, size, 1, dtype=torch.float64, generator=generator)
        c, t = low + width * u, 0.02 + 0.96 * v[:, 0]
        x = a * z + b * c + d
        level, clean = straight(t), straight(torch.zeros_like(t))
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        x_t = (alpha * x + sigma * e).detach()
        real, fake = (
            mean + var * alpha * (x_t - alpha * mean) / (alpha**2 * var + sigma**2)
            for mean, var in ((c**2, 0.49), ((b * c + d).detach(), a.detach() ** 2))
        )
        gradient = matching_gradient(real, fake, x.detach(), kl_weight("flow", clean, level))
        optimizer.zero_grad()
        surrogate(gradient, x).backward()
        optimizer.step()
        scheduler.step()
    c = low + width * (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000
    errors = (b * c + d - c**2).square().mean(0).detach().split([*LAW])
    assert a.abs().tolist() == pytest.approx([0.7] * len(low), abs=0.01)
    for error, law in zip(errors, LAW.values(), strict=True):
        assert error.mean().item() == pytest.approx(law, rel=0.05, abs=3e-5)


# ---------------------------------------------------------------- F: the teacher's scores


def test_score_matching_of_a_gaussian_teacher():
    """Its own weights have loss 0 and gradient 0; a linear student's minimizer is the teacher, to 1e-6."""
    mean, var = 1.3, 0.49
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 256, 1, dtype=torch.float64, generator=generator)
    x0 = mean + 0.7 * x0

    def teacher(x_t, t):
        a, s = 1 - t[:, None], t[:, None]
        mu = mean + var * a * (x_t - a * mean) / (a**2 * var + s**2)
        return (x_t - mu) / s

    for time in (0.1, 0.5, 0.9):
        t = torch.full((256,), time, dtype=torch.float64)
        gain, rest = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))

        def student(x_t, t, gain=gain, rest=rest):
            return gain * x_t + rest

        optimizer = torch.optim.LBFGS(
            [gain, rest], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16
        )

        def closure(t=t, student=student, optimizer=optimizer):
            optimizer.zero_grad()
            loss = score_loss(student, teacher, x0, noise, t).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        k = var * (1 - time) / ((1 - time) ** 2 * var + time**2)
        assert gain.item() == pytest.approx((1 - k) / time, abs=1e-6)
        assert rest.item() == pytest.approx(-(mean - k * (1 - time) * mean) / time, abs=1e-6)


def test_score_matching_of_the_teacher_itself():
    host = host_of("dit")
    student = copy.deepcopy(host.network).requires_grad_(True)
    inputs = host.encode([0, 1])
    fields = [lambda x, t, network=network: Denoiser(network, host.units)(x, t, inputs).velocity
              for network in (student, host.network)]  # fmt: skip
    x0, noise = torch.randn(2, 2, *host.shape)
    loss = score_loss(*fields, x0, noise, torch.tensor([0.3, 0.8]))
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


# ---------------------------------------------------------------- C: the partition


def plain(name):
    """A fresh pipeline; one of classes knows all numbers."""
    pipe = fresh(name)
    pipe.labels = {}
    return pipe


def host_of(name):
    return Host(plain(name), call_of(name))


COLORS = ("red", "blue", "green", "old", "wet")
THINGS = ("boot", "coat", "dress", "house", "cat", "tree", "sea", "bag")
PROMPTS = [f"a {color} {thing} {number}" for number in range(3) for color in COLORS for thing in THINGS]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_labels_are_divided(count):
    """Disjoint, exhaustive, consecutive, with sizes within 1."""
    host = host_of("dit")
    labels = list(range(9, -1, -1))
    partition = Partition.of(host, [*labels, 3, 3], count)
    sizes = [len(own) for own in partition.parts]
    assert sorted(label for own in partition.parts for label in own) == sorted(labels)
    assert max(sizes) - min(sizes) <= 1
    assert [label for own in partition.router["labels"] for label in own] == sorted(labels)
    assert split_evenly(range(10), 4) == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


@pytest.mark.parametrize(("name", "argument", "count"), [
    ("sd", "encoder_hidden_states", 4), ("sdxl", "added_cond_kwargs.text_embeds", 3),
])  # fmt: skip
def test_prompts_are_divided(name, argument, count):
    """Disjoint, exhaustive, sizes within 2 %; the saved route is the same, and a function of the prompt."""
    host = host_of(name)
    partition = Partition.of(host, PROMPTS, count)
    assert partition.router["argument"] == argument
    assert sorted(prompt for own in partition.parts for prompt in own) == sorted(set(PROMPTS))
    for own in partition.parts:
        assert abs(len(own) - len(set(PROMPTS)) / count) <= 0.02 * len(PROMPTS)
    assert Partition.of(host_of(name), PROMPTS, count) == partition
    saved = json.loads(json.dumps(partition.router))
    network = ConditionExperts.of([(host.network, None)] * count, **saved)
    for part, own in enumerate(partition.parts):
        for prompts in (own[:6], own[3:4]):  # the neighbors do not matter
            assert network.route((), host.encode(prompts).kwargs) == [part] * len(prompts)


def test_quantiles_of_embeddings():
    points = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points *= torch.tensor([3.0, 2.0, 1.0])
    for count in (2, 4, 5, 8):
        axes, tree = tree_of(points, count)
        found = branch_of(points, axes, tree)
        assert sorted(set(found)) == list(range(count))
        assert all(abs(found.count(place) - 1000 / count) <= 2 for place in range(count))
    assert branch_of(points, *tree_of(points, 1)) == [0] * 1000
    with pytest.raises(OptionError, match="too many prompts have one embedding"):
        tree_of(points[:1].expand(8, 3), 2)


# ---------------------------------------------------------------- D: the route


def experts_of(name, count=2):
    """A pipeline, its host, and experts by condition."""
    pipe = plain(name)
    host = Host(pipe, call_of(name))
    conditions = list(range(10)) if host.kind == "class_labels" else PROMPTS[:40]
    partition = Partition.of(host, conditions, count)
    networks = variants(host.network, count)
    experts = [Expert(Denoiser(network, host.units), 0.0, own)
               for network, own in zip(networks, partition.parts, strict=True)]  # fmt: skip
    return pipe, host, partition, networks, joined(experts, host.units, partition.router)


@pytest.mark.parametrize("name", ["dit", "sd", "sd3"])
def test_mixed_batches(name):
    """Rows are, bit for bit, what their own network makes of them; so is a batch in another order."""
    _, host, partition, networks, network = experts_of(name)
    rows = [partition.parts[k][n] for k, n in ((0, 0), (1, 0), (1, 1), (0, 1))]
    inputs = host.encode(rows)
    x = torch.randn(4, *host.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.3, 0.9, 0.3])
    with torch.no_grad():
        found = Denoiser(network, host.units)(x, t, inputs).velocity
        for index, own in (([0, 3], networks[0]), ([1, 2], networks[1])):
            alone = Denoiser(own, host.units)(x[index], t[index], inputs.take(index)).velocity
            assert torch.equal(found[index], alone)
        turned = [2, 0, 3, 1]
        other = Denoiser(network, host.units)(x[turned], t[turned], inputs.take(turned)).velocity
        one = [Denoiser(network, host.units)(x[n : n + 1], t[n : n + 1], inputs.take([n])).velocity
               for n in range(4)]  # fmt: skip
    scale = float(found.abs().max())
    assert torch.allclose(other, found[turned], rtol=0, atol=1e-5 * scale)
    assert torch.allclose(torch.cat(one), found, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["dit", "sd"])
def test_pipelines(name, tmp_path):
    """An ordinary pipeline: images of a mixed batch are those of single calls, saved and loaded or not."""
    pipe, host, partition, _, network = experts_of(name)
    setattr(pipe, host.component, network)
    rows = [partition.parts[k][0] for k in (1, 0)]
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for part in loaded.components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            parameter.data = parameter.data.clone()

    def images(pipe, conditions, seeds):
        call = unguided(pipe, conditions, call_of(name))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        kind = "pt" if name == "dit" else "latent"
        return torch.as_tensor(pipe(**call, generator=generators, num_inference_steps=2, output_type=kind)[0])

    both = images(pipe, rows, [1, 2])
    assert torch.equal(images(loaded, rows, [1, 2]), both)
    assert getattr(loaded, part_of(name)).config["argument"] == partition.router["argument"]
    assert torch.allclose(images(pipe, rows[::-1], [2, 1]), both.flip(0), rtol=0, atol=1e-5)
    for place in range(2):
        one = images(pipe, rows[place : place + 1], [1 + place])
        assert torch.allclose(one, both[place : place + 1], rtol=0, atol=1e-5)


def test_conditions_that_belong_to_nobody():
    pipe, host, _, networks, network = experts_of("dit")
    pipe.transformer = network
    with pytest.raises(OptionError, match=r"the label 1000 belongs to no expert.*guidance_scale=1"):
        run(TINY["dit"], pipe, 2, guidance_scale=4.0)
    with pytest.raises(UnsupportedPipeline, match="chosen by 'class_labels', which is not given"):
        network.route((), {})
    with pytest.raises(OptionError, match="belongs to two experts"):
        ConditionExperts(labels=[[1], [1]])
    experts = [Expert(Denoiser(part, host.units), bound, (n,))
               for n, (part, bound) in enumerate(zip(networks, (0.5, 0.0), strict=True))]  # fmt: skip
    with pytest.raises(OptionError, match="not by both"):
        joined(experts, host.units, {"labels": [[0], [1]]})
    with pytest.raises(OptionError, match="unconditional"):
        Partition.of(host_of("ddim"), [None], 1)
    with pytest.raises(OptionError, match="2 conditions for 3 students"):
        Partition.of(host, [1, 2, 2], 3)


# ---------------------------------------------------------------- B, E, G: runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny teacher and 24 pairs of it, of 6 classes."""
    folder = tmp_path_factory.mktemp("msd")
    TINY["dit"].build().save_pretrained(folder / "teacher")
    make_pairs(folder / "pairs", plain("dit"), list(range(6)), count=24, steps=2, guidance=2.0, batch=8)
    return folder


def config(made, folder, **changes) -> Config:
    settings = {
        "method": "msd", "teacher": str(made / "teacher"), "pairs": str(made / "pairs"), "run": str(folder),
        "images": 12, "batch": 4, "warmup_images": 4, "ema_images": 8, "eval_count": 0, "log_images": 4,
        "lr": 1e-3, "steps": [1], "threads": 1, "options": {"students": 2, "ratio": 1},
    }  # fmt: skip
    return merge({**settings, **changes})


def weights(run, turn):
    role = run.trainer.roles[turn]
    found = [p.detach().clone() for p in role.parameters]
    return found + ([] if role.average is None else [p.clone() for p in role.average.shadow_params])


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [
    {"ratio": 2}, {"ratio": 1, "regression": 0.5, "adversarial": 0.1},
])  # fmt: skip
def test_one_student_is_that_of_dmd2(made, tmp_path, options):
    """Bit for bit, the fake score too."""
    plain = start(config(made, tmp_path / "dmd2", method="dmd2", options=options))
    one = start(config(made, tmp_path / "msd", options={**options, "students": 1}))
    for trained in (plain, one):
        trained.trainer.fit()
    for turn in ("student", "fake_score"):
        assert same(weights(plain, turn), weights(one, turn))


def test_students_see_their_own_conditions(made):
    """10 000 draws of each student's matching are of its part; its pairs are of every class."""
    store, host = PairStore(made / "pairs"), host_of("dit")
    parts = {"student": (0, 1, 2), "fake_score": (0, 1, 2), "student_2": (3, 4, 5)}
    data = PairData(store, host, 0, torch.device("cpu"), parts.get)
    for turn, own in parts.items():
        places = data._among(own)
        drawn = {store.conditions[store.order(0, n, places) % 6] for n in range(10_000)}
        assert drawn == set(own)
        batch = data.batch(range(200), turn, 0)
        assert set(batch.inputs.kwargs["class_labels"].tolist()) == set(own)
        assert set(batch.unfiltered.inputs.kwargs["class_labels"].tolist()) == set(range(6))
        with torch.autocast("cpu", torch.bfloat16):  # as within a step
            again = batch.unfiltered
        assert torch.equal(again.x0, batch.unfiltered.x0) and again.x0.dtype == torch.float32
    epoch = [store.order(0, n, data._among((0, 1, 2))) for n in range(12)]
    assert sorted(epoch) == data._among((0, 1, 2))  # each pair once
    assert data.batch(range(4), "all", 0).whole is None


def test_what_a_run_gives_its_students(made, tmp_path):
    run = start(config(made, tmp_path / "run"))
    seen: dict[str, set[int]] = {}
    for turn, (place, name) in run.method._places.items():
        job, loss = run.method.jobs[place], run.method.jobs[place].loss

        def watched(inner, batch, loss=loss, job=job):
            labels = set(batch.inputs.kwargs["class_labels"].tolist())
            seen.setdefault(f"{id(job)}", set()).update(labels)
            return loss(inner, batch)

        job.loss = watched
        assert run.method.conditions(turn) == ((0, 1, 2), (3, 4, 5))[place] and name in (
            "student",
            "fake_score",
        )
    run.trainer.fit()
    assert [seen[f"{id(job)}"] for job in run.method.jobs] == [{0, 1, 2}, {3, 4, 5}]
    assert run.method.turns(0) == ("student", "fake_score", "student_2", "fake_score_2")


def test_students_are_independent(made, tmp_path):
    """What student 2 learns, or whether it does, changes no bit of student 1."""
    changes = {"options": {"students": 2, "ratio": 1, "regression": 0.5}}
    both = start(config(made, tmp_path / "both", **changes))
    both.trainer.fit()
    alone = start(config(made, tmp_path / "alone", **changes))
    turns = alone.method.turns
    alone.method.turns = lambda step: tuple(turn for turn in turns(step) if not turn.endswith("_2"))
    alone.trainer.fit()
    for turn in ("student", "fake_score"):
        assert same(weights(both, turn), weights(alone, turn))
    assert not same(weights(both, "student_2"), weights(alone, "student_2"))
    assert both.trainer.roles["fake_score_2"].average is None


@pytest.mark.parametrize("rank", [0, 2])
def test_from_a_run_to_a_pipeline(made, tmp_path, rank):
    """Validated, exported and loaded: the averages of all students in one folder; a resume is exact."""
    whole = start(config(made, tmp_path / "run", eval_count=4, lora_rank=rank))
    whole.trainer.fit(stop=8)
    again = resume(tmp_path / "run")
    for trained in (whole, again):
        trained.trainer.fit()
    for turn in whole.trainer.roles:
        assert same(weights(whole, turn), weights(again, turn))
    assert "diversity/1" in Validation(again)()["validation"]
    folder = export_run(again, tmp_path / "it", torch.float32)
    network = DiffusionPipeline.from_pretrained(folder).transformer
    assert len(network.members) == 2 and len(network.networks) == (1 if rank else 2)
    assert network.config["labels"] == [[0, 1, 2], [3, 4, 5]]
    for place, turn in enumerate(("student", "student_2")):
        role = again.trainer.roles[turn]
        state = network.networks[network.members[place][0]].state_dict()
        for key, value in zip(role.keys, role.average.shadow_params, strict=True):
            assert torch.equal(state[key], value)
    text = (folder / "README.md").read_text()
    assert "by class: 0-2; 3-5" in text and "import diffaccel" in text
    if rank:
        folder = export_run(again, tmp_path / "lora", torch.float32, lora=True)
        put = ConditionExperts.on(plain("dit").transformer, folder)
        assert same(list(put.state_dict().values()), list(network.state_dict().values()))
    else:
        with pytest.raises(OptionError, match="weights of its own"):
            export_run(again, tmp_path / "lora", lora=True)


def test_smaller_students_and_all_stages(made, tmp_path):
    """Scores first, by one network for all; matching; the discriminator. A resume is exact in each."""
    options = {"students": 2, "ratio": 1, "score_part": 0.34, "adversarial_part": 0.34, "adversarial": 0.1}
    settings = {"student": "random", "student_changes": {"num_layers": 1}, "options": options}
    run = start(config(made, tmp_path / "run", **settings))
    assert run.method.stages == ("score", "matching", "adversarial") and run.method.boundaries == (4, 8)
    first = weights(run, "student_2")
    run.trainer.fit(stop=4)
    assert same(first, weights(run, "student_2")) and run.trainer.roles["fake_score"].images == 0
    learned = run.trainer.roles["student"].average.shadow_params
    run.trainer._enter(1)
    for turn in ("student", "student_2"):
        role = run.trainer.roles[turn]
        assert same(list(learned), [p.detach() for p in role.parameters])
        assert same(list(learned), list(role.average.shadow_params))
    whole = start(config(made, tmp_path / "whole", **settings))
    whole.trainer.fit()
    for stop in (4, 8):
        part = start(config(made, tmp_path / f"part{stop}", **settings))
        part.trainer.fit(stop=stop)
        part = resume(tmp_path / f"part{stop}")
        part.trainer.fit()
        assert all(same(weights(whole, turn), weights(part, turn)) for turn in whole.trainer.roles)
    layers = [len(role.network.transformer_blocks) for role in whole.trainer.roles.values()]
    assert layers == [1, len(whole.host.network.transformer_blocks)] * 2  # fake scores are as the teacher


def test_wrong_settings(made, tmp_path):
    for options, words in (
        ({"students": 0}, "students"), ({"students": 7}, "6 conditions for 7 students"),
        ({"score_part": 0.7, "adversarial_part": 0.5, "adversarial": 0.1}, "overlap"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            start(config(made, tmp_path / "run", options=options))
    with pytest.raises(OptionError, match="adapters have the teacher's scores"):
        start(config(made, tmp_path / "run", lora_rank=2, options={"score_part": 0.5}))

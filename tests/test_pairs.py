"""Stores of pairs: exactly what the pipeline makes, whole after any accident, in an order without end."""

import errno
import itertools
import json
import math
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import PROMPTS, TINY, fresh, vp

from diffaccel import accelerate, zoo
from diffaccel.distill.inversion import EARLIEST, invert
from diffaccel.distill.pair_noise import NoiseSource, packed_source, plain_source
from diffaccel.distill.pairs import PairsError, PairStore, Work, invert_pairs, make_pairs
from diffaccel.errors import OptionError, UnsupportedPipeline

SMALL = {"height": 32, "width": 32}
OPTIONS = {"sd": SMALL, "flux": {**SMALL, "max_sequence_length": TINY["flux"].call["max_sequence_length"]}}
LABELS = [1, 3]


def generators(numbers, seed=0):
    return [torch.Generator().manual_seed(seed + n) for n in numbers]


def make(folder, name="ddim", pipe=None, **changes):
    conditions = {"ddim": (), "dit": LABELS}.get(name, PROMPTS)
    arguments = {"count": 5, "steps": 2, "shard_size": 2, "stored": "float32", "options": OPTIONS.get(name)}
    return make_pairs(
        folder, pipe or fresh(name), changes.pop("conditions", conditions), **{**arguments, **changes}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of 5 pairs in 3 shards, of an unconditional pipeline; not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "pairs"
    make(folder)
    return folder


@pytest.fixture
def store(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "pairs")


# ---------------------------------------------------------------- what is stored


def plain_call(name, pipe, numbers, steps):
    """The noise as the solver starts from it, and what the plain pipeline returns."""
    call = {"generator": generators(numbers), "num_inference_steps": steps, **OPTIONS.get(name, {})}
    shape = (1, 3 if name == "ddim" else 4, 16, 16)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators(numbers)])
    if name == "ddim":
        return noise, pipe(batch_size=len(numbers), output_type="pt", **{**call})[0]
    if name == "dit":
        labels = [LABELS[n % 2] for n in numbers]
        return noise, pipe(class_labels=labels, guidance_scale=2.5, output_type="pt", **call)[0]
    prompts = [PROMPTS[n % 2] for n in numbers]
    if name == "flux":
        noise = pipe._pack_latents(noise, len(numbers), 4, 16, 16)
    return noise, pipe(prompt=prompts, guidance_scale=2.5, output_type="latent", **call)[0]


def shown(name, pipe, x0):
    """What a plain call would return for samples of its solver."""
    if name == "dit":
        x0 = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * x0).sample
    return (x0 / 2 + 0.5).clamp(0, 1) if name in ("ddim", "dit") else x0


CASES = [
    ("ddim", None), ("dit", None), ("flux", None), ("sd", diffusers.EulerDiscreteScheduler),
    ("sd", diffusers.HeunDiscreteScheduler), ("sd", diffusers.PNDMScheduler),
    ("sd", diffusers.DPMSolverMultistepScheduler),
]  # fmt: skip


@pytest.mark.parametrize(("name", "scheduler"), CASES)
def test_pairs_are_those_of_a_plain_call(name, scheduler, tmp_path):
    """Bit by bit: packed or not, guided or not, from noise that is scaled, in more updates than steps."""
    pipe = fresh(name)
    if scheduler is not None:
        pipe.scheduler = vp(scheduler)
    config, guidance = dict(pipe.scheduler.config), None if name == "ddim" else 2.5
    pairs = make(tmp_path, name, pipe, count=3, batch=2, guidance=guidance, steps=4)
    assert isinstance(pairs, PairStore) and len(pairs) == 3 and pairs.kind == "teacher"
    assert (
        pairs.guidance
        == guidance
        == json.loads((tmp_path / "pairs.json").read_text())["settings"]["guidance"]
    )
    assert dict(pipe.scheduler.config) == config and "sigmas" not in vars(pipe).keys()
    x0, noise, conditions = pairs.rows([0, 1, 2])
    for numbers in ([0, 1], [2]):  # as the shards were made
        ours, theirs = plain_call(name, pipe, numbers, 4)
        assert torch.equal(noise[numbers], ours)
        assert torch.equal(shown(name, pipe, x0[numbers]), theirs)
    known = {"ddim": [None], "dit": LABELS}.get(name, PROMPTS)
    assert (
        conditions == [known[n % len(known)] for n in range(3)] and x0.dtype == noise.dtype == torch.float32
    )
    x0, noise, conditions = pairs.rows([2, 0])
    assert torch.equal(x0[1], pairs.rows([0])[0][0]) and torch.equal(noise[0], pairs.rows([2])[1][0])


def test_a_zoo_model_and_half_precision(tmp_path):
    pipe = zoo.load("tiny-fashion-dit")
    pipe.set_progress_bar_config(disable=True)
    words = [zoo.LABELS[3], "17"]
    wide = make(tmp_path / "a", "zoo", pipe, conditions=words, count=3, steps=3, guidance=2.5, batch=2)
    half = make(
        tmp_path / "b",
        "zoo",
        pipe,
        conditions=words,
        count=3,
        steps=3,
        guidance=2.5,
        batch=2,
        stored="float16",
    )
    assert wide.rows([0, 1, 2])[2] == [3, 17, 3]
    assert torch.equal(wide.rows([0, 1])[0].half().float(), half.rows([0, 1])[0])
    assert load_file(tmp_path / "b" / "shard-000000.safetensors")["x0"].dtype == torch.float16
    images = pipe([3, 17], 2.5, generators([0, 1]), 3, output_type="pt")[0]
    decoded = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * wide.rows([0, 1])[0]).sample
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_found_in_any_type_and_packing(dtype):
    """Even where most numbers occur many times, and where the sample is wider than what was drawn."""
    shape = (4, 64, 64)
    drawn = torch.cat([torch.randn(1, *shape, generator=one, dtype=dtype) for one in generators(range(8), 5)])
    assert plain_source(5, (drawn * 14.6), 14.6).dtype == dtype
    assert plain_source(6, drawn, 1.0) is None and plain_source(5, drawn, 2.0) is None
    packed = drawn.view(8, 4, 32, 2, 32, 2).permute(0, 2, 4, 1, 3, 5).reshape(8, 1024, 16).float()
    assert plain_source(5, packed, 1.0) is None and packed_source(6, packed, 1.0) is None
    source = packed_source(5, packed, 1.0)
    assert torch.equal(source.rows(range(8)).float(), packed)
    assert torch.equal(
        source.order, torch.arange(4 * 64 * 64).view(4, 32, 2, 32, 2).permute(1, 3, 0, 2, 4).flatten()
    )
    assert torch.equal(NoiseSource(5, shape, dtype).rows([3]), drawn[3:4])


def test_what_makes_no_pairs_is_refused(tmp_path):
    noisy, other = fresh("ddim"), fresh("ddim")
    noisy.scheduler = diffusers.DDPMScheduler.from_config(noisy.scheduler.config)
    other.scheduler.init_noise_sigma = 2.0  # by which this pipeline does not multiply
    for pipe, name, expected in (
        (noisy, "ddim", "ancestral"), (other, "ddim", "init_noise_sigma"),
        (accelerate(fresh("ddim"), "reuse"), "ddim", "accelerated"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedPipeline, match=expected):
            make(tmp_path, name, pipe)
    for changes, expected in (
        ({"options": {"eta": 1.0}}, "eta"), ({"options": {"hight": 1}}, "hight"), ({"count": 0}, "count"),
        ({"stored": "float64"}, "float64"), ({"guidance": 2.0}, "no guidance"),
        ({"conditions": ["a"]}, "prompt"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=expected):
            make(tmp_path, **changes)
    with pytest.raises(OptionError, match="plain data"):
        make(tmp_path, "sd", options={"negative_prompt": torch.zeros(2)})
    with pytest.raises(OptionError, match="not finite"):
        pipe = fresh("ddim")
        pipe.unet.conv_out.bias.data += math.inf
        make(tmp_path, pipe=pipe)
    assert not list(tmp_path.glob("shard-*"))


# ---------------------------------------------------------------- accidents


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Killed(Exception):
    pass


def kill_after(count):
    done = []

    def advance(more):
        done.append(more)
        if sum(done) >= count:
            raise Killed

    return Work(advance=advance)


def test_a_killed_run_goes_on(made, tmp_path):
    (tmp_path / ".shard-000002.safetensors.1.tmp").write_bytes(b"half")
    with pytest.raises(Killed):
        make(tmp_path, work=kill_after(4))  # while the second shard is made
    assert [path.name for path in tmp_path.glob("*shard-*")] == ["shard-000000.safetensors"]
    with pytest.raises(PairsError, match=r"not finished: 1 of 3 shards"):
        PairStore(tmp_path)
    before = (tmp_path / "shard-000000.safetensors").stat().st_mtime_ns
    pairs = make(tmp_path)
    assert (tmp_path / "shard-000000.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path) == contents(made) and pairs.digest == PairStore(made).digest


def test_two_processes_make_the_files_of_one(made, tmp_path):
    there = []
    assert make(tmp_path, work=Work(1, 2, advance=there.append)) is None
    assert (
        sorted(path.name for path in tmp_path.glob("shard-*")) == ["shard-000001.safetensors"]
        and sum(there) == 2
    )
    with pytest.raises(PairsError, match="not finished"):
        PairStore(tmp_path)
    assert make(tmp_path, work=Work(0, 2)) is not None
    assert contents(tmp_path) == contents(made)


SHARD = "shard-000001.safetensors"


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def swap(path):
    shutil.copy(path.with_name("shard-000000.safetensors"), path)


def foreign(path):
    save_file({"x0": load_file(path)["x0"]}, path)


DAMAGE = {
    "missing": (SHARD, Path.unlink, True), "empty": (SHARD, lambda path: path.write_bytes(b""), True),
    "truncated": (SHARD, lambda path: path.write_bytes(path.read_bytes()[:999]), True),
    "changed": (SHARD, flip, True),
    "header": (SHARD, lambda path: flip(path, 20), True), "another shard": (SHARD, swap, False),
    "no shard": (SHARD, foreign, False), "no conditions": ("conditions.json", Path.unlink, True),
    "other conditions": ("conditions.json", lambda path: path.write_text('["a"]'), True),
    "no record": ("pairs.json", Path.unlink, True),
    "damaged record": ("pairs.json", lambda path: path.write_text('{"settings"'), False),
    "empty record": ("pairs.json", lambda path: path.write_text('{"settings": {}}'), False),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_mended(damage, store, made):
    name, act, mended = DAMAGE[damage]
    act(store / name)
    times = {path.name: path.stat().st_mtime_ns for path in store.glob("shard-*")}
    with pytest.raises(PairsError, match=name.replace(".", r"\.")):
        PairStore(store).verify()
    with pytest.raises(PairsError, match=name.replace(".", r"\.")):
        PairStore(store).rows(range(5))
    if not mended:  # not ours to overwrite
        with pytest.raises(PairsError, match=rf"{name}.*"):
            make(store)
        (store / name).unlink()
    make(store).verify()
    assert contents(store) == contents(made)
    kept = [path.name for path in store.glob("shard-*") if path.stat().st_mtime_ns == times.get(path.name)]
    assert len(kept) == (2 if name == SHARD else 3), "all others stay as they were"


def test_a_store_that_is_none(tmp_path):
    with pytest.raises(PairsError, match=r"pairs\.json.*expected a folder"):
        PairStore(tmp_path / "none")
    pairs = make(tmp_path / "flux", "flux", count=2)
    assert pairs.rows([0])[1].shape == (1, 64, 16)
    flip(tmp_path / "flux" / "packing.safetensors")
    with pytest.raises(PairsError, match=r"packing\.safetensors"):
        PairStore(tmp_path / "flux")
    record = json.loads((tmp_path / "flux" / "pairs.json").read_text())
    assert record["settings"]["noise"]["packing"] and record["made"]["versions"]["torch"] == torch.__version__
    record["made"]["first_noise"][0] += 0.1  # as if PyTorch drew other numbers
    make(tmp_path / "flux", "flux", count=2)
    (tmp_path / "flux" / "pairs.json").write_text(json.dumps(record))
    with pytest.raises(PairsError, match="draws other noise"):
        PairStore(tmp_path / "flux")


def test_other_settings_are_refused(store):
    before, other = contents(store), fresh("ddim")
    other.unet.conv_in.weight.data[0] += 1
    sampler = fresh("ddim")
    sampler.scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    for changes, expected in (
        ({"seed": 1}, "seed: 0, now 1"), ({"steps": 3}, "steps: 2, now 3"), ({"count": 6}, "count"),
        ({"shard_size": 3}, "shard_size"), ({"stored": "float16"}, "stored"), ({"pipe": other}, "weights"),
        ({"pipe": sampler}, "scheduler"),
    ):  # fmt: skip
        with pytest.raises(PairsError, match=rf"other settings \(.*{expected}"):
            make(store, **changes)
    (store / "pairs.json").unlink()
    with pytest.raises(PairsError, match=r"shard-000000.*other pairs"):
        make(store, seed=1)
    assert make(store, batch=3) and contents(store).keys() == before.keys()


def test_a_full_disk_leaves_no_half_file(made, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if "shard-000001" in path.name:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(PairsError, match=r"shard-000001.*No space left"):
        make(tmp_path)
    assert [path.name for path in tmp_path.glob("*shard-*")] == ["shard-000000.safetensors"]
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    make(tmp_path)
    assert contents(tmp_path) == contents(made)


# ---------------------------------------------------------------- the order


def test_order_has_every_pair_once_an_epoch(made):
    pairs, again = PairStore(made), PairStore(made)
    found = [pairs.order(7, number) for number in range(50)]
    epochs = [found[start : start + 5] for start in range(0, 50, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len({*map(tuple, epochs)}) > 5
    assert found != [pairs.order(8, number) for number in range(50)]
    backwards = [again.order(7, number) for number in reversed(range(50))]
    assert backwards[::-1] == found, "whatever came before, in batches of any size"
    with pytest.raises(PairsError, match="no pair 5"):
        pairs.rows([5])


# ---------------------------------------------------------------- real pairs


STD = 0.5


def gaussian(mean):
    """The exact velocity of data N(mean, STD^2)."""

    def velocity(x, t):
        t = t.view(-1, *[1] * (x.ndim - 1))
        gain = ((1 - t) * STD**2, t)
        variance = (1 - t) * gain[0] + t * gain[1]
        return (gain[1] - gain[0]) / variance * (x - (1 - t) * mean) - mean

    return velocity


def test_inverted_pairs_of_a_gaussian(tmp_path):
    """The noise is that of the closed form, and leads back to the data: the exact map is x = m + s z."""
    data = 1 + STD * torch.randn(70, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def field(conditions):
        return gaussian(torch.tensor([float(c) for c in conditions]).view(-1, 1, 1, 1))

    def make_real(folder, **changes):
        arguments = {"conditions": [1, -2], "count": 70, "batch": 16, "shard_size": 32, "stored": "float32"}
        return invert_pairs(folder, data, field, **{**arguments, "facts": {"data": "gauss"}, **changes})

    pairs = make_real(tmp_path / "a")
    x0, noise, conditions = pairs.rows(range(70))
    assert pairs.kind == "real" and conditions[:3] == [1, -2, 1] and torch.equal(x0, data)
    mean = torch.tensor(conditions).view(-1, 1, 1, 1)
    scale = math.hypot((1 - EARLIEST) * STD, EARLIEST) / (1 - EARLIEST)
    exact = (data - mean) / scale
    assert (noise - exact).abs().max() < 6 * EARLIEST / STD, "but for what t = 0.001 mixes in"
    assert noise[0::2].std() == pytest.approx(1, abs=0.1)
    assert (mean + STD * noise - data).abs().max() < 6 * EARLIEST
    half = make_real(tmp_path / "b", stored="float16", batch=70).rows(range(70))[1]
    assert (half - noise).abs().max() < 5e-3
    with pytest.raises(PairsError, match="evaluations: 128, now 64"):
        make_real(tmp_path / "a", evaluations=64)
    with pytest.raises(OptionError, match="latents for the pairs"):
        make_real(tmp_path / "c", count=80)
    flip(tmp_path / "a" / "shard-000002.safetensors")
    with pytest.raises(PairsError, match="shard-000002"):
        pairs.rows([69]) and PairStore(tmp_path / "a").rows([69])
    make_real(tmp_path / "a").verify()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_inversion_converges_with_the_order_of_its_solver(solver, order):
    x0 = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = torch.zeros_like(x0)
    exact = (x0 - 1) * (1 - EARLIEST) / math.hypot((1 - EARLIEST) * STD, EARLIEST)
    counts = (64, 128, 256)
    errors = [
        (invert(gaussian(1.0), x0, mixed, n, solver) - exact).square().mean().sqrt().item() for n in counts
    ]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.25 for slope in slopes), (errors, slopes)
    calls = []
    invert(lambda x, t: calls.append(t) or x, x0, mixed, 7, solver)
    assert len(calls) == 7 and max(t.max() for t in calls) < 1 and calls[0].shape == (64,)
    with pytest.raises(OptionError, match="no solver"):
        invert(gaussian(1.0), x0, mixed, solver="rk4")


def test_inversion_of_a_ring_of_modes_and_back():
    """Check 9 of the card: 8 modes of std 0.15 on a ring of radius 2, 128 steps of Heun; the median error."""
    generator, std = torch.Generator().manual_seed(0), 0.15
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    modes = 2 * torch.stack([angles.cos(), angles.sin()], 1)

    def velocity(x, t):
        t = t[:, None]
        variance = ((1 - t) * std) ** 2 + t**2
        apart = x[:, None] - (1 - t)[..., None] * modes
        share = (-apart.square().sum(-1) / (2 * variance)).softmax(1)
        x0 = (share[..., None] * (modes + ((1 - t) * std**2 / variance)[..., None] * apart)).sum(1)
        return (x - x0) / t

    x0 = modes[torch.randint(8, (2000,), generator=generator)]
    x0 = x0 + std * torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    mixed = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    noise = invert(velocity, x0, mixed, 256)
    assert noise.std() == pytest.approx(1, abs=0.03)
    x, steps = noise, 128
    times = [EARLIEST + (1 - EARLIEST) * (1 + math.cos(math.pi * n / steps)) / 2 for n in range(steps + 1)]
    for now, then in itertools.pairwise(times):
        slope = velocity(x, torch.full((2000,), min(now, 1 - 1e-5)))
        ahead = velocity(x + (then - now) * slope, torch.full((2000,), then))
        x = x + (then - now) / 2 * (slope + ahead)
    back = (x - (1 - EARLIEST) * x0 - EARLIEST * mixed).norm(dim=1)
    assert back.median() < 2e-5 and back.max() < 0.02

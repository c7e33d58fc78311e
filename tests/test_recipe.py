"""The training recipe, on a small data set written here, so that no package has to be installed."""

import dataclasses
import gzip
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes is not installed

from diffaccel import zoo
from diffaccel.errors import DiffaccelError, ModelError, OptionError
from diffaccel.eval.classifier import load_classifier
from diffaccel.zoo import fashion
from recipes.tiny_fashion import (
    __main__,
    checkpoint,
    classification,
    config,
    data,
    export,
    masked,
    models,
    objectives,
    train,
)

SMALL = {"batch": 4, "images": 16, "eval_size": 4, "eval_images": 12, "log_images": 8, "warmup_images": 8}


def write_idx(file, array):
    header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
    file.write_bytes(gzip.compress(header + array.tobytes(), 1))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 10), ("t10k", 6)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", rng.integers(0, 10, n, np.uint8))
    return folder


def settings(target, folder, **changes):
    return config.read(target, None, {**SMALL, "data": str(folder), **changes})


def same(one, other):
    """Whether two nested states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    ("target", "init"),
    [
        ("unet", "scratch"),
        ("dit", "zoo"),
        ("mar", "scratch"),
        ("vae", "scratch"),
        ("decoder", "zoo"),
        ("classifier", "scratch"),
    ],
)
def test_resume_is_exact(target, init, folder, tmp_path):
    chosen = settings(target, folder, init=init)
    whole = train.start(chosen, tmp_path / "whole")
    assert whole.fit(quiet=True) == "complete"
    part = train.start(chosen, tmp_path / "part")
    assert part.fit(stop=12, quiet=True) == "stopped"
    torch.rand(3)  # another state of the global generator must not matter
    resumed = train.resume(chosen, tmp_path / "part", checkpoint.read(tmp_path / "part"))
    assert resumed.images == 12
    resumed.fit(quiet=True)
    assert same(whole.state_dict(), resumed.state_dict())
    assert not same(whole.state_dict()["networks"], part.state_dict()["networks"])
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "part")
    ]
    losses = [[(r["images"], r["loss"], r["lr"]) for r in log if "loss" in r] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert logs[0][-1] == logs[1][-1] and "held_out" in logs[0][-1]


def test_decoder_training_leaves_the_encoder(folder, tmp_path):
    trainer = train.start(settings("decoder", folder, init="zoo"), tmp_path / "run")
    trainer.step()
    before, after = zoo.load("tiny-fashion-sd").vae.state_dict(), trainer.networks["vae"].state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_later_records_and_checkpoints_are_set_aside(folder, tmp_path):
    chosen = settings("vae", folder)
    trainer = train.start(chosen, tmp_path)
    trainer.fit(stop=8, quiet=True)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"images": 20, "loss": 1}\n{"images": 3')
    older = checkpoint.find(tmp_path)[0]
    for images in (16, 20):
        torch.save({"images": images}, tmp_path / f"checkpoint-{images:010d}.pt")
    resumed = train.resume(chosen, older, checkpoint.read(older))
    resumed.fit(stop=12, quiet=True)
    assert checkpoint.read(tmp_path)["images"] == 12  # and not that of 20 images
    assert len(list(tmp_path.glob("*.later"))) == 2
    assert all(json.loads(line)["images"] <= 12 for line in (tmp_path / "log.jsonl").open())


def test_crash_in_a_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint.write({"images": 1}, tmp_path, 1)

    def crash(state, stream):
        stream.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="no space"):
        checkpoint.write({"images": 2}, tmp_path, 2)
    assert checkpoint.read(tmp_path) == {"images": 1}
    monkeypatch.undo()
    for images in (2, 3, 4):
        newest = checkpoint.write({"images": images}, tmp_path, images)
    assert len(checkpoint.find(tmp_path)) == 2
    os.truncate(newest, 100)  # a damaged disk
    assert checkpoint.read(tmp_path) == {"images": 3}
    os.truncate(checkpoint.find(tmp_path)[1], 100)
    with pytest.raises(ModelError, match="cannot read"):
        checkpoint.read(tmp_path)


def test_missing_checkpoint(tmp_path):
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match="no checkpoint at"):
            checkpoint.read(source)


def test_a_run_is_not_overwritten(folder, tmp_path):
    checkpoint.write({}, tmp_path, 0)
    with pytest.raises(ModelError, match="--resume"):
        train.start(settings("vae", folder), tmp_path)


def test_settings(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lr: 3e-4\nbatch: 8\n")  # YAML reads 3e-4 as a string
    chosen = config.read("unet", file, {"batch": 2, "images": None})
    assert (chosen.lr, chosen.batch, chosen.images) == (3e-4, 2, config.Config.images)
    file.write_text("learning_rate: 1")
    with pytest.raises(OptionError, match=r"unknown setting 'learning_rate'.*known: batch, bf16"):
        config.read("unet", file)
    for wrong in ({"lr": "fast"}, {"lr": -1}, {"batch": 2.5}, {"bf16": 1}, {"null": 2}, {"target": "gan"}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            config.merge(chosen, wrong)
    with pytest.raises(OptionError, match="seed cannot change"):
        config.merge(chosen, {"seed": 5}, begun=True)
    file.write_text("lr: [")
    with pytest.raises(OptionError, match="cannot read the settings"):
        config.read("unet", file)
    for target in config.TARGETS:
        assert config.read(target).target == target


def test_learning_rate():
    chosen = config.Config(images=1000, batch=10, warmup_images=100, lr=1.0, flat=0.5, final_lr=0.02)
    rates = [chosen.learning_rate(images) for images in (0, 90, 500, 750, 999, 5000)]
    assert rates == pytest.approx([0.1, 1, 1, 0.5, 0.02, 0.02])


def test_data_errors(folder, tmp_path):
    with pytest.raises(data.DataError, match="apt-get install dataset-fashion-mnist"):
        data.load("train", tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    good = labels.read_bytes()
    cases = [
        (good[:-12], "expected a complete gzip file"),
        (b"no gzip", "expected a complete gzip file"),
        (gzip.compress(b"\0\0"), "begins with"),
        (gzip.compress(gzip.decompress(good)[:-1]), "9 bytes of data"),
        ((tmp_path / "train-images-idx3-ubyte.gz").read_bytes(), "begins with"),
        ((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes(), "10 images but 6 labels"),
        (gzip.compress(gzip.decompress(good)[:-1] + b"\x0a"), "label 10"),
    ]
    for content, message in cases:
        labels.write_bytes(content)
        with pytest.raises(data.DataError, match=message):
            data.load("train", tmp_path)


def test_stream(folder):
    split = data.load("train", folder)
    assert split.grey.shape == (10, 32, 32) and not split.grey[:, :2].any() and split.grey[:, 2].any()
    stream = data.Stream(split, torch.Generator().manual_seed(0))
    batches = [stream.next(5) for _ in range(400)]
    seen = torch.cat([batch.kinds for batch in batches[:2]])
    assert torch.equal(seen.sort().values, split.kinds.sort().values)  # one pass has every image once
    colors = torch.cat([batch.colors for batch in batches])
    assert abs((colors == 0).float().mean() - 0.5) < 0.05 and colors.max() == 8
    red = data.paint(torch.full((1, 32, 32), 255, dtype=torch.uint8), torch.tensor([2]))
    assert torch.allclose((red[0, :, 0, 0] + 1) / 2, torch.tensor(fashion.COLORS["red"]))
    assert batches[0].labels.tolist() == (10 * batches[0].colors + batches[0].kinds).tolist()


def test_architectures_are_those_of_the_zoo():
    sd, dit = zoo.load("tiny-fashion-sd"), zoo.load("tiny-fashion-dit")
    pairs = [
        (models.unet(), sd.unet), (models.vae(), sd.vae), (models.vae(), dit.vae),
        (models.ddim(), sd.scheduler), (models.dit(), dit.transformer), (models.flow_dpm(), dit.scheduler),
    ]  # fmt: skip
    for new, shipped in pairs:
        one, other = (
            {
                k: v
                for k, v in json.loads(json.dumps(dict(x.config))).items()
                if k[0] != "_" and k != "scaling_factor"
            }
            for x in (new, shipped)
        )
        assert one == other
    words = models.tokenizer()
    assert words.get_vocab() == sd.tokenizer.get_vocab()
    odd = [*fashion.CAPTIONS, "", "zebra crossing, 3 boots"]
    assert words(odd).input_ids == sd.tokenizer(odd).input_ids
    one, other = models.text_encoder(words).config.to_dict(), sd.text_encoder.config.to_dict()
    assert {k for k in one if one[k] != other[k]} <= {"architectures", "dtype", "_name_or_path"}


def test_weights_and_targets():
    vae = zoo.load("tiny-fashion-sd").vae
    epsilon = objectives.Epsilon(vae, null=0.0, bf16=False)
    t = torch.tensor([0.0, 0.25, 0.5, 0.999])
    alpha_t, sigma_t = epsilon.path(t)
    snr = (alpha_t / sigma_t) ** 2
    assert torch.allclose(epsilon.weight(t) * snr, snr.clamp(max=5)) and snr[0] > 5 > snr[-1]
    alphas = zoo.load("tiny-fashion-sd").scheduler.alphas_cumprod
    assert torch.equal(alpha_t**2 > 0, alphas[[0, 250, 500, 999]] > 0)
    assert torch.allclose(alpha_t**2, alphas[[0, 250, 500, 999]])
    batch = data.Batch(torch.zeros(2, 3, 32, 32), torch.tensor([7, 9]), torch.tensor([2, 0]))
    tokens = epsilon.condition(batch, torch.tensor([False, True]), torch.tensor([1, 1]))
    words = zoo.load("tiny-fashion-sd").tokenizer
    expected = words(["a red sneaker", ""], padding="max_length", truncation=True).input_ids
    assert tokens.tolist() == expected
    velocity = objectives.Velocity(vae, null=0.0, bf16=False)
    assert velocity.condition(batch, torch.tensor([False, True]), tokens).tolist() == [27, 1000]
    x0, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    a, s = velocity.path(torch.tensor(0.3))
    b, r = velocity.path(torch.tensor(0.7))
    slope = ((b * x0 + r * noise) - (a * x0 + s * noise)) / 0.4  # dx_t / dt
    assert torch.allclose(slope, velocity.target(x0, noise), atol=1e-5)


def test_the_zoo_denoises_better_than_nothing(folder):
    """A constant prediction costs about 2 for the velocity and 1 for the noise."""
    batch = data.held_out(data.load("test", folder), 4)
    batch = dataclasses.replace(batch, images=torch.full_like(batch.images, -1.0))
    for target, limit in (("unet", 0.3), ("dit", 1.0)):
        chosen = settings(target, folder, init="zoo", bf16=False)
        measured = objectives.build(chosen).held_out(models.build(chosen), batch)
        assert list(measured) == [*(f"t={level}" for level in objectives.LEVELS), "mean"]
        assert measured["t=0.5"] < limit


def test_masked_tokens(folder):
    """A new head predicts 0, whatever is masked; the held-out loss has every ratio and level."""
    chosen = settings("mar", folder)
    objective, networks = objectives.build(chosen), models.build(chosen)
    batch = data.held_out(data.load("test", folder), 4)
    measured = objective.held_out(networks, batch)
    assert list(measured) == [
        *(f"r={ratio} t={level}" for ratio in masked.RATIOS for level in objectives.LEVELS), "mean"
    ]  # fmt: skip
    assert all(abs(value - 1) < 0.2 for value in measured.values())
    assert objective.held_out(networks, batch) == measured
    losses = [
        objective.loss(networks, batch, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_classifier_averages_the_statistics(folder, tmp_path):
    trainer = train.start(settings("classifier", folder, ema_images=0, batch=16), tmp_path)
    before = trainer.average["classifier"].body[0].norm.running_mean.clone()
    trainer.step()
    average = trainer.average["classifier"]
    assert same(dict(average.state_dict()), dict(trainer.networks["classifier"].state_dict()))
    assert not torch.equal(average.body[0].norm.running_mean, before) and not average.training


def test_shift_keeps_what_the_frame_surrounds():
    images = torch.zeros(200, 3, 32, 32)
    images[:, :, 2:-2, 2:-2] = torch.rand(200, 3, 28, 28)
    moved = classification._shift(images, torch.Generator().manual_seed(0))
    places = {
        (dy, dx)
        for image, other in zip(images, moved, strict=True)
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        if torch.equal(image.roll((dy, dx), (1, 2)), other)
    }
    assert len(places) == 25
    assert torch.allclose(moved.sum((1, 2, 3)), images.sum((1, 2, 3)))


@pytest.mark.parametrize("target", config.TARGETS)
def test_export(target, folder, tmp_path):
    trainer = train.start(settings(target, folder, init="zoo", images=4), tmp_path / "run")
    trainer.fit(quiet=True)
    out = tmp_path / "out" / "model"
    message = export.export(tmp_path / "run", out)
    assert str(out) in message and "4 images" in message
    assert [file.name for file in out.parent.iterdir()] == ["model"]
    assert not any("_name_or_path" in file.read_text() for file in out.rglob("config.json"))
    with pytest.raises(ModelError, match="overwrite"):
        export.export(tmp_path / "run", out)
    export.export(tmp_path / "run", out, overwrite=True)
    assert json.loads((out / "training.json").read_text())["images"] == 4
    if target == "vae":
        network = AutoencoderKL.from_pretrained(out)
        assert network.config.scaling_factor != models.vae().config.scaling_factor
        return
    if target == "classifier":
        averaged = trainer.average["classifier"].half().float()
        loaded = load_classifier(out)
        assert same(dict(averaged.state_dict()), dict(loaded.state_dict()))  # with the statistics
        return
    pipe = DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    condition = pipe.get_label_ids(["red bag"]) if target in ("dit", "mar") else ["a red bag"]
    assert pipe(condition, num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    name = {"unet": "unet", "dit": "transformer", "mar": "transformer", "decoder": "vae"}[target]
    averaged = trainer.average[name].state_dict()
    saved = zoo.load_pipeline(out, torch.float16).components[name].state_dict()
    assert all(torch.equal(averaged[key].half(), saved[key]) for key in averaged)


def test_nonfinite_loss_stops(folder, tmp_path):
    trainer = train.start(settings("vae", folder), tmp_path)
    torch.nn.init.constant_(trainer.parameters[0], float("nan"))
    with pytest.raises(DiffaccelError, match="the loss is nan"):
        trainer.fit(stop=4, quiet=True)
    assert not checkpoint.find(tmp_path)


def test_interrupt_saves(folder, tmp_path):
    trainer = train.start(settings("vae", folder, images=10**7, eval_images=10**7), tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    threading.Timer(0.8, signal.raise_signal, [signal.SIGINT]).start()
    assert trainer.fit(quiet=True) == "interrupted"
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.read(tmp_path)["images"] == trainer.images > 0


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tiny_fashion", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        return ended.value.code, " ".join(capsys.readouterr().out.split())

    run = tmp_path / "run"
    options = ("--data", folder, "--images", 8, "--set", "batch=4", "--set", "eval_size=4")
    code, shown = call("train", "vae", *options, "--run", run, "--minutes", 0)
    assert code == 0 and "stopped after 4 of 8 images" in shown and f"--resume {run}" in shown
    code, shown = call("train", "vae", "--resume", run)
    assert code == 0 and "complete after 8 of 8 images" in shown and "psnr" in shown
    assert call("export", "--run", run, "--out", tmp_path / "vae")[0] == 0
    for arguments, message in [
        (("train", "vae", "--resume", tmp_path / "absent"), "error: no checkpoint at"),
        (("train", "gan"), "error: unknown target 'gan'"),
        (("train", "dit", "--resume", run), "error: target cannot change"),
        (("train", "vae", "--set", "speed=1"), "error: unknown setting 'speed'"),
        (("train", "vae", "--set", "lr"), "expected name=value"),
        (("train", "vae", "--data", tmp_path, "--run", tmp_path / "new"), "apt-get install"),
        (("train", "unet", "--init", "nonsense", *options, "--run", tmp_path / "new"), "nor in the zoo"),
    ]:
        code, shown = call(*arguments)
        assert code == 1 and message in shown, shown
    assert not (tmp_path / "new").exists()

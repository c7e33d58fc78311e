"""`diffaccel distill pairs` end to end."""

import json
import runpy
import sys

import pytest
from safetensors.torch import load_file
from torchvision.utils import save_image

from diffaccel import cli, zoo
from diffaccel.distill.denoiser import Denoiser, guided_velocity
from diffaccel.distill.host import Host
from diffaccel.distill.latents import decoder_of
from diffaccel.distill.pairs import PairStore
from diffaccel.distill.reflow import heun

DIT = "tiny-fashion-dit"
FAST = ("--n", 5, "--steps", 2, "--guidance", 2.5, "--scheduler", "dpm++", "--batch", 2, "--shard-size", 2)


@pytest.fixture
def run(monkeypatch, capfd):
    """Returns a function that runs a command, and returns its exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words, model=DIT):
        try:
            cli.main(["distill", "pairs", model, *map(str, words)])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capfd.readouterr()
        return code, out.out, out.err

    return call


def test_pairs_are_made_verified_and_mended(run, tmp_path):
    code, out, err = run(*FAST, "--out", tmp_path)
    assert code == 0 and not err, err
    assert "5 teacher pairs of shape (4, 16, 16), 2 steps, guidance 2.5" in out and str(tmp_path) in out
    store = PairStore(tmp_path)
    assert store.rows(range(5))[2] == zoo.labels(5) and store.guidance == 2.5
    record = json.loads((tmp_path / "pairs.json").read_text())
    assert record["made"]["model"] == DIT and len(record["settings"]["weights"]) == 64
    assert record["settings"]["scheduler"]["class"] == "DPMSolverMultistepScheduler"
    assert [entry["pairs"] for entry in record["shards"]] == [2, 2, 1]
    assert run("--verify", "--quiet", "--out", tmp_path) == (0, "", "")
    shard = tmp_path / "shard-000001.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    code, out, err = run("--verify", "--out", tmp_path)
    assert code == 2 and shard.name in err and "run its command again" in err
    assert run(*FAST, "--out", tmp_path, "--quiet") == (0, "", "")
    assert shard.read_bytes() == before and run("--verify", "--out", tmp_path)[0] == 0
    code, _, err = run(*FAST, "--seed", 1, "--out", tmp_path)
    assert code == 2 and "seed: 0, now 1" in err


def test_prompts_in_turn_and_the_module(tmp_path, monkeypatch, capfd):
    (tmp_path / "labels.txt").write_text("red bag\n7\n")
    words = ("--prompts", tmp_path / "labels.txt", "--float32", "--out", tmp_path / "pairs")
    monkeypatch.setattr(sys, "argv", ["distill", "pairs", DIT, *map(str, (*FAST, *words))])
    runpy.run_module("diffaccel.distill", run_name="__main__")
    assert "5 teacher pairs" in capfd.readouterr().out
    label = zoo.LABELS.index("red bag")
    assert PairStore(tmp_path / "pairs").rows(range(5))[2] == [label, 7, label, 7, label]
    assert load_file(tmp_path / "pairs" / "shard-000000.safetensors")["x0"].element_size() == 4


def test_mistakes_are_one_line(run, tmp_path):
    (tmp_path / "labels.txt").write_text("red bagg\n")
    for words, expected in (
        (("--scheduler", "euler-a"), "flow matching"),
        (("--scheduler", "nonsense"), "known:"),
        (("--prompts", tmp_path / "labels.txt"), "red bag"),
        (("--prompts", tmp_path / "none.txt"), "none.txt"),
        (("--n", 0), "greater than or equal to 1"),
        (("--dtype", "float8"), "float8"),
        (("--verify",), "pairs.json"),
    ):
        code, _, err = run(*FAST, *words, "--out", tmp_path / "pairs")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (words, err)
        assert expected in err, (words, err)
    assert run("--out", tmp_path / "pairs", model="no-such-model")[0] == 2
    assert not (tmp_path / "pairs").exists()


def test_real_images_are_led_back_to_noise(run, tmp_path):
    """The pairs are of data, and the teacher's ODE leads from their noise to them again."""
    images, numbers = zoo.reference()
    (tmp_path / "images").mkdir()
    for n, image in enumerate(images[:3]):
        save_image(image / 255, tmp_path / "images" / f"{n}.png")
    (tmp_path / "prompts.txt").write_text("".join(f"{zoo.LABELS[n]}\n" for n in numbers[:3]))
    code, _, err = run("--real", tmp_path / "images", "--prompts", tmp_path / "prompts.txt", "--n", 3,
                       "--steps", 24, "--guidance", 1, "--quiet", "--out", tmp_path / "pairs")  # fmt: skip
    assert code == 0, err
    store = PairStore(tmp_path / "pairs")
    assert store.kind == "real" and store.guidance == 1 and store.settings["evaluations"] == 24
    x0, noise, conditions = store.rows(range(3))
    host = Host(zoo.load(DIT))
    decode = decoder_of(host)
    assert decode is not None
    shown = (decode(x0).detach().clamp(-1, 1) + 1) * 127.5
    assert (shown - images[:3]).square().mean().sqrt() < 12  # the autoencoder's own error
    field = guided_velocity(Denoiser.of(host), host.encode(conditions), None, 1.0)
    again = heun(field, noise, 12)
    assert (again - x0).square().mean().sqrt() < 0.25 * x0.std()
    assert 0.5 < noise.std() < 1.2  # 0.67: of flat backgrounds a small model makes too little noise

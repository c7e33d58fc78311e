"""The command line end to end on the zoo, and what it says to mistakes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from diffaccel import cli, zoo
from diffaccel.cli import bench as benching
from diffaccel.cli.options import Sampler, read_accel
from diffaccel.errors import OptionError
from diffaccel.eval import Timing, count_flops, fidelity, interleave

SD = "tiny-fashion-sd"


def call(monkeypatch, capfd, *args):
    """Returns the exit code and what was printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["diffaccel", *map(str, args)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out = capfd.readouterr()
    return code, out.out, out.err


def test_list(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(monkeypatch, capfd, "list")
    assert code == 0
    assert all(word in out for word in (SD, "tiny-fashion-dit", "sada:paper", "reuse:fast", "tolerance"))


def test_generate_writes_images_and_a_record_that_repeats_them(monkeypatch, capfd, tmp_path):
    out = tmp_path / "a"
    options = ("--steps", 8, "--guidance", 3, "--scheduler", "dpm++", "--accel", "sada(tolerance=1e9)")
    words = ("a red sneaker", "a bag")
    code, printed, _ = call(monkeypatch, capfd, "generate", SD, *words, *options, "--out", out)
    assert code == 0 and "evaluations per image" in printed
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "0001.png", "run.json"]
    record = json.loads((out / "run.json").read_text())
    assert record["report"]["skipped"] > 0 and record["scheduler_config"]["class"].startswith("DPMSolver")
    again = tmp_path / "b"
    code, _, _ = call(
        monkeypatch, capfd, "generate", record["model"], *record["conditions"], "--steps", record["steps"],
        "--guidance", record["guidance"], "--scheduler", record["scheduler"], "--accel", record["accel"],
        "--seed", record["seed"], "--out", again,
    )  # fmt: skip
    assert code == 0
    assert all((again / n).read_bytes() == (out / n).read_bytes() for n in ("0000.png", "0001.png"))


def test_generate_with_labels_from_a_folder(monkeypatch, capfd, tmp_path):
    options = ("--steps", 2, "--out", tmp_path / "dit")
    args = ("generate", zoo.path("tiny-fashion-dit"), "red sneaker", "27", *options)
    assert call(monkeypatch, capfd, *args)[0] == 0
    assert len(list((tmp_path / "dit").glob("*.png"))) == 2


def test_bench(monkeypatch, capfd, tmp_path):
    out = tmp_path / "bench"
    options = ("--steps", 10, "--n", 3, "--batch", 2, "--rounds", 2, "--scheduler", "dpm++", "--out", out)
    accel = ("--accel", "sada(tolerance=1e9)", "--accel", "reuse")
    code, _, _ = call(monkeypatch, capfd, "bench", SD, *accel, *options)
    assert code == 0
    names = ["bench.json", "grid.png", "report.html", "table.md"]
    assert sorted(path.name for path in out.iterdir()) == names
    record = json.loads((out / "bench.json").read_text())
    rows = {(row["name"], row["steps"]): row for row in record["rows"]}
    plain, reuse = rows["plain", 10], rows["reuse", 10]
    assert ("plain", 5) in rows, "plain fewer steps is always there"
    assert plain["fidelity"]["rms"] == 0 < reuse["fidelity"]["rms"]
    assert reuse["evaluated"] == 5 and len(reuse["seconds"]) == 2
    assert 0.4 < reuse["flops"] / plain["flops"] < 0.7
    assert "data:image/png;base64" in (out / "report.html").read_text()
    assert (out / "table.md").read_text().startswith("| method |")


@pytest.fixture
def damaged(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo.path(SD), folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", SD, "a bag", "--accel", "sadda"), ["'sadda'", "did you mean 'sada'"]),
        (("generate", SD, "a bag", "--accel", "sada(tolerence=1)"), ["'tolerence'"]),
        (("generate", SD, "a bag", "--accel", "sada(tolerance=-1)"), ["tolerance=-1"]),
        (("generate", SD, "a bag", "--accel", "sada(tolerance"), ["name(option=value"]),
        (("generate", SD, "a bag", "--accel", '{"sada":'), ["JSON"]),
        (("generate", SD, "a bag", "--scheduler", "dpm+++"), ["'dpm+++'", "dpm++"]),
        (("generate", SD, "a bag", "--scheduler", "euler-a", "--accel", "sada"), ["random"]),
        (("generate", "tiny-fashion-ds", "a bag"), ["tiny-fashion-sd"]),
        (("generate", "./missing", "a bag"), ["missing"]),
        (("generate", SD), ["needs a prompt"]),
        (("generate", "tiny-fashion-dit", "a cat"), ["no label 'a cat'"]),
        (("generate", SD, "a bag", "--dtype", "float31"), ["float31"]),
        (("generate", SD, "a bag", "--device", "toaster"), ["toaster"]),
        (("bench", SD, "--accel", "sada", "--accel", "reuse:slow"), ["'slow'"]),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capfd, tmp_path, args, words):
    out = tmp_path / "new" / "out"
    code, _, err = call(monkeypatch, capfd, *args, "--out", out)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not out.exists() and not out.parent.exists()


def test_damaged_model(monkeypatch, capfd, tmp_path, damaged):
    code, _, err = call(monkeypatch, capfd, "generate", damaged, "a bag", "--out", tmp_path / "out")
    assert code == 2 and "diffusion_pytorch_model.safetensors" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "bench", "demo"])
def test_output_that_cannot_be_written(monkeypatch, capfd, tmp_path, command):
    (tmp_path / "file").write_text("")
    args = {"generate": (SD, "a bag"), "bench": (SD,), "demo": ()}[command]
    code, _, err = call(monkeypatch, capfd, command, *args, "--out", tmp_path / "file" / "out")
    assert code == 2 and "cannot write" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args", [("generate", SD, "a bag", "--steps", "0"), ("bench", SD, "--n", "x"), ("foo",)]
)
def test_options_that_typer_checks(args):
    result = CliRunner().invoke(cli.app, list(args))
    assert result.exit_code == 2


def test_interrupt_leaves_nothing(monkeypatch, capfd, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(benching.Bench, "measure", interrupt)
    out = tmp_path / "out"
    options = ("--steps", 3, "--n", 1, "--no-flops", "--out", out)
    code, _, err = call(monkeypatch, capfd, "bench", SD, *options)
    assert code == 130 and "interrupted" in err and not out.exists()


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "diffaccel", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "bench" in done.stdout


def test_read_accel():
    assert read_accel("sada") == ["sada"]
    assert read_accel("sada:fast + reuse") == ["sada:fast", "reuse"]
    assert read_accel("sada(tolerance=0.1, correct=False)") == [
        {"sada": {"tolerance": 0.1, "correct": False}}
    ]
    assert read_accel('{"reuse": {"every": 3}}') == {"reuse": {"every": 3}}


def test_unconditional_pipelines():
    from tiny_pipelines import TINY

    pipe = TINY["ddim"].build()
    assert Sampler(pipe, [], 2, None, 0, count=3)().shape == (3, 3, 16, 16)
    with pytest.raises(OptionError, match="takes no prompt"):
        Sampler(pipe, ["a bag"], 2, None, 0)
    with pytest.raises(OptionError, match="no guidance"):
        Sampler(pipe, [], 2, 3.0, 0)


def test_interleave_alternates():
    seen = []
    tasks = [lambda n=n: n for n in range(3)]
    interleave(tasks, 2, lambda turn, position, result: seen.append((turn, position, result)))
    assert seen == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 2, 2), (1, 1, 1), (1, 0, 0)]


def test_timing_and_fidelity():
    assert Timing((3.0, 1.0, 2.0)).median == 2 and Timing((1.0, 2.0, 3.0)).quartiles == (1.5, 2.5)
    assert Timing((4.0,)).quartiles == (4.0, 4.0)
    reference = torch.full((2, 3, 4, 4), 0.5)
    images = reference.clone()
    images[0] += 0.1
    result = fidelity(images, reference)
    assert result.rms == pytest.approx(0.1 / 2**0.5, rel=1e-5) and result.worst == pytest.approx(
        0.1, rel=1e-5
    )
    assert result.psnr == pytest.approx(23.0103, rel=1e-4) and result.relative == pytest.approx(0.1, rel=1e-5)
    assert fidelity(reference, reference).psnr == float("inf")
    with pytest.raises(ValueError, match="shape"):
        fidelity(images, reference[:1])


def test_flops_of_known_layers():
    linear, x = torch.nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    assert count_flops(lambda: linear(x)) == 2 * 4 * 8 * 16
    q = torch.randn(1, 2, 5, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(q, q, q)) == 2 * (2 * 2 * 5 * 5 * 8)

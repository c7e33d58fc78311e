"""The command line end to end on the zoo, and what it says to mistakes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from commands import call

from diffaccel import zoo
from diffaccel.cli import bench as benching
from diffaccel.cli.reading import SCHEDULERS, read_accel, read_steps, set_scheduler
from diffaccel.cli.writing import OutputError, write_files
from diffaccel.errors import DiffaccelError, OptionError
from diffaccel.eval.provenance import plain
from diffaccel.eval.sampler import Sampler
from diffaccel.pipelines import resolve
from diffaccel.pipelines.accelerator import tag

SD = "tiny-fashion-sd"


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
    assert record["images"] == ["0000.png", "0001.png"] and record["versions"]["torch"] == torch.__version__
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
    options = ("--steps", 6, "--n", 3, "--batch", 2, "--rounds", 2, "--scheduler", "dpm++", "--out", out)
    accel = ("--accel", "sada(tolerance=1e9)", "--accel", "reuse")
    code, _, _ = call(monkeypatch, capfd, "bench", SD, *accel, *options)
    assert code == 0
    names = ["bench.json", "grid.png", "report.html", "table.md"]
    assert sorted(path.name for path in out.iterdir()) == names
    record = json.loads((out / "bench.json").read_text())
    rows = {(row["name"], row["steps"]): row for row in record["rows"]}
    plain, reuse = rows["plain", 6], rows["reuse", 6]
    assert ("plain", 3) in rows, "plain fewer steps is always there"
    assert plain["fidelity"]["rms"] == 0 < reuse["fidelity"]["rms"]
    assert reuse["evaluated"] == 3 and len(reuse["seconds"]) == 2
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
        (("generate", SD, "a bag", "--guidance", "nan"), ["guidance"]),
        (("generate", SD, "a bag", "--scheduler", "flow-euler"), ["flow matching"]),
        (("generate", "tiny-fashion-dit", "bag", "--scheduler", "ddim"), ["flow matching"]),
        (("generate", "tiny-fashion-dit", "90"), ["no label '90'"]),
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
    ("args", "words"),
    [
        (("generate", SD, "a bag", "--steps", "0"), ["--steps"]),
        (("bench", SD, "--n", "x"), ["--n", "integer"]),
        (("bench", SD, "--bogus"), ["--bogus"]),
        (("generate",), ["model"]),
        (("foo",), ["foo"]),
    ],
)
def test_mistakes_that_the_parser_finds_are_one_line(monkeypatch, capfd, args, words):
    code, _, err = call(monkeypatch, capfd, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), (b"\n \n", "empty"), (b"\xff", "UTF-8")]
)
def test_prompts_files_of_no_use(monkeypatch, capfd, tmp_path, content, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    code, _, err = call(monkeypatch, capfd, "bench", SD, "--prompts", file, "--out", tmp_path / "out")
    assert code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_the_pipeline_refuses_is_one_line_of_the_process(tmp_path):
    args = ("generate", SD, "a bag", "--steps", "5000", "--out", str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-m", "diffaccel", *args], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "5000" in done.stderr


def test_interrupt_leaves_nothing(monkeypatch, capfd, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(benching.Bench, "measure", interrupt)
    out = tmp_path / "out"
    options = ("--steps", 3, "--n", 1, "--no-flops", "--out", out)
    code, _, err = call(monkeypatch, capfd, "bench", SD, *options)
    assert code == 130 and "interrupted" in err and not out.exists()


def test_interrupt_while_files_are_written(monkeypatch, tmp_path):
    write_files(tmp_path / "out", {"a": "old", "b": "old"})
    replace = os.replace

    def interrupted(source, target):
        if str(target).endswith("b"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path / "out", {"a": "new", "b": "new"})
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a": "new", "b": "old"}
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path / "new" / "out", {"b": "new"})
    assert not (tmp_path / "new").exists()


def test_files_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_files(tmp_path, {"b": "a folder stands there"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


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
    assert read_accel("sada:fast(tolerance=1e+3)+reuse") == [{"sada:fast": {"tolerance": 1e3}}, "reuse"]
    for text in ("sada(0.1)", "sada(**{})", "sada(tolerance=f(1))", "sada(tolerance=1", "[1"):
        with pytest.raises(OptionError, match="--accel"):
            read_accel(text)


@pytest.mark.parametrize("text", ["sada:paper", "sada(tolerance=0.1)", "reuse:fast", "sada"])
def test_read_accel_reads_the_tags_of_accelerators(text):
    stack = resolve(read_accel(text))
    assert resolve(read_accel(tag(stack[0]))) == stack


def test_plain_data_is_strict_json():
    value = {"a": (1.5, float("inf")), 2: torch.float32, "n": None, "b": True}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "a": [1.5, "inf"], "2": "torch.float32", "n": None, "b": True,
    }  # fmt: skip


def test_unconditional_pipelines():
    from tiny_pipelines import TINY

    pipe = TINY["ddim"].build()
    assert Sampler(pipe, [], 2, None, 0, count=3)().shape == (3, 3, 16, 16)
    with pytest.raises(OptionError, match="takes no prompt"):
        Sampler(pipe, ["a bag"], 2, None, 0)
    with pytest.raises(OptionError, match="no guidance"):
        Sampler(pipe, [], 2, 3.0, 0)


def test_other_kinds_of_pipelines():
    from tiny_pipelines import TINY

    class Video:
        def __call__(self, prompt, num_inference_steps=50, generator=None, output_type="pil"):
            frames = torch.linspace(0, 1, 5).reshape(1, 5, 1, 1, 1)
            return (frames.expand(len(prompt), 5, 4, 6, 3).numpy(),)

    images = Sampler(Video(), ["a bag", "a coat"], 2, None, 0)()
    assert images.shape == (2, 3, 4, 30) and images[0, 0, 0, ::6].tolist() == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(OptionError, match="StableDiffusionImg2ImgPipeline"):
        Sampler(TINY["sd_img2img"].build(), ["a bag"], 2, None, 0)()


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_short_name_is_a_scheduler_that_runs_or_is_refused(name):
    for model, condition in ((SD, "a bag"), ("tiny-fashion-dit", "bag")):
        pipe = zoo.load(model)
        pipe.set_progress_bar_config(disable=True)
        try:
            set_scheduler(pipe, name)
        except OptionError as error:
            assert "flow matching" in str(error)
            continue
        try:
            assert Sampler(pipe, [condition], 5, None, 0)().isfinite().all()
        except OptionError as error:  # DiTPipeline needs a method that this scheduler does not have
            assert name == "flow-euler" and "scale_model_input" in str(error)


def test_stacks_have_steps_of_their_own():
    assert read_steps("s3@5", 50) == ("s3", 5) and read_steps("sada", 50) == ("sada", 50)
    assert read_steps("s3:a@b/c.json", 50) == ("s3:a@b/c.json", 50)
    assert read_steps("s3:a@b.json@6", 50) == ("s3:a@b.json", 6)
    with pytest.raises(OptionError, match="0 steps"):
        read_steps("s3@0", 50)


def test_schedulers_take_options():
    pipe = zoo.load(SD)
    set_scheduler(pipe, "dpm++(timestep_spacing=trailing, solver_order=3)")
    assert pipe.scheduler.config.timestep_spacing == "trailing" and pipe.scheduler.config.solver_order == 3
    with pytest.raises(OptionError, match=r"no option 'spacing'; did you mean 'timestep_spacing'"):
        set_scheduler(pipe, "dpm++(spacing=trailing)")
    with pytest.raises(OptionError, match="--scheduler"):
        set_scheduler(pipe, "dpm++(trailing)")


def test_searched_schedules_ship_and_tell_their_numbers():
    pipe = zoo.load(SD)
    pipe.set_progress_bar_config(disable=True)
    before = pipe.scheduler
    images = Sampler(pipe.to(accel="s3"), ["a photo of a bag"], 5, 2.5, 0)()
    assert images.isfinite().all() and pipe.accel.report.evaluated == 5 and pipe.scheduler is before
    with pytest.raises(DiffaccelError, match="there are some for 2, 3, 4, 5, 6"):
        Sampler(pipe, ["a photo of a bag"], 7, 2.5, 0)()

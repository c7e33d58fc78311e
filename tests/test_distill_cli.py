"""``diffaccel distill``: from pairs to a run, its resume, its report and the student's pipeline folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import output_of
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY
from typer.testing import CliRunner

from diffaccel.cli import app
from diffaccel.cli.distill import METHODS
from diffaccel.distill.method import methods
from diffaccel.distill.pairs import make_pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and 24 pairs of it."""
    folder = tmp_path_factory.mktemp("distill-cli")
    pipe = TINY["dit"].build()
    pipe.save_pretrained(folder / "teacher")
    make_pairs(folder / "pairs", pipe, [0, 1, 2], count=24, steps=2, guidance=2.0, batch=8)
    return folder


def call(*words: Any) -> str:
    """Calls the command; its output."""
    return output_of("distill", *words)


def settings(made: Path, run: Path) -> list[str]:
    """What all runs here have in common."""
    return [f"teacher={made / 'teacher'}", f"pairs={made / 'pairs'}", f"run={run}", "batch=4", "eval_count=4",
            "steps=[1,2]", "eval_images=8", "log_images=4", "ema_images=8", "warmup_images=0"]  # fmt: skip


def test_all_methods_are_commands() -> None:
    """The commands are the registry's methods."""
    assert set(METHODS) == {name for name in methods() if not name.startswith("test-")}


def test_from_settings_to_a_pipeline_folder(made: Path, tmp_path: Path) -> None:
    """Rectified flow: trains, goes on, reports, and leaves as a pipeline that diffusers loads."""
    run, out = tmp_path / "run", tmp_path / "student"
    file = tmp_path / "run.yaml"
    file.write_text("images: 16\noptions: {density: u-shaped, premetric: huber}\n")
    assert "stopped after" in call("rectified-flow", file, *settings(made, run), "--minutes", 0)
    assert f"complete after 16 images: {run}" in call("resume", run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["student/flow"] for row in log if "student/flow" in row]
    assert len(losses) == 4
    measured = [row["validation"] for row in log if "validation" in row]
    assert {name.partition("/")[2] for name in measured[-1]} == {"1", "2"}
    page = (run / "report.html").read_text()
    assert (
        "rectified-flow from" in page and "16 of 16 images" in page and (run / "samples.png").stat().st_size
    )
    assert str(out) in call("export", run, out, "--dtype", "float32")
    pipe: Any = DiffusionPipeline.from_pretrained(out)
    images = pipe([0, 1], num_inference_steps=2, guidance_scale=1.0, output_type="np",
                  generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert images.shape == (2, 32, 32, 3)
    card = (out / "README.md").read_text()
    assert "rectified-flow" in card and "24 pairs" in card and "guidance 2" in card


def test_slimflow_makes_a_smaller_student(made: Path, tmp_path: Path) -> None:
    """Two phases; the student has a layer less, and the flow of the first phase is in the checkpoints."""
    run, out = tmp_path / "run", tmp_path / "student"
    words = ["student=pruned", "student_changes={num_layers: 1}", "images=24", "options.distill_part=0.5"]
    call("slimflow", *settings(made, run), *words, "--minutes", 0)
    assert "complete after 24 images" in call("resume", run)
    newest = max((run / "checkpoints").iterdir())
    assert (newest / "frozen-flow.safetensors").is_file()
    names = set().union(*(json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()))
    assert {"student/flow", "student/distill", "student/two-step"} <= names
    call("export", run, out)
    assert json.loads((out / "transformer" / "config.json").read_text())["num_layers"] == 1


@pytest.mark.parametrize(("words", "message"), [
    (["rectified-flow", "lrr=1"], "no option 'lrr'"), (["resume", "nothing"], "no checkpoint in 'nothing'"),
    (["slimflow", "options.aneal=cos"], "no option 'aneal'"), (["rectified-flow", "no.yaml"], "cannot read"),
    (["rectified-flow", "run=x"], "needs pairs=FOLDER"),
])  # fmt: skip
def test_mistakes_are_told(words: list[str], message: str) -> None:
    """A misspelt setting or a missing run is one line."""
    with pytest.raises(Exception, match=message):
        CliRunner().invoke(app, ["distill", *words], catch_exceptions=False)

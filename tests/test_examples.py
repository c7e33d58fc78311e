"""Every script in examples/ runs as it stands, in an empty folder, and is short."""

import runpy
from pathlib import Path

import pytest

from diffaccel.pipelines import accelerator

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LONGEST = 40


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accelerator, "_REGISTRY", accelerator.registry())  # own_accelerator.py adds one
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    assert {path.name for path in tmp_path.glob("out/*")} <= {"examples"}


def test_there_are_examples_and_they_are_short():
    assert len(EXAMPLES) >= 10
    assert not {file.name for file in EXAMPLES if len(file.read_text().splitlines()) > LONGEST}

"""Fitted schedules whose last steps are moved for a score of the images, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy_mixture import solver, toy_pipe

from diffaccel import cli, zoo
from diffaccel.errors import OptionError
from diffaccel.samplers import load_schedules
from diffaccel.samplers.objective import Objective
from diffaccel.samplers.polishing import Polish
from diffaccel.samplers.space import ScheduleSpace

SETTINGS = {"conditions": [], "images": 24, "near": 16, "depth": 2, "budget": 40, "batch": 5}
BOUNDS = (1.02, 3.0)


@pytest.fixture(scope="module")
def fitted():
    """A schedule of 5 evaluations, fitted on other noise."""
    plain = ScheduleSpace(solver().path, 5).known("dpm++2m")[2]
    return Objective(toy_pipe(), [], None, 0, 16, steps=50).fit(plain)[1]


def contrast(images):
    return -float((images - 0.5).abs().mean())


def test_the_score_falls_and_the_distance_stays_within_its_bound(fitted):
    pipe = toy_pipe()
    own, state = pipe.scheduler, dict(vars(pipe))
    results = [Polish(pipe, fitted, score=contrast, bound=bound, **SETTINGS).run() for bound in BOUNDS]
    assert pipe.scheduler is own and vars(pipe) == state
    falls = []
    for bound, result in zip(BOUNDS, results, strict=True):
        facts = result.facts["polished"]
        assert result.sigmas == fitted.sigmas and result.steps[:3] == fitted.steps[:3] and result != fitted
        assert facts["candidates"] == 40 and facts["bound"] == bound
        assert facts["held_out"]["score"] < facts["held_out_start"]["score"]
        assert facts["held_out"]["distance"] < 1.1 * bound * facts["held_out_start"]["distance"]
        falls.append(facts["held_out_start"]["score"] - facts["held_out"]["score"])
    assert falls[0] < falls[1], "a wider bound allows more"


def test_a_part_of_the_change_keeps_most_of_the_fall(fitted, tmp_path):
    """The search is the same one, which goes on from its file; the numbers lie on the way."""
    settings = {"score": contrast, "bound": 3.0, "file": tmp_path / "a.json", **SETTINGS}
    whole = Polish(toy_pipe(), fitted, **settings).run()
    told = []
    half = Polish(toy_pipe(), fitted, part=0.5, **settings).run(told.append)
    assert told[0] == 40 and half.facts["polished"]["part"] == 0.5
    for old, new, middle in zip(fitted.steps, whole.steps, half.steps, strict=True):
        mean = (np.array(old.corrections) + np.array(new.corrections)) / 2
        np.testing.assert_allclose(middle.corrections, mean, atol=1e-15)
    start, end = (whole.facts["polished"][name] for name in ("held_out_start", "held_out"))
    between = half.facts["polished"]["held_out"]
    assert start["score"] - between["score"] > 0.4 * (start["score"] - end["score"])
    assert between["distance"] - start["distance"] < 0.5 * (end["distance"] - start["distance"])


def test_by_the_distance_it_comes_nearer_than_the_fit():
    """On noise that it has not seen; the fit is greedy, step by step."""
    plain = ScheduleSpace(solver().path, 5).known("dpm++2m")[0]
    start = Objective(toy_pipe(), [], None, 0, 16, steps=50).fit(plain)[1]
    facts = Polish(toy_pipe(), start, **{**SETTINGS, "images": 32, "budget": 100}).run().facts["polished"]
    assert facts["held_out"]["distance"] < facts["held_out_start"]["distance"]
    assert facts["held_out"]["score"] == facts["held_out"]["distance"] and facts["score"] == "distance"
    again = Polish(toy_pipe(), replace(start, facts={"polished": facts}), **{**SETTINGS, "budget": 20}).run()
    assert again.facts["polished"]["before"] == facts


def test_only_the_evaluations_after_a_change_are_made(fitted):
    """None for the last step, one for the last two; and replayed runs are those that they stand for."""
    pipe, rows = toy_pipe(), []
    forward = pipe.unet.forward

    def counted(sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = counted
    polish = Polish(pipe, fitted, score=contrast, **SETTINGS)
    polish._begin(0)
    assert len(polish.fine) == SETTINGS["near"] < SETTINGS["images"]
    whole = polish._measured(fitted)
    for depth in (1, 2, 3):
        polish._record(len(fitted.steps) - depth + 1)
        assert polish._measured(fitted) == whole
        rows.clear()
        assert polish._measured(fitted) == whole and len(rows) == depth - 1


class Killed(Exception):
    pass


def test_it_goes_on_to_the_same_result(fitted, tmp_path):
    def kill(count):
        calls.append(count)
        if len(calls) == 4:
            raise Killed

    whole = Polish(toy_pipe(), fitted, score=contrast, **SETTINGS).run()
    for _ in range(2):
        calls = []
        with pytest.raises(Killed):
            Polish(toy_pipe(), fitted, score=contrast, file=tmp_path / "a.json", **SETTINGS).run(kill)
    assert len(json.loads((tmp_path / "a.json").read_text())["scored"]) == 30
    again = Polish(toy_pipe(), fitted, score=contrast, file=tmp_path / "a.json", **SETTINGS).run()
    assert again == whole and again.facts == whole.facts
    with pytest.raises(OptionError, match="another search: bound"):
        Polish(toy_pipe(), fitted, score=contrast, file=tmp_path / "a.json", bound=3.0, **SETTINGS).run()


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"bound": 0.9}, "bound"), ({"part": 0.0}, "part"), ({"part": 1.5}, "part"),
      ({"images": 0}, "1 image"), ({"near": 0}, "1 image"), ({"depth": 5}, "1 to 4"),
     ({"depth": 0}, "1 to 4"), ({"budget": 9}, "no generation"), ({"batch": 1}, "2 candidates")],
)  # fmt: skip
def test_bad_settings(fitted, changed, words):
    with pytest.raises(OptionError, match=words):
        Polish(toy_pipe(), fitted, score=contrast, **{**SETTINGS, **changed})


def test_plain_schedules_are_refused(fitted):
    plain = ScheduleSpace(solver().path, 5).known("dpm++2m")[2]
    with pytest.raises(OptionError, match="search s3"):
        Polish(toy_pipe(), plain, score=contrast, **SETTINGS)


def test_command(tmp_path, monkeypatch, capsys):
    file = tmp_path / "reference.npy"
    np.save(file, zoo.reference()[0][:64].numpy())
    text = (
        "search polish tiny-fashion-dit --nfe 4 --depth 1 --images 4 --budget 10 --guidance 1 "
        f"--protocol fashion --reference {file} --out {tmp_path / 'out'}"
    )
    monkeypatch.setattr("sys.argv", ["diffaccel", *text.split()])
    cli.main()
    assert "4 evaluations: score" in capsys.readouterr().out
    (schedule,) = load_schedules(tmp_path / "out" / "schedules.json")
    assert schedule.facts["polished"]["candidates"] == 10 and schedule.facts["family"]["path"] == "flow"
    pipe = zoo.load("tiny-fashion-dit").to(accel=f"s3:{tmp_path / 'out' / 'schedules.json'}")
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], num_inference_steps=4, output_type="np").images.shape == (1, 32, 32, 3)

"""Steps fitted to a model: the trajectory, the fit, and that the stored numbers repeat it."""

import math

import pytest
import torch
from tiny_pipelines import TINY

from diffaccel.errors import OptionError
from diffaccel.samplers.family import solver_of
from diffaccel.samplers.fitting import Trajectory
from diffaccel.samplers.grids import grid
from diffaccel.samplers.objective import Objective
from diffaccel.samplers.presets import solver_schedule
from diffaccel.samplers.s3 import Search
from diffaccel.samplers.schedule import Schedule


def test_a_trajectory_is_exact_at_nodes_and_for_cubics():
    positions = [-2.0, -1.2, 0.1, 0.9, 2.0, math.inf]
    cubic = lambda x: torch.tensor([x**3 - x, 2 * x**2])  # noqa: E731
    samples = [cubic(x) for x in positions[:-1]] + [torch.tensor([7.0, 7.0])]
    path = Trajectory(positions, samples)
    for x in (-2.0, -1.7, 0.1, 0.5, 1.99):
        torch.testing.assert_close(path.at(x), cubic(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(path.at(math.inf), samples[-1])


@pytest.fixture(scope="module", params=["sd", "dit"])
def objective(request):
    case = TINY[request.param]
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    conditions = {"sd": ["a bag", "a red coat"], "dit": ["1", "2"]}[request.param]
    if request.param == "dit":
        pipe.labels = {}
    return Objective(pipe, conditions, None, 3, 2, steps=40)


def test_fitting_gets_closer_and_is_repeated_by_its_numbers(objective):
    path = solver_of(objective.pipe.scheduler).path
    before = objective.pipe.scheduler
    schedule = solver_schedule("dpm++2m", grid("trailing", 4, path))
    plain = objective(schedule)
    distance, fitted = objective.fit(schedule)
    assert distance < plain and objective.pipe.scheduler is before
    assert [len(step.corrections) for step in fitted.steps] == [2, 4, 6, 8]
    again = Schedule.from_dict(fitted.to_dict())
    assert again == fitted
    assert objective(again) == pytest.approx(distance, rel=2e-2, abs=1e-5)


def test_a_search_that_fits_is_no_worse_and_goes_on(tmp_path):
    pipe = TINY["sd"].build()
    pipe.set_progress_bar_config(disable=True)

    objectives = {}

    def search(file=None):
        return Search(pipe, 3, ["a bag", "a red coat"], images=2, budget=48, batch=4, fitting=0.4, file=file,
                      objectives=objectives)  # fmt: skip

    whole = search()
    winner = whole.run()
    assert len(whole.polished) > 10
    assert min(d for d, _ in whole.polished) < min(entry.score for entry in whole.candidates.scored)
    stopped, file = search(tmp_path / "state.json"), tmp_path / "state.json"

    class Stop(Exception):
        pass

    def advance(count):
        if len(stopped.polished) > 8:
            raise Stop

    with pytest.raises(Stop):
        stopped.run(advance)
    resumed = search(file)
    assert resumed.run() == winner and len(resumed.polished) == len(whole.polished)
    with pytest.raises(OptionError, match="another search"):
        Search(pipe, 3, ["a bag"], images=2, budget=48, batch=4, fitting=0.4, file=file).run()

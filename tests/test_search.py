"""The search engine, the space of schedules, and the search of a model's schedules with its command."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_pipelines import TINY, fresh, run
from toy_mixture import START, drive, exact, rms, solver, toy_pipe

from diffaccel import cli, zoo
from diffaccel.errors import DiffaccelError, OptionError, UnsupportedPipeline
from diffaccel.optuna_engine import OptunaEngine
from diffaccel.samplers import (
    Schedule,
    ScheduleError,
    UnifiedSolverScheduler,
    load_schedules,
    solver_schedule,
)
from diffaccel.samplers.family import family_of, solver_of
from diffaccel.samplers.objective import Objective
from diffaccel.samplers.s3 import Search
from diffaccel.samplers.searched import fitting
from diffaccel.samplers.space import ScheduleSpace
from diffaccel.search import Evolution, Ranking, Space

PATH = solver().path


# ---------------------------------------------------------------- the space of schedules


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("count", [2, 6])
def test_random_decisions(kind, count):
    """250 children each: legal, finite, the same after JSON; parents stay as they are."""
    prediction = "flow_prediction" if kind == "flow" else "epsilon"
    path = solver(kind, prediction).path
    space, rng = ScheduleSpace(path, count), random.Random(count)
    pool = space.seeds()
    assert all(parent.evaluations == count for parent in pool) and len(pool) >= 25
    for _ in range(250):
        parents = rng.sample(pool, 2)
        before = [json.dumps(parent.to_dict()) for parent in parents]
        child = space.mutate(space.cross(*parents, rng) if rng.random() < 0.5 else parents[0], rng)
        assert [json.dumps(parent.to_dict()) for parent in parents] == before
        assert child.evaluations == count and child.sigmas[0] <= path.largest and child.sigmas[-1] == 0
        assert child.sigmas[-2] >= path.smallest * (1 - 1e-9)
        again = space.from_plain(json.loads(json.dumps(space.to_plain(child))))
        assert again == child and hash(again) == hash(child)
        assert len(space.encode(child)) == len(space.encode(pool[0]))
        assert np.isfinite(space.encode(child)).all()
        result = drive(child, kind, prediction, start=child.sigmas[0] / 8 * START)
        assert np.isfinite(result).all() and np.abs(result).max() < 1e4
        pool[rng.randrange(len(pool))] = child


def test_without_an_analytic_first_step():
    space, rng = ScheduleSpace(PATH, 4, analytic=False), random.Random(0)
    child = space.seeds()[0]
    for _ in range(200):
        child = space.mutate(child, rng)
        assert child.analytic_first == "none" and len(child.steps) == 4
    with pytest.raises(ScheduleError, match="4 evaluations, not 3"):
        ScheduleSpace(PATH, 3).from_plain(child.to_dict())
    with pytest.raises(OptionError, match="at least 2"):
        ScheduleSpace(PATH, 1)


@pytest.mark.slow
def test_search_on_the_mixture():
    """Six evaluations: 300 candidates reach an error of 0.0145, which no known solver does."""
    high, ends = PATH.largest, []
    y = np.random.default_rng(0).normal(0, math.sqrt(high**2 + 0.55), 256)
    end = exact(y, high, 1e-5)
    for seed in range(5):
        evolution = Evolution(ScheduleSpace(PATH, 6), seed)
        while len(evolution.scored) < 300:
            candidates = evolution.ask(8)
            evolution.tell(candidates, [rms(drive(candidate, start=y) - end) for candidate in candidates])
        ends.append(evolution.best[0].score)
        assert min(entry.score for entry in evolution.scored[:27]) > 0.0145
    assert np.median(ends) <= 0.0145


# ---------------------------------------------------------------- the engine


class Numbers(Space):
    """Ten numbers; the score is a sum of squares around a hidden place."""

    place = [0.1 * n - 0.5 for n in range(10)]

    def seeds(self):
        return [[0.9] * 10, [-0.9] * 10, [0.9] * 10]

    def mutate(self, candidate, rng):
        return [x + rng.gauss(0, 0.2) * (rng.random() < 0.3) for x in candidate]

    def cross(self, first, second, rng):
        return [rng.choice(pair) for pair in zip(first, second, strict=True)]

    def choose(self, choices):
        seed = self.seeds()[choices.choice("seed", 3)]
        return [x + choices.number(f"move {n}", -2, 2) for n, x in enumerate(seed)]

    def encode(self, candidate):
        return candidate

    def to_plain(self, candidate):
        return list(candidate)

    def from_plain(self, data):
        return list(data)

    def score(self, candidate):
        return sum((x - y) ** 2 for x, y in zip(candidate, self.place, strict=True))


def evolve(evolution, budget, batch=5, states=None):
    while len(evolution.scored) < budget:
        candidates = evolution.ask(min(batch, budget - len(evolution.scored)))
        evolution.tell(candidates, [evolution.space.score(candidate) for candidate in candidates])
        if states is not None:
            states.append(json.dumps(evolution.state_dict()))
    return evolution


def test_an_interrupted_search_goes_on_to_the_same_result():
    states = []
    whole = evolve(Evolution(Numbers(), 3), 44, states=states)
    assert [entry.candidate for entry in whole.scored[:2]] == Numbers().seeds()[:2], "the third is known"
    for state in (states[0], states[5], states[9]):
        resumed = Evolution(Numbers(), 99)
        resumed.load_state_dict(json.loads(state))
        resumed.ask(5)  # asked, and killed before the scores were told
        resumed.load_state_dict(json.loads(state))
        assert evolve(resumed, 44).state_dict() == whole.state_dict()
    assert evolve(Evolution(Numbers(), 3), 44).state_dict() == whole.state_dict()
    assert evolve(Evolution(Numbers(), 4), 44).state_dict() != whole.state_dict()


def test_nothing_is_asked_for_twice_and_failures_are_the_worst():
    evolution = Evolution(Numbers(), 0)
    first = evolution.ask(8)
    assert len(first) == 2
    evolution.tell(first, [math.nan, 1.0])
    assert evolution.best[0].score == 1.0 and evolution.best[1].score == math.inf
    evolve(evolution, 40)
    assert len({json.dumps(entry.candidate) for entry in evolution.scored}) == len(evolution.scored) == 40
    state = json.loads(json.dumps(evolution.state_dict()))
    Evolution(Numbers(), 0).load_state_dict(state)
    for bad in ({"parents": 1}, {"children": 0}, {"crossing": 2.0}, {"blind": -1.0}):
        with pytest.raises(OptionError):
            Evolution(Numbers(), 0, **bad)


def test_optuna_is_another_engine():
    """Seeds first; nothing twice; a state brings back what was scored and the seeds that were not yet."""
    engine = OptunaEngine(Numbers(), 0)
    assert engine.ask(1) == [Numbers().seeds()[0]] and engine.ask(1) == [Numbers().seeds()[1]]
    engine = evolve(OptunaEngine(Numbers(), 0), 60)
    assert len({json.dumps(entry.candidate) for entry in engine.scored}) == 60
    assert evolve(OptunaEngine(Numbers(), 0), 60).best[0] == engine.best[0]
    assert engine.best[0].score < 0.8 * min(Numbers().score(seed) for seed in Numbers().seeds())
    engine = OptunaEngine(Numbers(), 0)
    engine.tell(engine.ask(1), [1.0])
    state = json.loads(json.dumps(engine.state_dict()))
    resumed = OptunaEngine(Numbers(), 0)
    resumed.load_state_dict(state)
    assert resumed.scored == engine.scored and resumed.ask(1) == [Numbers().seeds()[1]]
    resumed.tell(resumed.ask(2), [math.nan, 2.0])
    assert resumed.best[0].score == 1.0 and resumed.best[-1].score == math.inf


@pytest.mark.parametrize("space", [ScheduleSpace(PATH, 4), ScheduleSpace(PATH, 2)])
def test_decisions_make_legal_schedules_and_all_zero_the_seeds(space):
    rng = random.Random(0)

    class Drawn:
        def choice(self, name, options):
            return rng.randrange(options)

        def number(self, name, low, high):
            return rng.uniform(low, high)

    for _ in range(50):
        assert space.choose(Drawn()).evaluations == space.evaluations
    engine, seeds = OptunaEngine(space, 0), list(dict.fromkeys(space.seeds()))
    assert engine.ask(len(seeds)) == seeds, "to the last digit, so that a report finds them"


def test_ranking_orders_what_it_has_not_seen():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (140, 10))
    y = [Numbers().score(row) for row in x]
    state = torch.random.get_rng_state()
    ranking = Ranking(0)
    assert ranking(x[:3].tolist()) == [0.0] * 3
    ranking.fit(x[:100].tolist(), y[:100])
    assert spearmanr(ranking(x[100:].tolist()), y[100:]).statistic > 0.6
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not used"
    best = [
        evolve(Evolution(Numbers(), seed, **options), 64).best[0].score
        for options in ({}, {"blind": 1.0})
        for seed in range(3)
    ]
    assert np.median(best[:3]) < np.median(best[3:]), "and finds better candidates than without"


# ---------------------------------------------------------------- the search of a model's schedules


class Killed(Exception):
    pass


def test_search_of_a_pipeline(tmp_path):
    pipe = toy_pipe()
    own, settings = pipe.scheduler, {"conditions": [], "images": 2, "budget": 12, "batch": 4}
    told = []
    whole = Search(pipe, 4, file=tmp_path / "a.json", **settings).run(told.append)
    assert pipe.scheduler is own and 5 < sum(told) <= 12 and whole.evaluations == 4
    facts = whole.facts
    assert facts["family"] == family_of(pipe) and facts["candidates"] == sum(told) and facts["distance"] < 0.5
    assert set(facts["held_out_of_known_solvers"]) == {"dpm++2m", "unipc2", "deis2", "theta2"}

    def kill(count):
        calls.append(count)
        if len(calls) == 2:  # the first tells what is known
            raise Killed

    for _ in range(3):
        calls = []
        with pytest.raises(Killed):
            Search(pipe, 4, file=tmp_path / "b.json", **settings).run(kill)
    again = Search(pipe, 4, file=tmp_path / "b.json", **settings).run()
    assert again == whole and again.facts == whole.facts and pipe.scheduler is own
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    with pytest.raises(OptionError, match="another search: seed"):
        Search(pipe, 4, file=tmp_path / "a.json", **settings, seed=1).run()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(OptionError, match="remove it"):
        Search(pipe, 4, file=tmp_path / "a.json", **settings).run()
    for bad in ({"images": 0}, {"budget": 0}, {"batch": 0}):
        with pytest.raises(OptionError):
            Search(pipe, 4, **{**settings, **bad})


def test_search_of_a_pipeline_that_does_not_scale_its_input(monkeypatch):
    """No candidate has an analytic first step, however often it is drawn."""
    monkeypatch.setattr("diffaccel.samplers.space.RATE", 1.0)
    search = Search(fresh("sd3"), 3, conditions=["a bag"], images=1, budget=40, batch=8, fitting=0.0)
    assert search.run().analytic_first == "none" and not search.space.analytic and search.done > 20


def test_a_score_of_ones_own_needs_no_fine_solution_but_of_the_first_images(monkeypatch):
    """All candidates are scored by it; steps are fitted to those images; batches are small."""
    monkeypatch.setattr("diffaccel.samplers.searching.AT_ONCE", 2)
    pipe, sizes = toy_pipe(), []

    def off(images):
        sizes.append(len(images))
        return abs(float(images.mean()) - 0.6)

    settings = {"conditions": [], "images": 5, "budget": 44, "batch": 4, "score": off}
    search = Search(pipe, 4, **settings)
    winner = search.run()
    assert set(sizes) == {5, 10} and search.objective(0).batch == 2 and 40 < search.done <= 44
    assert any(any(step.corrections) for _, schedule in search.polished for step in schedule.steps)
    assert math.isfinite(winner.facts["held_out"]) and search._teacher.trajectory.samples[0].shape[0] == 2
    assert "_solution" not in vars(search.objective(0))


def test_fitted_steps_are_nearer_to_the_fine_solution():
    """Also on other noise; the file has them, and with all corrections 0 it is the plain solver."""
    pipe = toy_pipe()
    objective, other = (Objective(pipe, [], None, seed, 16, steps=50) for seed in (0, 100))
    plain = ScheduleSpace(PATH, 5).known("dpm++2m")[2]
    distance, fitted = objective.fit(plain)
    assert fitted.sigmas == plain.sigmas and objective(fitted) == pytest.approx(distance, rel=1e-3)
    assert distance < 0.6 * objective(plain) and other(fitted) < 0.8 * other(plain)
    assert Schedule.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted
    steps = [replace(step, corrections=(0.0,) * len(step.corrections)) for step in fitted.steps]
    assert objective(replace(fitted, steps=tuple(steps))) == objective(plain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes for the class-conditional model of the zoo."""
    out = tmp_path_factory.mktemp("s3")
    arguments = "search s3 tiny-fashion-dit --nfe 3 --images 2 --budget 6 --guidance 1 --out".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["diffaccel", *arguments, str(out)])
        cli.main()
    return out


def test_command(folder):
    scheduler = UnifiedSolverScheduler.from_pretrained(folder.parent, subfolder=folder.name)
    (schedule,) = load_schedules(folder / "schedules.json")
    assert scheduler.known == [schedule] and schedule.evaluations == 3
    assert schedule.facts["candidates"] <= 6 and schedule.facts["settings"]["model"] == "tiny-fashion-dit"
    scheduler.set_timesteps(3)
    assert scheduler.path.is_flow and len(scheduler.timesteps) == 3


def test_accelerator(folder):

    pipe = zoo.load("tiny-fashion-dit")
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler

    def images(count):
        generator = torch.Generator().manual_seed(0)
        return pipe([1, 2], num_inference_steps=count, generator=generator, output_type="np").images

    plain = images(3)
    pipe.to(accel=f"s3:{folder / 'schedules.json'}")
    fast = images(3)
    assert pipe.scheduler is own and pipe.accel.report.updates == 3 and not np.array_equal(fast, plain)
    with pytest.raises(ScheduleError, match="no schedule for 5 evaluations; there are some for 3"):
        images(5)
    assert pipe.scheduler is own
    hook = pipe.transformer.register_forward_pre_hook(lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        images(3)
    hook.remove()
    assert pipe.scheduler is own and np.array_equal(images(3), fast)
    pipe.to(accel=None)
    pipe.scheduler = UnifiedSolverScheduler.from_pretrained(folder.parent, subfolder=folder.name)
    assert np.array_equal(images(3), fast)


def test_accelerator_refuses(folder, tmp_path):
    pipe = TINY["sd"].build()
    own = pipe.scheduler
    with pytest.raises(DiffaccelError, match=r"path flow; this model's is vp 14\.61"):
        pipe.to(accel=f"s3:{folder / 'schedules.json'}")
    for text in ("", "[]x", "5", '{"version": 7}', '[{"version": 1}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UnsupportedPipeline, match=r"bad\.json"):
            pipe.to(accel=f"s3:{tmp_path / 'bad.json'}")
    with pytest.raises(UnsupportedPipeline, match="cannot read"):
        pipe.to(accel="s3:nowhere.json")
    with pytest.raises(UnsupportedPipeline, match=r"no schedule for this .* search s3"):
        pipe.to(accel="s3")
    assert pipe.scheduler is own and not hasattr(pipe, "accel")
    with pytest.raises(DiffaccelError, match="both of the kind"):
        pipe.to(accel=[f"s3:{tmp_path}", "few-step:8"])


def test_corrections_are_of_one_model(tmp_path):
    """A file of plain decisions is for all models of a path; one of fitted steps for the model only."""
    pipe, model = fresh("sd"), zoo.load("tiny-fashion-sd")
    plain = solver_schedule("dpm++2m", (14.0, 5.0, 1.0, 0.0))
    fitted = replace(plain, steps=(*plain.steps[:2], replace(plain.steps[2], corrections=(0.01, 0.0))))
    for schedule in (plain, fitted):
        facts = {"family": family_of(model)}
        (tmp_path / "one.json").write_text(json.dumps({**schedule.to_dict(), "facts": facts}))
        model.to(accel=f"s3:{tmp_path / 'one.json'}").to(accel=None)
        if schedule is plain:
            pipe.to(accel=f"s3:{tmp_path / 'one.json'}").to(accel=None)
        else:
            with pytest.raises(DiffaccelError, match="fitted to another model"):
                pipe.to(accel=f"s3:{tmp_path / 'one.json'}")


def test_a_call_has_the_schedule_of_the_nearest_guidance(tmp_path):
    """Of one number of evaluations; without a scale the call has its default, 7.5, as has a search."""
    pipe, file = fresh("sd"), tmp_path / "several.json"
    family = family_of(pipe)

    def schedule(middle, guidance, count=2):
        nodes = (14.0, middle, 0.1)[:count]
        return replace(solver_schedule("dpm++2m", (*nodes, 0.0)),
                       facts={"family": family, "guidance": guidance})  # fmt: skip

    known = [schedule(5.0, 2.5), schedule(3.0, 5.0), schedule(2.0, None), schedule(5.0, 2.5, 3)]
    file.write_text(json.dumps([one.to_dict() for one in known]))
    for guidance, place in ((1.0, 0), (3.7, 0), (4.0, 1), (6.0, 1), (7.0, 2), (None, 2)):
        found = fitting(pipe, str(file), guidance)
        assert found == [known[place], known[3]] and found[0].facts == known[place].facts
        pipe.to(accel=f"s3:{file}")
        options = {} if guidance is None else {"guidance_scale": guidance}
        images = pipe("a bag", num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0),
                      **options).images  # fmt: skip
        pipe.to(accel=None)
        own, pipe.scheduler = pipe.scheduler, solver_of(pipe.scheduler, schedules=[known[place].to_dict()])
        assert torch.equal(images, pipe("a bag", num_inference_steps=2, output_type="latent",
                                        generator=torch.manual_seed(0), **options).images)  # fmt: skip
        pipe.scheduler = own
    file.write_text(json.dumps([one.to_dict() for one in (*known, known[1])]))
    with pytest.raises(DiffaccelError, match="several schedules of 2 evaluations for the guidance scale 5"):
        pipe.to(accel=f"s3:{file}")


@pytest.mark.parametrize(("model", "scales"), [("tiny-fashion-sd", (2.5, 5.0)), ("tiny-fashion-dit", (2.5,))])
def test_schedules_that_ship_are_for_their_guidance_and_nearer_than_known_solvers(model, scales):
    pipe = zoo.load(model)
    for scale in scales:
        facts = [s.facts for s in fitting(pipe, guidance=scale) if s.evaluations in (4, 5, 6, 8, 10)]
        assert [f["guidance"] for f in facts] == [scale] * 5
        assert all(f["held_out"] < min(f["held_out_of_known_solvers"].values()) for f in facts)


def test_students_are_not_given_the_schedules_of_their_teacher():
    with pytest.raises(UnsupportedPipeline, match="is a student, trained for 1, 2, 4 steps"):
        zoo.load("tiny-fashion-dit-2rf").to(accel="s3")


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "sana"])
def test_pipelines_that_bring_their_own_levels_follow_the_schedule(name, tmp_path):
    """Flux and others pass sigmas to every scheduler."""
    case, pipe = TINY[name], TINY[name].build()
    (schedule,) = [s for s in ScheduleSpace(solver("flow", "flow_prediction").path, 4).known("theta2")[3:4]]
    path = tmp_path / "one.json"
    path.write_text(json.dumps({**schedule.to_dict(), "facts": {"family": family_of(pipe)}}))
    fast = run(case, pipe.to(accel=f"s3:{path}"), 4)
    pipe.to(accel=None)
    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, schedules=[schedule.to_dict()])
    assert torch.equal(run(case, pipe, 4), fast) and pipe.scheduler.schedule == schedule

"""Plans on pipelines: what they run, what they refuse, and the command that makes them."""

import copy
import inspect
import json
import pickle
from dataclasses import replace

import pytest
import torch
from commands import call
from diffusers import DPMSolverMultistepScheduler
from tiny_pipelines import TINY, fresh, load, run

from diffaccel import Auto, DiffuseHighPipeline, Plan, UnsupportedPipeline, accelerate
from diffaccel.errors import AcceleratorConflict, OptionError
from diffaccel.eval.budget import Judge
from diffaccel.eval.sampler import Sampler
from diffaccel.tuning.candidate import Candidate, Gene
from diffaccel.tuning.measurements import Measurements, _Shapes
from diffaccel.tuning.plan import STORED, PlanError, facts_of

STEPS = 12
STACKS = {
    "dit": [{"reuse": {"every": 2}}],
    "sd": [{"solver": {"solver": "unipc2"}}, {"sada": {"tolerance": 1e9}}],
    "ddim": [],
    "flux_true_cfg": [{"solver": {"grid": "karras"}}],
    "wan": [{"reuse": {"every": 3}}],
}
FAMILIES = list(STACKS)


def plan_for(name, pipe, steps=8, **changes):
    """A plan for a tiny pipeline, as tune would write it."""
    shapes = _Shapes()
    run(TINY[name], accelerate(pipe, [shapes]), 2)
    accelerate(pipe, None)
    known = inspect.signature(pipe.__call__).parameters
    guidance = TINY[name].call.get("guidance_scale")
    if guidance is None and "guidance_scale" in known:
        guidance = known["guidance_scale"].default
    match = {**facts_of(pipe), "steps": STEPS, "guidance": guidance, "shape": shapes.seen[0], **changes}
    return Plan(steps, tuple(STACKS[name]), match, {"budget": "rms<=0.1"}, {}, {})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "plan.json"


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_runs_its_stack_with_its_steps(name, file):
    case, pipe = TINY[name], fresh(name)
    plain = run(case, pipe, STEPS)
    plan_for(name, pipe).save(file)
    expected = run(case, accelerate(fresh(name), STACKS[name]), 8)
    before = {key: vars(part).copy() for key, part in pipe.components.items() if hasattr(part, "__dict__")}
    pipe.to(accel=str(file))
    fast = run(case, pipe, STEPS)
    assert torch.equal(fast, expected) and not torch.equal(fast, plain)
    assert pipe.accel.report.updates == 8 and [a.name for a in pipe.accel.stack].count("auto") == 1
    assert torch.equal(run(case, pipe, STEPS), expected), "again"
    assert torch.equal(run(case, copy.deepcopy(pipe), STEPS), expected)
    assert torch.equal(run(case, pickle.loads(pickle.dumps(pipe)), STEPS), expected)
    with pytest.raises(UnsupportedPipeline, match="num_inference_steps=12"):
        run(case, pipe, STEPS - 1)
    assert torch.equal(run(case, pipe, STEPS), expected), "a refusal leaves nothing"
    pipe.to(accel=None)
    assert torch.equal(run(case, pipe, STEPS), plain)
    after = {key: vars(part) for key, part in pipe.components.items() if hasattr(part, "__dict__")}
    assert {key: set(value) for key, value in after.items()} == {key: set(v) for key, v in before.items()}


def test_plan_is_stored_with_the_model(tmp_path):
    case, pipe = TINY["dit"], fresh("dit")
    with pytest.raises(PlanError, match="made in memory"):
        pipe.to(accel="auto")
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    again.labels = pipe.labels
    with pytest.raises(PlanError, match="tune --store"):
        again.to(accel="auto")
    plan_for("dit", again).save(tmp_path / STORED)
    assert not hasattr(again, "accel")
    expected = run(case, accelerate(pipe, STACKS["dit"]), 8)
    assert torch.equal(run(case, again.to(accel="auto"), STEPS), expected)
    again.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / STORED).exists()


def test_plan_is_read_as_it_was_written(file):
    plan = plan_for("dit", fresh("dit"))
    plan.save(file)
    assert Plan.load(file).to_dict() == plan.to_dict() and plan.label == "reuse@8"
    assert Auto(str(file)) == Auto.create(str(file)) and Auto(str(file)).plan is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {"diffaccel": "0.0.1"}}, "diffaccel=0.0.1"),
        ({"pipeline": "FluxPipeline"}, "FluxPipeline, this is DiTPipeline"),
        ({"scheduler": {"class": "HeunDiscreteScheduler"}}, "HeunDiscreteScheduler"),
        ({"weights": "0"}, "other weights"),
    ],
)
def test_other_models_are_refused_early(changes, words, file):
    pipe = fresh("dit")
    plan_for("dit", pipe, **changes).save(file)
    with pytest.raises(UnsupportedPipeline, match=words):
        pipe.to(accel=str(file))
    assert not hasattr(pipe, "accel"), "left as it was"


def test_trained_weights_and_types_are_refused(file):
    pipe = fresh("dit")
    plan_for("dit", pipe).save(file)
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    with pytest.raises(UnsupportedPipeline, match="types of weights"):
        half.to(accel=str(file))
    next(pipe.transformer.parameters()).data.mul_(1.01)
    with pytest.raises(UnsupportedPipeline, match="other weights"):
        pipe.to(accel=str(file))


def test_other_calls_are_refused(file):
    case, pipe = TINY["sd"], fresh("sd")
    plan_for("sd", pipe).save(file)
    pipe.to(accel=str(file))
    with pytest.raises(UnsupportedPipeline, match=r"guidance_scale=5.0, and the call asks for 7.0"):
        run(case, pipe, STEPS, guidance_scale=7.0)
    with pytest.raises(UnsupportedPipeline, match="without timesteps"):
        run(case, pipe, STEPS, timesteps=[900, 500, 1])
    with pytest.raises(UnsupportedPipeline, match=r"\[4, 16, 16\], these are \[4, 32, 32\]"):
        run(case, pipe, STEPS, height=64, width=64)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedPipeline, match="DPMSolverMultistepScheduler"):
        run(case, pipe, STEPS)
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler


def test_a_plan_stands_alone(file):
    pipe = fresh("dit")
    plan_for("dit", pipe).save(file)
    for more in ("apg", "reuse", str(file)):
        with pytest.raises(AcceleratorConflict, match="'auto' stands alone"):
            pipe.to(torch.bfloat16, accel=[more, str(file)])
    assert pipe.dtype == torch.float32 and not hasattr(pipe, "accel"), "left as it was"
    pipe.to(accel=str(file))
    with pytest.raises(AcceleratorConflict, match="'auto' stands alone"):
        accelerate(pipe, pipe.accel.stack)


@pytest.mark.parametrize("name", ["dit", "ddim"])
def test_diffusehigh_refuses_plans(name, file):
    """A stack that is empty is refused, too."""
    pipe = fresh("dit")
    replace(plan_for("dit", pipe), stack=tuple(STACKS[name])).save(file)
    high = DiffuseHighPipeline(pipe)
    with pytest.raises(UnsupportedPipeline, match="one size and one number of steps"):
        DiffuseHighPipeline(pipe.to(accel=str(file)))
    with pytest.raises(UnsupportedPipeline, match="one size and one number of steps"):
        high(class_labels=[1, 3], target_sizes=64)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda content: "{", PlanError, "cannot read"),
        (lambda content: json.dumps({"kind": "bench"}), PlanError, "no plan of format"),
        (lambda content: json.dumps({**content, "format": 2}), PlanError, "no plan of format 1"),
        (lambda content: json.dumps({k: v for k, v in content.items() if k != "stack"}), PlanError, "stack"),
        (lambda content: json.dumps({**content, "steps": 0}), PlanError, "damaged"),
        (lambda content: json.dumps({**content, "steps": "8"}), PlanError, "damaged"),
        (lambda content: json.dumps({**content, "match": {}}), PlanError, "damaged"),
        (lambda content: json.dumps({**content, "stack": [{"reuse": {"evry": 2}}]}), OptionError, "'evry'"),
    ],
)
def test_damaged_plans(edit, error, words, file):
    pipe = fresh("dit")
    plan = plan_for("dit", pipe)
    file.write_text(edit(plan.to_dict()))
    with pytest.raises(error, match=words):
        pipe.to(accel=str(file))


def test_missing_plan(tmp_path):
    with pytest.raises(PlanError, match="cannot read"):
        fresh("dit").to(accel=str(tmp_path / "none.json"))


TUNE = ("--steps", 6, "--guidance", 2, "--images", 4, "--batch", 2, "--candidates", 7, "--coverage", 0.4,
        "--confidence", 0.9)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model, and what tunes it."""
    folder = tmp_path_factory.mktemp("model")
    fresh("dit").save_pretrained(folder)
    (folder / "labels.txt").write_text("0\n1\n2\n")
    return folder, ("tune", folder, "--prompts", folder / "labels.txt", *TUNE)


def test_tune_writes_a_plan_that_pipelines_take(monkeypatch, capfd, tmp_path, model):
    out, (folder, command) = tmp_path / "tune", model
    options = (*command, "--rounds", 1, "--store", "--out", out)
    monkeypatch.setattr(Measurements, "seconds", lambda self, candidate, count: 1.0 if candidate else 2.0)
    code, printed, err = call(monkeypatch, capfd, *options, "--budget", "psnr>=12")
    assert code == 0, err
    assert "psnr at least 12 in 40 % of images" in printed and "plan: " in printed
    record = json.loads((out / "front.json").read_text())
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG") and len(record["rows"]) == 7
    plan = Plan.load(out / "plan.json")
    assert record["plan"]["label"] == plan.label and plan.promise["violations"] <= 1
    assert plan.match["steps"] == 6 and plan.cost["evaluated"] < plan.cost["evaluated_plain"] == 6
    pipe = load(folder).to(torch.float32, accel="auto")
    pipe([2], guidance_scale=2.0, num_inference_steps=6, generator=torch.Generator().manual_seed(0))
    assert (
        pipe.accel.report.evaluated < 6 and (folder / STORED).read_text() == (out / "plan.json").read_text()
    )
    kept = {path: path.stat().st_mtime_ns for path in (out / "measured").rglob("*.npz")}
    speed = (*command, "--rounds", 5, "--confidence", 0.95, "--out", out, "--budget", "speedup>=1.7")
    code, printed, err = call(monkeypatch, capfd, *speed)
    assert code == 0 and "relative at most" in printed, err
    plan = Plan.load(out / "plan.json")
    assert plan.cost["speedup_least"] == 2 and plan.promise["bound"] <= plan.promise["worst"]
    assert (folder / STORED).read_text() != (out / "plan.json").read_text(), "not stored without being told"
    code, _, err = call(monkeypatch, capfd, *options, "--budget", "psnr>=300")
    assert code == 2 and err.splitlines()[-1].startswith("error: no plan for psnr>=300")
    assert json.loads((out / "front.json").read_text())["plan"] is None
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in (out / "measured").rglob("*.npz")}.items()


def test_measurements_are_the_harness_and_are_kept(tmp_path):
    pipe = fresh("dit")
    sampler = Sampler(pipe, ["0", "1", "2", "0"], 8, 2.0, 5)
    measure = Measurements(pipe, sampler, Judge("rms"), 2, tmp_path)
    candidate = Candidate(8, (Gene("reuse", (("every", 2),)),))
    plain, found = measure.plain(range(1, 4)), measure(candidate, range(1, 4))
    assert plain.evaluated == 8 and found.evaluated == 4 and measure.shape(range(1, 4)) == [4, 16, 16]
    alone = measure.plain(range(1)).flops
    assert plain.flops == pytest.approx(alone) and 0.5 < found.flops / alone < 0.7, (
        "the decoder is not skipped"
    )
    images = sampler(8, 3, 1, 4).clamp(0, 1)
    fast = Sampler(accelerate(pipe, candidate.spec), sampler.conditions, 8, 2.0, 5)(8, 3, 1, 4).clamp(0, 1)
    accelerate(pipe, None)
    assert found.values["rms"] == pytest.approx(Judge("rms")(fast, images)["rms"], rel=1e-4)
    assert (found + measure(candidate, range(1))).count == 4
    kept = Measurements(pipe, None, None, 2, tmp_path)
    again = kept(candidate, range(1, 4))
    assert (again.values["rms"] == found.values["rms"]).all() and again.flops == found.flops
    broken = measure(Candidate(8, (Gene("few-step", (("recipe", "8"),)), Gene("s3", ()))), range(1))
    assert "AcceleratorConflict" in broken.failure and not broken.values


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "psnr<=30"), "psnr>=30"),
        (("--budget", "rms<=0.1", "--images", 3), "at least"),
        (("--budget", "speedup>=2", "--rounds", 2), "at least"),
        (("--budget", "rms<=0.1", "--coverage", 1), "coverage"),
        (("--budget", "rms<=0.1", "--images", 64, "--prompts", "none.txt"), "none.txt"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capfd, tmp_path, options, words, model):
    more = () if "--coverage" in options else ("--coverage", 0.95)
    code, _, err = call(monkeypatch, capfd, *model[1], *more, *options, "--out", tmp_path / "out")
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()

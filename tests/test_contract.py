"""What every accelerator must keep, for all that are registered: docs/architecture.md, section 1."""

import copy
import functools
import inspect
import json
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from contract_cases import (
    SETTINGS,
    STEPS,
    assert_skipping,
    code,
    fast_of,
    plain_of,
    skips_steps,
    spec,
    traces,
)
from tiny_pipelines import TINY, fresh, load, run

from diffaccel.pipelines import registry


@pytest.fixture(params=SETTINGS)
def setting(request):
    accel, family = request.param.split("-")
    return TINY[family], fresh(family), accel


def test_accelerates_and_undo_leaves_nothing(setting):
    case, pipe, accel = setting
    other, plain, fast = fresh(case.name), run(case, pipe, STEPS), fast_of(case.name, accel)
    before, parts, config = traces(pipe), traces(pipe, own=False), dict(pipe.config)
    classes = code(pipe)
    assert pipe.to(accel=spec(accel)) is pipe
    assert traces(pipe, own=False) == parts, "between calls no component is touched"
    assert torch.equal(run(case, pipe, STEPS), fast) and not torch.equal(fast, plain)
    assert torch.isfinite(fast).all()
    assert traces(pipe, own=False) == parts
    assert torch.equal(run(case, pipe, STEPS), fast), "the same seed, the same images, without a reset"
    run(case, pipe, STEPS + 5)
    assert torch.equal(run(case, pipe, STEPS), fast), "nothing leaks from a run with other steps"
    assert torch.equal(run(case, other, STEPS), plain), "other instances are untouched"
    pipe.to(accel=None)
    assert traces(pipe) == before and dict(pipe.config) == config and code(pipe) == classes
    assert not hasattr(pipe, "accel")
    assert torch.equal(run(case, pipe, STEPS), plain)


def counted(function, calls):
    @functools.wraps(function)
    def count(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return count


def test_report_adds_up(setting):
    case, pipe, accel = setting
    ran = []
    for name in case.denoisers:
        network = getattr(pipe, name)
        network.forward = counted(network.forward, ran)
    pipe.to(accel=spec(accel))
    run(case, pipe, STEPS)
    report = pipe.accel.report
    assert report.requested == STEPS * case.calls_per_step and report.updates == STEPS
    assert report.evaluated + report.skipped == report.requested
    assert report.evaluated == len(ran) == sum(count.evaluated for count in report.counts.values())
    if not skips_steps(accel):
        assert report.skipped == 0
        assert bool(report.actions) == (registry()[accel].exclusive == "blocks")
        return
    skips = [action for action in report.actions if action.what == "skip"]
    assert len(skips) == report.skipped > 0, "both samples of a batch skip"
    assert {action.accelerator for action in skips} == {accel}
    assert {action.branch for action in skips} == set(range(case.calls_per_step))
    assert all(action.samples == tuple(range(report.batch)) for action in skips)
    assert json.loads(json.dumps(report.to_dict()))["skipped"] == report.skipped
    assert f"{accel} skip at steps" in str(pipe.accel)
    assert 0 < report.seconds["denoiser"] < report.seconds["total"]


def test_identity(setting):
    case, pipe, accel = setting
    parts, cls, index = dict(pipe.components), type(pipe), dict(pipe.config)
    signature = inspect.signature(pipe.__call__)
    pipe.to(accel=spec(accel))
    assert isinstance(pipe, cls) and type(pipe) is not cls
    assert (type(pipe).__name__, type(pipe).__module__, type(pipe).__doc__) == (
        cls.__name__, cls.__module__, cls.__doc__,
    )  # fmt: skip
    assert inspect.signature(pipe.__call__) == signature
    assert inspect.signature(type(pipe).__init__) == inspect.signature(cls.__init__)
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert set(pipe.components) == set(parts) and dict(pipe.config) == index
    assert type(fresh(case.name).to(accel=spec(accel))) is type(pipe), "one class for all of a kind"


def test_stock_files_in_and_out(setting, tmp_path):
    case, pipe, accel = setting
    pipe.save_pretrained(tmp_path / "plain")
    pipe.to(accel=spec(accel))
    run(case, pipe, STEPS)
    pipe.save_pretrained(tmp_path / "fast")
    for file in (tmp_path / "plain").rglob("*.json"):
        assert file.read_text() == (tmp_path / "fast" / file.relative_to(tmp_path / "plain")).read_text()
    again = load(tmp_path / "fast")
    assert type(again) is type(pipe).__mro__[1] and not hasattr(again, "accel")
    if case.name == "dit":
        again.labels = pipe.labels
    assert torch.equal(run(case, again, STEPS), plain_of(case.name))
    again.to(accel=spec(accel))
    assert torch.equal(run(case, again, STEPS), fast_of(case.name, accel))


class Stop(BaseException):
    """As KeyboardInterrupt, no Exception."""


def fail_in_solver(case, pipe):
    original, calls = pipe.scheduler.step, []

    @functools.wraps(original)
    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise Stop
        return original(*args, **kwargs)

    pipe.scheduler.step = fail
    try:
        run(case, pipe, STEPS)
    finally:
        assert pipe.scheduler.step is fail, "somebody else's wrapper stays"
        del pipe.scheduler.step


def fail_in_network(case, pipe):
    def fail(*args):
        raise Stop

    hook = getattr(pipe, case.denoisers[-1]).register_forward_pre_hook(fail)
    try:
        run(case, pipe, STEPS)
    finally:
        hook.remove()


def fail_in_callback(case, pipe):
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        raise Stop

    def fail(pipeline, step, timestep, tensors):
        if step == 8:
            raise Stop
        return tensors

    run(case, pipe, STEPS, callback_on_step_end=fail)


@pytest.mark.parametrize("fail", [fail_in_solver, fail_in_network, fail_in_callback])
def test_exception_in_mid_call_leaves_nothing(setting, fail):
    case, pipe, accel = setting
    run(case, pipe, STEPS)
    before = traces(pipe)
    pipe.to(accel=spec(accel))
    if fail is fail_in_solver and registry()[accel].exclusive == "solver":
        pytest.skip("the pipeline's own solver does not run")
    with pytest.raises(Stop):
        fail(case, pipe)
    assert traces(pipe, own=False).items() <= before.items()
    assert torch.equal(run(case, pipe, STEPS), fast_of(case.name, accel))
    pipe.to(accel=None)
    assert traces(pipe) == before
    assert torch.equal(run(case, pipe, STEPS), plain_of(case.name))


def test_wrong_arguments_give_the_pipelines_own_error(setting):
    _, pipe, accel = setting
    with pytest.raises((TypeError, ValueError)) as plain:
        pipe(nonsense=1)
    pipe.to(accel=spec(accel))
    with pytest.raises((TypeError, ValueError)) as fast:
        pipe(nonsense=1)
    assert type(fast.value) is type(plain.value) and str(fast.value) == str(plain.value)


SOLVERS = {
    "sd": ("DPMSolverMultistepScheduler", {}),
    "dit": ("DPMSolverMultistepScheduler", {}),
    "ddim": ("DDIMParallelScheduler", {}),
    "flux_true_cfg": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.5}),
    "wan": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}


def test_scheduler_replaced_later(setting):
    case, pipe, accel = setting
    name, options = SOLVERS[case.name]
    new = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    first = fresh(case.name)
    first.scheduler = copy.deepcopy(new)
    plain = run(case, first, STEPS)
    fast = run(case, first.to(accel=spec(accel)), STEPS)
    pipe.to(accel=spec(accel))
    run(case, pipe, STEPS)
    pipe.scheduler = new
    assert torch.equal(run(case, pipe, STEPS), fast)
    assert_skipping(pipe)
    assert torch.equal(run(case, pipe.to(accel=None), STEPS), plain)


def test_deepcopy_is_independent_and_accelerated(setting):
    case, pipe, accel = setting
    pipe.to(accel=spec(accel))
    fast = run(case, pipe, STEPS)
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(case, twin, STEPS), fast)
    assert_skipping(twin)
    assert twin.accel is not pipe.accel and twin.accel.report is not pipe.accel.report
    with torch.no_grad():
        for name in case.denoisers:
            for parameter in getattr(twin, name).parameters():
                parameter.zero_()
    assert not torch.equal(run(case, twin, STEPS), fast), "the copy computes with its own weights"
    twin.to(accel=None)
    assert torch.equal(run(case, pipe, STEPS), fast)
    assert_skipping(pipe)


def test_pickle(setting):
    case, pipe, accel = setting
    pipe.to(accel=spec(accel))
    run(case, pipe, STEPS)
    again = pickle.loads(pickle.dumps(pipe))
    assert type(again) is type(pipe) and str(again.accel) == str(pipe.accel)
    assert torch.equal(run(case, again, STEPS), fast_of(case.name, accel))
    assert_skipping(again)
    assert torch.equal(run(case, again.to(accel=None), STEPS), plain_of(case.name))


WORKER = """
import pickle, sys, torch
torch.set_num_threads(1)
results = {}
for name, (pipe, call) in pickle.load(open(sys.argv[1], "rb")).items():
    output = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    results[name] = torch.as_tensor(output), pipe.accel.report.skipped
torch.save(results, sys.argv[2])
"""


def test_pickle_into_a_worker_that_imports_nothing_of_ours(tmp_path):
    work = {}
    for setting in SETTINGS:
        accel, family = setting.split("-")
        pipe = fresh(family).to(accel=spec(accel))
        work[setting] = pipe, {**TINY[family].call, "num_inference_steps": STEPS}
    (tmp_path / "work.pkl").write_bytes(pickle.dumps(work))
    command = [sys.executable, "-W", "ignore", "-c", WORKER, tmp_path / "work.pkl", tmp_path / "out.pt"]
    done = subprocess.run(command, check=True, timeout=200, capture_output=True, text=True)
    assert done.stdout == "", "importing diffaccel prints nothing"
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(results) == SETTINGS
    for setting, (output, skipped) in results.items():
        accel, family = setting.split("-")
        assert (skipped > 0) == skips_steps(accel), setting
        torch.testing.assert_close(output, fast_of(family, accel), atol=1e-5, rtol=1e-5)

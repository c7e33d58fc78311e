"""What every accelerator must keep working, for all that are registered: docs/architecture.md, section 1."""

import copy
import functools
import gc
import inspect
import itertools
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import TINY, fresh, load, run
from torch import nn

from diffaccel import Accelerator, UnsupportedPipeline, accelerate
from diffaccel.pipelines import registry
from diffaccel.pipelines.gates import Gate
from diffaccel.samplers.family import solver_of
from diffaccel.samplers.grids import grid
from diffaccel.samplers.presets import solver_schedule

STEPS = 12
FAMILIES = ("sd", "dit", "ddim", "flux_true_cfg", "wan")
EAGER: dict = {"sada": {"tolerance": 1e9}, "reuse": {}}  # options with which each is sure to skip
ONE_LENGTH = ("auto", "autodiffusion", "disa", "few-step")  # for some numbers of steps, or pipelines, only
ACCELERATORS = [name for name in registry() if name not in ONE_LENGTH]
REFUSED = {("apg", "ddim")}  # a pipeline without guidance
SETTINGS = [f"{a}-{f}" for a in ACCELERATORS for f in FAMILIES if (a, f) not in REFUSED]


@functools.cache
def schedules():
    """A file of schedules for all families, of the numbers of evaluations in these tests."""
    found = {}
    for case in TINY.values():
        path = solver_of(case.build().scheduler).path
        for count in (4, 6, 8, STEPS, STEPS + 5):
            schedule = solver_schedule("unipc2", grid("trailing", count, path))
            facts = {"family": {"path": path.name}}
            found[path.name, count] = {**schedule.to_dict(), "facts": facts}
    file = Path(tempfile.mkdtemp()) / "schedules.json"
    file.write_text(json.dumps(list(found.values())))
    return str(file)


def spec(name):
    return {name: {"file": schedules()} if name == "s3" else EAGER.get(name, {})}


@functools.cache
def plain_of(name):
    """The output without an accelerator."""
    return run(TINY[name], fresh(name), STEPS)


@functools.cache
def fast_of(name, accel):
    """The output with an accelerator."""
    return run(TINY[name], fresh(name).to(accel=spec(accel)), STEPS)


def sibling_of(pipe):
    """A plain pipeline that shares all networks with another.

    Tokenizers are its own: threads that share one get each other's padding, without any code of ours.
    """
    base = getattr(type(pipe), "_diffaccel_base", type(pipe))
    own = [name for name in pipe.components if name == "scheduler" or name.startswith("tokenizer")]
    parts = {**pipe.components, **{name: copy.deepcopy(getattr(pipe, name)) for name in own}}
    config = {name: value for name, value in pipe.config.items() if name not in parts and name[0] != "_"}
    options = {name: value for name, value in config.items() if name in inspect.signature(base).parameters}
    sibling = base(**parts, **options)
    if hasattr(pipe, "labels"):
        sibling.labels = pipe.labels
    sibling.set_progress_bar_config(disable=True)
    return sibling


def traces(pipe, own=True):
    """Everything that an accelerator could leave behind on a pipeline, its components and their parts."""
    objects = {"pipe": pipe} if own else {}
    for name, part in pipe.components.items():
        modules = part.named_modules() if isinstance(part, nn.Module) else [("", part)]
        objects |= {f"{name}.{inner}": item for inner, item in modules if hasattr(item, "__dict__")}
    return {
        name: (type(item), {key: value if callable(value) else None for key, value in vars(item).items()})
        for name, item in objects.items()
    }


def code(pipe):
    """All attributes of all classes of a pipeline and its components."""
    classes = {cls for part in (pipe, *pipe.components.values()) for cls in type(part).__mro__}
    return {cls: {key: id(value) for key, value in vars(cls).items()} for cls in classes}


def skips_steps(name):
    """Whether an accelerator skips evaluations; one of the kind "solver" does all of them, elsewhere, and one
    of the kind "blocks" does all of them in part."""
    return registry()[name].exclusive not in ("guidance", "solver", "blocks")


def assert_skipping(pipe):
    assert pipe.accel.report.evaluated > 0
    if skips_steps(pipe.accel.stack[0].name):
        assert pipe.accel.report.skipped > 0


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


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize(
    ("family", "image", "text"),
    [
        ("sd", diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionPipeline),
        ("flux_true_cfg", diffusers.FluxImg2ImgPipeline, diffusers.FluxPipeline),
    ],
)
def test_from_pipe_sibling_stays_plain(name, family, image, text):
    case, pipe = TINY[family], fresh(family).to(accel=spec(name))
    same = text.from_pipe(pipe, dtype=torch.float32)
    automatic = diffusers.AutoPipelineForText2Image.from_pipe(pipe, dtype=torch.float32)
    for sibling in (same, automatic):
        sibling.set_progress_bar_config(disable=True)
        assert type(sibling) is text and not hasattr(sibling, "accel")
        assert torch.equal(run(case, sibling, STEPS), plain_of(family))
    assert type(diffusers.AutoPipelineForImage2Image.from_pipe(pipe, dtype=torch.float32)) is image
    assert torch.equal(run(case, pipe, STEPS), fast_of(family, name))
    assert_skipping(pipe)


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["sd", "flux_true_cfg", "wan"])
def test_model_offload(name, order, family):
    case, pipe = TINY[family], fresh(family)
    steps = [lambda: pipe.enable_model_cpu_offload(device="cpu"), lambda: pipe.to(accel=spec(name))]
    for step in steps if order == "before" else reversed(steps):
        step()
    for _ in range(2):
        assert hasattr(getattr(pipe, case.denoisers[-1]), "_hf_hook")
        assert torch.equal(run(case, pipe, STEPS), fast_of(family, name))
        assert_skipping(pipe)
    pipe.to(accel=None)
    assert torch.equal(run(case, pipe, STEPS), plain_of(family))
    pipe.remove_all_hooks()
    assert not any(isinstance(part[1].get("forward"), Gate) for part in traces(pipe).values())
    assert torch.equal(run(case, pipe, STEPS), plain_of(family))


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["sd", "ddim", "flux_true_cfg", "wan"])
def test_group_offload(name, order, family):
    if (name, family) in REFUSED:
        pytest.skip("refused")
    case, pipe = TINY[family], fresh(family)
    network = getattr(pipe, case.denoisers[-1])
    cpu = torch.device("cpu")
    steps = [lambda: network.enable_group_offload(cpu, cpu, "leaf_level"), lambda: pipe.to(accel=spec(name))]
    for step in steps if order == "before" else reversed(steps):
        step()
    assert torch.equal(run(case, pipe, STEPS), fast_of(family, name))
    assert_skipping(pipe)
    assert torch.equal(run(case, pipe.to(accel=None), STEPS), plain_of(family))


class Graphs:
    """A compiler backend that counts its graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def compiled(pipe, how, **options):
    torch._dynamo.reset()
    graphs = Graphs()
    if how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend=graphs, **options)
    elif how == "in place":
        pipe.transformer.compile(backend=graphs, **options)
    else:
        pipe.transformer.compile_repeated_blocks(backend=graphs, **options)
    return graphs


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize(("how", "number"), [("wrapped", 1), ("in place", 1), ("blocks", 3)])
def test_compiled(name, how, number):
    """``fullgraph`` raises at a break; stock Flux has three graphs in blocks."""
    case, pipe = TINY["flux_true_cfg"], fresh("flux_true_cfg")
    graphs = compiled(pipe, how, fullgraph=True)
    if how != "blocks" and registry()[name].exclusive == "blocks":
        with pytest.raises(UnsupportedPipeline, match="compiled as a whole"):
            pipe.to(accel=spec(name))
        return
    pipe.to(accel=spec(name))
    for _ in range(2):
        result = run(case, pipe, STEPS)
        torch.testing.assert_close(result, fast_of(case.name, name), atol=1e-5, rtol=1e-4)
        assert_skipping(pipe)
    pipe.to(accel=None)
    torch.testing.assert_close(run(case, pipe, STEPS), plain_of(case.name), atol=1e-5, rtol=1e-4)
    assert graphs.count == number


def test_samples_that_decide_alone_do_not_recompile():
    case, pipe = TINY["flux"], fresh("flux")

    def mixed(tolerance):
        run(case, pipe.to(accel={"sada": {"tolerance": tolerance}}), 20)
        return any(len(action.samples) == 1 for action in pipe.accel.report.actions)

    tolerance = next(filter(mixed, (0.003 * 1.3**n for n in range(20))))
    assert pipe.accel.report.skipped > 0 and mixed(tolerance)
    graphs = compiled(pipe, "in place", fullgraph=True)
    run(case, pipe, 20)
    assert graphs.count == 1
    assert all(len(action.samples) == 2 for action in pipe.accel.report.actions)


@pytest.fixture
def frequent_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize(("family", "calls"), [("sd", 4), ("dit", 16), ("flux_true_cfg", 4)])
def test_threads_that_share_a_network(name, family, calls, frequent_switches):
    case, first = TINY[family], fresh(family)
    jobs = []
    for accel, seed in ((name, 0), (name, 1), (None, 2)):
        pipe = sibling_of(first).to(accel=accel and spec(accel))
        jobs.append((pipe, seed, run(case, pipe, 6, seed=seed)))
    wrong, barrier = [], threading.Barrier(len(jobs))

    def work(pipe, seed, expected):
        barrier.wait()
        for number in range(calls):
            try:
                same = torch.equal(run(case, pipe, 6, seed=seed), expected)
            except Exception as error:
                same = wrong.append(error)
            if not same:
                wrong.append((seed, number))

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(isinstance(v, Gate) for _, items in traces(first).values() for v in items.values())


@pytest.mark.parametrize("name", ACCELERATORS)
def test_lora(name, tmp_path):
    case, pipe = TINY["sd"], fresh("sd").to(accel=spec(name))
    fast, plain = fast_of("sd", name), plain_of("sd")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "style")
    tuned = run(case, pipe, STEPS)
    assert not torch.equal(tuned, fast)
    assert_skipping(pipe)
    pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.unet, adapter_name="style"))
    pipe.unet.delete_adapters("style")
    torch.testing.assert_close(run(case, pipe, STEPS), fast)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, adapter_name="loaded", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(run(case, pipe, STEPS), tuned)
    pipe.set_adapters(["loaded"], [0.5])
    assert not torch.equal(run(case, pipe, STEPS), tuned)
    assert_skipping(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(run(case, pipe, STEPS), fast)
    assert torch.equal(run(case, pipe.to(accel=None), STEPS), plain)


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize("family", ["sd", "flux_true_cfg", "wan"])
@pytest.mark.parametrize("inner", ["accelerated", "plain"])
def test_callbacks_and_nested_calls(name, family, inner):
    """Another pipeline that shares the networks is called in mid-call; both results are unchanged."""
    case, pipe = TINY[family], fresh(family)
    other, seen, results = sibling_of(pipe), [], []
    if inner == "accelerated":
        other.to(accel=spec(name))
    pipe.to(accel=spec(name))
    requested = STEPS * case.calls_per_step

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append(step)
        if step in (5, 6):
            results.append(run(case, other, STEPS))
        return tensors

    assert torch.equal(run(case, pipe, STEPS, callback_on_step_end=callback), fast_of(family, name))
    assert seen == list(range(STEPS))
    expected = fast_of(family, name) if inner == "accelerated" else plain_of(family)
    assert all(torch.equal(result, expected) for result in results) and len(results) == 2
    assert pipe.accel.report.requested == requested, "calls in a callback are not counted"


def cut_off(pipeline, step, timestep, tensors):
    """Ends guidance after step 6, as `SDCFGCutoffCallback` does for one image."""
    if step == 6:
        pipeline._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
    return tensors


@pytest.mark.parametrize("callback", [SDCFGCutoffCallback(None, cutoff_step_index=6), cut_off])
@pytest.mark.parametrize("name", ACCELERATORS)
def test_guidance_cut_off_in_mid_call(name, callback, request):
    """The network's batch shrinks; a callback object of diffusers keeps its type."""
    case, pipe = TINY["sd"], fresh("sd")
    prompt = case.call["prompt"][: 2 if callback is cut_off else 1]
    names = ["latents", "prompt_embeds"]
    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names, "prompt": prompt}
    plain = run(case, pipe, STEPS, **call)
    fast = run(case, pipe.to(accel=spec(name)), STEPS, **call)
    assert fast.shape == plain.shape and torch.isfinite(fast).all()
    assert_skipping(pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_survive_while_gated(family):
    case, pipe, seen = TINY[family], fresh(family), []
    attributes = [("scheduler", "step"), ("scheduler", "set_timesteps"), (case.denoisers[-1], "forward")]
    attributes += [("vae", "decode")] if "vae" in pipe.components else []

    def signatures():
        return [inspect.signature(getattr(getattr(pipe, part), name)) for part, name in attributes]

    class Look(Accelerator):
        def start(self, run):
            assert all(isinstance(getattr(getattr(pipe, part), name), Gate) for part, name in attributes)
            seen.append(signatures())
            twin = copy.deepcopy(run.scheduler)
            assert not isinstance(twin.step, Gate) and not isinstance(twin.set_timesteps, Gate)
            assert inspect.signature(twin.step) == seen[0][0]
            before = copy.copy(run.scheduler.timesteps)
            twin.set_timesteps(3, **({"mu": 0.5} if "flux" in family else {}))
            assert len(twin.timesteps) == 3 and torch.equal(run.scheduler.timesteps, before)

    expected = signatures()
    run(case, accelerate(pipe, Look()), 5)
    assert seen == [expected] and signatures() == expected


@pytest.mark.parametrize("family", ["sd", "ddim"])
def test_options_of_the_solver_arrive(family):
    """Pipelines look at the signature of ``step``, and drop silently what it seems not to take."""
    case, pipe = TINY[family], fresh(family)
    plain = [run(case, pipe, STEPS, eta=eta) for eta in (0.0, 1.0)]
    pipe.to(accel={"reuse": {"every": 1}})
    fast = [run(case, pipe, STEPS, eta=eta) for eta in (0.0, 1.0)]
    assert all(torch.equal(*pair) for pair in zip(fast, plain, strict=True))
    assert not torch.equal(*plain)


def test_no_state_outlives_a_call():
    refs = []

    class Hoard(Accelerator):
        def start(self, run):
            refs.extend((weakref.ref(run), weakref.ref(self)))

        def evaluate(self, call, proceed):
            self.output = proceed(call)
            refs.append(weakref.ref(self.output[0]))
            return self.output

    for family in ("sd", "flux_true_cfg"):
        pipe = accelerate(fresh(family), Hoard())
        run(TINY[family], pipe, 3)
        gc.collect()
        assert len(refs) > 2 and not any(ref() for ref in refs)
        refs.clear()


@pytest.mark.parametrize(("first", "second"), itertools.permutations(ACCELERATORS, 2))
def test_one_accelerator_after_another(first, second):
    """The last one is in force, as if the first had never been there."""
    case, pipe = TINY["sd"], fresh("sd")
    run(case, pipe.to(accel=spec(first)), STEPS)
    pipe.to(accel=spec(second))
    assert pipe.accel.report is None
    assert torch.equal(run(case, pipe, STEPS), fast_of("sd", second))
    assert type(pipe).__mro__[1] is diffusers.StableDiffusionPipeline

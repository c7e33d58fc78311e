"""What every accelerator must keep working, for all that are registered: see docs/architecture.md."""

import copy
import inspect
import pickle
import subprocess
import sys
import threading

import diffusers
import pytest
import torch
from tiny_pipelines import TINY, load, run

import diffaccel
from diffaccel import Accelerator, accelerate
from diffaccel.pipelines import registry

STEPS = 12
FAMILIES = ("sd", "dit", "ddim", "flux_true_cfg", "wan")
EAGER: dict = {"sada": {"tolerance": 1e9}, "reuse": {}}  # options with which each is sure to skip


def spec(name):
    return {name: EAGER.get(name, {})}


def traces(pipe):
    """Everything that an accelerator could leave behind on a pipeline and its components."""
    parts = {
        name: (type(part), {k: v for k, v in vars(part).items() if callable(v)})
        for name, part in pipe.components.items()
        if hasattr(part, "__dict__")
    }
    return type(pipe), set(vars(pipe)), {k: (t, set(v)) for k, (t, v) in parts.items()}


@pytest.fixture(params=[f"{a}-{f}" for a in registry() for f in FAMILIES])
def setting(request):
    accel, family = request.param.split("-")
    case = TINY[family]
    return case, case.build(), spec(accel)


def test_accelerates_and_undo_leaves_nothing(setting):
    case, pipe, accel = setting
    other = case.build()
    plain = run(case, pipe, STEPS)
    before, config = traces(pipe), dict(pipe.config)
    assert pipe.to(accel=accel) is pipe
    fast = run(case, pipe, STEPS)
    report = pipe.accel.report
    assert report.requested == case.updates(STEPS) * case.calls_per_step
    assert report.evaluated + report.skipped == report.requested
    assert 0 < report.skipped
    assert report.updates == case.updates(STEPS)
    assert torch.isfinite(fast).all() and not torch.equal(fast, plain)
    assert torch.equal(run(case, pipe, STEPS), fast), "the same seed, the same images, without a reset"
    run(case, pipe, STEPS + 5)
    assert torch.equal(run(case, pipe, STEPS), fast), "nothing leaks from a run with other steps"
    assert torch.equal(run(case, other, STEPS), plain), "other instances are untouched"
    pipe.to(accel=None)
    assert traces(pipe) == before and dict(pipe.config) == config
    assert not hasattr(pipe, "accel")
    assert torch.equal(run(case, pipe, STEPS), plain)


def test_identity(setting):
    _, pipe, accel = setting
    parts, cls = dict(pipe.components), type(pipe)
    signature = inspect.signature(pipe.__call__)
    pipe.to(accel=accel)
    assert isinstance(pipe, cls) and type(pipe).__name__ == cls.__name__ and type(pipe) is not cls
    assert inspect.signature(pipe.__call__) == signature
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert "__call__" in vars(cls) and not hasattr(cls, "_diffaccel_base"), "the class is untouched"


def test_save_and_stock_reload(setting, tmp_path):
    case, pipe, accel = setting
    plain = run(case, pipe, STEPS)
    pipe.to(accel=accel)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    again.set_progress_bar_config(disable=True)
    if case.name == "dit":
        again.labels = pipe.labels
    assert type(again) is type(pipe).__mro__[1]
    assert torch.equal(run(case, again, STEPS), plain)


def test_exception_in_mid_call_leaves_nothing(setting):
    case, pipe, accel = setting
    plain = run(case, pipe, STEPS)
    before = traces(pipe)
    pipe.to(accel=accel)
    fast = run(case, pipe, STEPS)
    original, calls = pipe.scheduler.step, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("stop")
        return original(*args, **kwargs)

    pipe.scheduler.step = fail
    fail.__signature__ = inspect.signature(original)
    with pytest.raises(RuntimeError, match="stop"):
        run(case, pipe, STEPS)
    del pipe.scheduler.step
    assert torch.equal(run(case, pipe, STEPS), fast)
    pipe.to(accel=None)
    assert traces(pipe) == before
    assert torch.equal(run(case, pipe, STEPS), plain)


def test_scheduler_replaced_later(setting):
    case, pipe, accel = setting
    pipe.to(accel=accel)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    run(case, pipe, STEPS)
    assert pipe.accel.report.skipped > 0


def test_deepcopy_is_independent_and_accelerated(setting):
    case, pipe, accel = setting
    pipe.to(accel=accel)
    fast = run(case, pipe, STEPS)
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(case, twin, STEPS), fast) and twin.accel.report.skipped > 0
    with torch.no_grad():
        for name in case.denoisers:
            for parameter in getattr(twin, name).parameters():
                parameter.zero_()
    assert not torch.equal(run(case, twin, STEPS), fast), "the copy computes with its own weights"
    assert torch.equal(run(case, pipe, STEPS), fast)


def test_pickle(setting):
    case, pipe, accel = setting
    pipe.to(accel=accel)
    fast = run(case, pipe, STEPS)
    again = pickle.loads(pickle.dumps(pipe))
    assert torch.equal(run(case, again, STEPS), fast) and again.accel.report.skipped > 0


def test_pickle_into_a_worker_that_imports_nothing_of_ours(tmp_path):
    case = TINY["ddim"]
    pipe = case.build().to(accel="reuse")
    fast = run(case, pipe, STEPS)
    (tmp_path / "pipe.pkl").write_bytes(pickle.dumps((pipe, case.call)))
    script = (
        "import pickle, torch\n"
        f"pipe, call = pickle.load(open({str(tmp_path / 'pipe.pkl')!r}, 'rb'))\n"
        f"out = pipe(**call, num_inference_steps={STEPS}, generator=torch.Generator().manual_seed(0))[0]\n"
        f"torch.save((out, pipe.accel.report.skipped), {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)
    out, skipped = torch.load(tmp_path / "out.pt", weights_only=True)
    assert skipped > 0
    torch.testing.assert_close(out, fast)


@pytest.mark.parametrize("name", registry())
def test_from_pipe_sibling_stays_plain(name):
    case = TINY["sd"]
    pipe = case.build()
    plain = run(case, pipe, STEPS)
    pipe.to(accel=spec(name))
    sibling = diffusers.StableDiffusionPipeline.from_pipe(pipe, dtype=torch.float32)
    sibling.set_progress_bar_config(disable=True)
    assert torch.equal(run(case, sibling, STEPS), plain) and not hasattr(sibling, "accel")
    image = diffusers.AutoPipelineForImage2Image.from_pipe(pipe, dtype=torch.float32)
    assert type(image) is diffusers.StableDiffusionImg2ImgPipeline
    run(case, pipe, STEPS)
    assert pipe.accel.report.skipped > 0


@pytest.mark.parametrize("name", registry())
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("family", ["sd", "flux_true_cfg"])
def test_model_offload(name, before, family):
    from accelerate import cpu_offload_with_hook

    case = TINY[family]
    pipe = case.build().to(accel=spec(name))
    fast = run(case, pipe, STEPS)
    pipe.to(accel=None)
    if not before:
        pipe.to(accel=spec(name))
    module = getattr(pipe, case.denoisers[-1])
    pipe._all_hooks = [cpu_offload_with_hook(module, "cpu")[1]]
    if before:
        pipe.to(accel=spec(name))
    for _ in range(2):
        assert torch.equal(run(case, pipe, STEPS), fast) and pipe.accel.report.skipped > 0


class Graphs:
    """A compiler backend that counts its graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def compiled(pipe, how, full):
    torch._dynamo.reset()
    graphs = Graphs()
    if how == "wrap":
        pipe.transformer = torch.compile(pipe.transformer, backend=graphs, fullgraph=full)
    elif how == "in place":
        pipe.transformer.compile(backend=graphs, fullgraph=full)
    else:
        pipe.transformer.compile_repeated_blocks(backend=graphs, fullgraph=full)
    return graphs


@pytest.mark.parametrize("how", ["wrap", "in place", "blocks"])
@pytest.mark.parametrize("full", [False, True])
def test_compiled(how, full):
    case = TINY["flux_true_cfg"]
    pipe = case.build()
    graphs = compiled(pipe, how, full)
    run(case, pipe, STEPS)
    plain = graphs.count
    for name in registry():
        pipe = case.build().to(accel=spec(name))
        fast = run(case, pipe, STEPS)
        graphs = compiled(pipe, how, full)
        for _ in range(2):
            torch.testing.assert_close(run(case, pipe, STEPS), fast, atol=1e-5, rtol=1e-4)
            assert pipe.accel.report.skipped > 0
        assert graphs.count == plain, f"{name}: {graphs.count} graphs instead of {plain}"


@pytest.mark.parametrize("name", registry())
def test_threads_that_share_a_network(name):
    case = TINY["sd"]
    first = case.build()
    parts = {k: v for k, v in first.components.items() if k != "scheduler"}
    twins = [
        type(first)(**parts, scheduler=copy.deepcopy(first.scheduler), requires_safety_checker=False)
        for _ in range(2)
    ]
    for twin in twins:
        twin.set_progress_bar_config(disable=True)
    plain = run(case, first, STEPS)
    twins[0].to(accel=spec(name))
    fast = run(case, twins[0], STEPS)
    wrong = []

    def work(pipe, expected):
        for _ in range(8):
            if not torch.equal(run(case, pipe, STEPS), expected):
                wrong.append(pipe)

    threads = [
        threading.Thread(target=work, args=(pipe, expected))
        for pipe, expected in ((twins[0], fast), (twins[1], plain))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "forward" not in vars(first.unet)


@pytest.mark.parametrize("name", registry())
def test_lora(name):
    from peft import LoraConfig

    case = TINY["sd"]
    pipe = case.build()
    plain = run(case, pipe, STEPS)
    pipe.to(accel=spec(name))
    fast = run(case, pipe, STEPS)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "style")
    tuned = run(case, pipe, STEPS)
    assert not torch.equal(tuned, fast) and pipe.accel.report.skipped > 0
    pipe.unet.delete_adapters("style")
    torch.testing.assert_close(run(case, pipe, STEPS), fast)
    pipe.to(accel=None)
    torch.testing.assert_close(run(case, pipe, STEPS), plain)


@pytest.mark.parametrize("name", registry())
def test_callbacks_and_nested_calls(name):
    case = TINY["sd"]
    pipe, inner = case.build(), case.build()
    inner.unet = pipe.unet
    pipe.to(accel=spec(name))
    inner.to(accel=spec(name))
    fast, seen = run(case, pipe, STEPS), []

    def callback(pipeline, step, timestep, tensors):
        seen.append(step)
        if step == 6:
            assert torch.equal(run(case, inner, STEPS), fast)
        return tensors

    assert torch.equal(run(case, pipe, STEPS, callback_on_step_end=callback), fast)
    assert seen == list(range(STEPS))


def test_signatures_survive_while_gated():
    seen = {}

    class Look(Accelerator):
        def start(self, run):
            scheduler = run.scheduler
            seen["step"] = inspect.signature(scheduler.step)
            seen["copy"] = copy.deepcopy(scheduler).step
            seen["pipe"] = run.pipe

    case = TINY["sd"]
    pipe = case.build()
    expected = inspect.signature(pipe.scheduler.step)
    accelerate(pipe, Look())
    run(case, pipe, 3)
    assert seen["step"] == expected
    assert not isinstance(seen["copy"], diffaccel.pipelines.gates.Gate), "a copy has the plain method"


def test_group_offload_below_the_gates():
    case = TINY["sd"]
    pipe = case.build().to(accel=spec("sada"))
    fast = run(case, pipe, STEPS)
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    assert torch.equal(run(case, pipe, STEPS), fast) and pipe.accel.report.skipped > 0

"""What must go on working under every accelerator: offloading, compilation, threads, LoRA, callbacks."""

import copy
import gc
import inspect
import itertools
import sys
import threading
import weakref

import diffusers
import pytest
import torch
from contract_cases import (
    ACCELERATORS,
    FAMILIES,
    REFUSED,
    STEPS,
    assert_skipping,
    fast_of,
    plain_of,
    sibling_of,
    spec,
    traces,
)
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import TINY, fresh, run

from diffaccel import Accelerator, UnsupportedPipeline, accelerate
from diffaccel.pipelines import registry
from diffaccel.pipelines.gates import Gate


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

"""Every family of pipelines under every accelerator: counts add up, samples run alone or together."""

import diffusers
import pytest
import torch
from tiny_pipelines import PROMPTS, TINY, fresh, normal, run
from torch import Tensor
from torch.utils import _pytree as pytree

from diffaccel import Accelerator, UnsupportedPipeline, accelerate
from diffaccel.pipelines.rows import merge_rows, rows_of

STEPS = 20


@pytest.mark.parametrize("accel", [{"sada": {"tolerance": 1e9}}, "sada", "sada:paper", "reuse"], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_counts(name, accel):
    case = TINY[name]
    pipe = fresh(name).to(accel=accel)
    result = run(case, pipe, STEPS)
    report = pipe.accel.report
    requested = case.updates(STEPS) * case.calls_per_step
    assert torch.isfinite(result).all()
    assert report.updates == case.updates(STEPS)
    assert report.requested == requested
    assert report.evaluated <= requested
    if accel != "sada":  # an untrained network may have nothing that can be skipped within tolerance
        assert report.evaluated < 0.7 * requested
    if accel == "reuse" and name != "wan22":
        assert report.evaluated == (report.updates + 1) // 2 * case.calls_per_step
    main = [action for action in report.actions if action.network != "controlnet"]
    skipped = sum(len(action.samples) for action in main) / report.batch
    assert skipped == pytest.approx(report.skipped)
    steps = [report.skipped_steps(sample) for sample in range(report.batch)]
    assert sum(map(len, steps)) * case.calls_per_step / report.batch == pytest.approx(skipped)
    assert report.seconds["denoiser"] <= report.seconds["total"]


@pytest.mark.parametrize("accel", ["sada:fast", "reuse"])
def test_controlnet_is_skipped_with_the_unet(accel):
    case = TINY["sd_controlnet"]
    pipe = fresh(case.name).to(accel=accel)
    run(case, pipe, STEPS)
    counts = pipe.accel.report.counts
    assert counts["controlnet"].evaluated == counts["unet"].evaluated < STEPS
    assert pipe.accel.report.requested == STEPS, "the ControlNet is not a denoiser"


def test_second_network_starts_with_an_evaluation():
    case = TINY["wan22"]
    pipe = fresh(case.name).to(accel={"sada": {"tolerance": 1e9}})
    run(case, pipe, STEPS)
    report = pipe.accel.report
    switch = report.counts["transformer"].requested // 2
    assert switch not in report.skipped_steps() and switch > 0
    for count in (report.counts["transformer"], report.counts["transformer_2"]):
        assert 0 < count.evaluated < count.requested, "both networks are skipped"
    assert str(report).startswith(f"{report.evaluated:.4g} of 40 evaluations")
    assert report.to_dict()["networks"]["transformer"]["requested"] == 2 * switch


def batched(case, count):
    """The arguments that make the call one of ``count`` samples."""
    call: dict = {}
    if "prompt" in case.call:
        call["prompt"] = [*PROMPTS, "a blue bag", "a sandal", "an ankle boot"][:count]
    if "negative_prompt" in case.call:
        call["negative_prompt"] = ["blur"] * count
    if "class_labels" in case.call:
        call["class_labels"] = list(range(count))
    if "batch_size" in case.call:
        call["batch_size"] = count
    if "prompt_embeds" in case.call:
        call |= {"prompt_embeds": normal(count, 32), "negative_prompt_embeds": normal(count, 32, seed=2)}
    for key in ("image", "mask_image"):
        if key in case.call and case.name != "sd_controlnet":
            call[key] = case.call[key][torch.arange(count) % 2]
    return call


def spoiled(output):
    """An output packed as the network packs it, with no correct number in it."""
    return pytree.tree_map(lambda leaf: torch.full_like(leaf, torch.nan), output)


class Parts(Accelerator):
    """Evaluates a batch in parts, and compares what is put together with the evaluation of all."""

    def start(self, run):
        self.seen.append("start")

    def evaluate(self, call, proceed):
        whole = proceed(call)
        if not call.run.batch:  # not known in the first step
            return whole
        batch, size = call.run.batch, call.rows
        merged = spoiled(whole)
        for samples in ([batch - 1, *range(1, batch - 1)], [0]):
            part = call.select(samples, batch)
            assert part.rows * batch == size * len(samples) and part.share == len(samples) / batch
            merged = merge_rows(merged, proceed(part), rows_of(samples, batch, size), size)
        assert type(merged) is type(whole)
        new, old = (pytree.tree_leaves(output) for output in (merged, whole))
        for one, other in zip(new, old, strict=True):
            assert isinstance(one, Tensor)
            torch.testing.assert_close(one, other, atol=1e-5 * max(1, float(other.abs().max())), rtol=1e-5)
        self.seen.append((call.network, batch))
        return whole


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name", TINY)
def test_samples_can_be_evaluated_in_parts(name, count):
    case, parts = TINY[name], Parts()
    parts.seen = []
    call = batched(case, count)
    plain = run(case, fresh(name), 4, **call)
    pipe = accelerate(fresh(name), parts)
    result = run(case, pipe, 4, **call)
    assert torch.equal(result, plain)
    batch = 2 * count if name == "dit" else count  # DiT's solver gets every sample twice
    assert parts.seen[0] == "start" and set(parts.seen[1:]) == {(n, batch) for n in case.denoisers}
    assert pipe.accel.report.batch == batch


ALONE = ["sd", "sdxl", "sd3", "pixart", "flux", "flux_true_cfg", "qwenimage", "wan", "musicldm",
         "sd_controlnet"]  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_a_sample_is_the_same_alone_and_in_company(name):
    """Every sample decides for itself, so that its neighbors do not matter."""
    case, pipe = TINY[name], fresh(name)
    call, steps = batched(case, 2), {}

    def sample(rows, tolerance=0.05):
        pipe.to(accel={"sada": {"tolerance": tolerance}})
        generators = [torch.Generator().manual_seed(row) for row in rows]
        mine = {k: v[rows] if isinstance(v, Tensor) else [v[row] for row in rows] for k, v in call.items()}
        result = run(case, pipe, STEPS, generator=generators, **mine)
        steps.update({row: pipe.accel.report.skipped_steps(n) for n, row in enumerate(rows)})
        return result

    both, together = sample([0, 1]), dict(steps)
    assert any(together.values())
    for row in (0, 1):
        alone = sample([row])
        assert steps[row] == together[row]
        torch.testing.assert_close(alone[0], both[row], atol=2e-3 * float(both.abs().max()), rtol=0)


NOISY: dict = {
    "EulerAncestralDiscreteScheduler": "is ancestral",
    "KDPM2AncestralDiscreteScheduler": "is ancestral",
    "DDPMScheduler": "is ancestral",
    "LCMScheduler": "adds noise",
    "TCDScheduler": "adds noise unless",
    "DPMSolverMultistepScheduler": "algorithm_type is 'sde-dpmsolver",
    "DPMSolverSinglestepScheduler": "algorithm_type is 'sde-dpmsolver",
}


@pytest.mark.parametrize("name", NOISY)
def test_stochastic_solvers(name):
    """SADA says why not; plain reuse serves them."""
    case, pipe = TINY["sd"], fresh("sd")
    options = {"algorithm_type": "sde-dpmsolver++"} if "DPMSolver" in name else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    with pytest.raises(UnsupportedPipeline, match=NOISY[name]) as caught:
        pipe.to(accel="sada")
    assert "StableDiffusionPipeline" in str(caught.value) and "deterministic" in str(caught.value)
    run(case, pipe.to(accel="reuse"), 6)
    assert pipe.accel.report.skipped == pipe.accel.report.updates // 2 > 0


@pytest.mark.parametrize("name", ["sd", "ddim", "sd_controlnet", "sd_img2img"])
def test_eta(name):
    case, pipe = TINY[name], fresh(name)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to(accel="sada")
    with pytest.raises(UnsupportedPipeline, match=r"eta=0\.5"):
        run(case, pipe, 8, eta=0.5)
    assert torch.isfinite(run(case, pipe, 8, eta=0.0)).all()


def test_modular_pipelines():
    from diffusers.modular_pipelines import ComponentSpec, ModularPipeline, ModularPipelineBlocks, OutputParam

    class Denoise(ModularPipelineBlocks):
        model_name = "tiny"

        @property
        def expected_components(self):
            parts = {"unet": diffusers.UNet2DModel, "scheduler": diffusers.DDIMScheduler}
            return [ComponentSpec(name, part) for name, part in parts.items()]

        @property
        def intermediate_outputs(self):
            return [OutputParam("images")]

        @torch.no_grad()
        def __call__(self, components, state):
            components.scheduler.set_timesteps(10)
            x = normal(2, 3, 16, 16)
            for t in components.scheduler.timesteps:
                x = components.scheduler.step(components.unet(x, t).sample, t, x).prev_sample
            state.set("images", x)
            return components, state

    pipe = Denoise().init_pipeline()
    assert isinstance(pipe, ModularPipeline)
    pipe.update_components(unet=fresh("ddim").unet, scheduler=diffusers.DDIMScheduler())
    plain = pipe(output="images")
    before = type(pipe), set(vars(pipe))
    pipe.to(accel="reuse")
    fast = pipe(output="images")
    assert pipe.accel.report.evaluated == 5 and not torch.equal(fast, plain)
    pipe.to(accel=None)
    assert (type(pipe), set(vars(pipe))) == before and torch.equal(pipe(output="images"), plain)


def test_controlnets_that_are_several_are_skipped_with_the_unet():
    case, pipe = TINY["sd_controlnet"], fresh("sd_controlnet")
    pipe.controlnet = diffusers.MultiControlNetModel([pipe.controlnet] * 2)
    image = [case.call["image"]] * 2
    plain = run(case, pipe, STEPS, image=image)
    result = run(case, pipe.to(accel={"sada": {"tolerance": 1e9, "tokens": 1.0}}), STEPS, image=image)
    counts = pipe.accel.report.counts
    assert counts["controlnet"].evaluated == counts["unet"].evaluated < STEPS
    assert counts["controlnet"].saved == 0, "token-wise is for denoisers"
    assert torch.isfinite(result).all() and not torch.equal(result, plain)

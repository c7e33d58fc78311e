"""APG on pipelines against a loop of its own: the pipeline's calls of the network, replayed by hand."""

import copy
import functools
import inspect
import json

import diffusers
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from tiny_pipelines import MAX_LENGTH, PROMPTS, TINY, autoencoder, fresh, normal, run, seeded

from diffaccel import APG, Accelerator, UnsupportedPipeline
from diffaccel.pipelines import apg as module
from diffaccel.pipelines import branches
from diffaccel.samplers.family import solver_of
from diffaccel.samplers.grids import grid
from diffaccel.samplers.presets import solver_schedule

STEPS = 6
OPTIONS = {"eta": 0.1, "rescale": 0.2, "momentum": -0.5}


def samples_of_the_solver(case, pipe, steps=STEPS, **overrides):
    """The sample before and after each update, of every image once."""
    samples, original = [], pipe.scheduler.step

    @functools.wraps(original)
    def step(*args, **kwargs):
        before = inspect.signature(original).bind(*args, **kwargs).arguments["sample"]
        result = original(*args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        size = 2 if case.name == "dit" else len(before)  # it has every image twice
        samples.append((before[:size], after[:size]))
        return result

    pipe.scheduler.step = step
    try:
        run(case, pipe, steps, **overrides)
    finally:
        del pipe.scheduler.step
    return samples


def final_sample(case, pipe, steps=STEPS, **overrides):
    return samples_of_the_solver(case, pipe, steps, **overrides)[-1][1]


class Recording:
    """A plain run of a pipeline: what the network was given at each call, and the solver to begin with."""

    def __init__(self, case, pipe, steps=STEPS, **overrides):
        self.calls, self.pipe, self.scheduler = [], pipe, None
        handles = [
            getattr(pipe, name).register_forward_pre_hook(self.look, with_kwargs=True)
            for name in case.denoisers
        ]
        samples = samples_of_the_solver(case, pipe, steps, **overrides)
        self.first, self.plain = samples[0][0], samples[-1][1]
        for handle in handles:
            handle.remove()

    def look(self, network, args, kwargs):
        if self.scheduler is None:
            self.scheduler = copy.copy(self.pipe.scheduler)
            state = {name: value for name, value in vars(self.scheduler).items() if name != "step"}
            self.scheduler.__dict__ = copy.deepcopy(state)
        self.calls.append((network, args, kwargs))

    def predict(self, number, sample):
        """The network's output in its n-th call, had the sample been this one; extra channels stay."""
        network, args, kwargs = self.calls[number]
        old = args[0] if args else kwargs["hidden_states"]
        new = sample if old.shape == sample.shape else torch.cat([sample, old[:, sample.shape[1] :]], 1)
        call = ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": new})
        return network(*call[0], **call[1])[0]


def levels(scheduler, i, t):
    """alpha and sigma of the network's input, and the prediction type; written without `diffaccel.noise`."""
    config = scheduler.config
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
        sigma = float(scheduler.sigmas[i])
        return 1 - sigma, sigma, "flow"
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[i])
        alpha = (1 + ratio**2) ** -0.5
        return alpha, ratio * alpha, config.prediction_type
    alpha = float(scheduler.alphas_cumprod[int(t)]) ** 0.5
    return alpha, (1 - alpha**2) ** 0.5, config.prediction_type


def to_x0(kind, alpha, sigma, x, output):
    if kind == "epsilon":
        return (x - sigma * output) / alpha
    return alpha * x - sigma * output if kind == "v_prediction" else x - sigma * output


def to_output(kind, alpha, sigma, x, x0):
    if kind == "epsilon":
        return (x - alpha * x0) / sigma
    return (alpha * x - x0) / sigma if kind == "v_prediction" else (x - x0) / sigma


def guide(kind, alpha, sigma, x, cond, uncond, w, before=None, eta=0.1, rescale=0.2, momentum=-0.5):
    """The guided output as the paper writes it, from x0 to x0, and the running difference."""
    x0 = to_x0(kind, alpha, sigma, x, cond)
    running = x0 - to_x0(kind, alpha, sigma, x, uncond) + momentum * (0 if before is None else before)
    dims = tuple(range(1, x0.ndim))
    norm = running.square().sum(dims, keepdim=True).sqrt()
    delta = running * (rescale * x0[0].numel() ** 0.5 / norm).clamp(max=1)
    share = (delta * x0).sum(dims, keepdim=True) / x0.square().sum(dims, keepdim=True)
    update = delta - (1 - eta) * share * x0
    return to_output(kind, alpha, sigma, x, x0 + (w - 1) * update), running


def by_hand(case, recording, w):
    """The final sample of a loop with the paper's guidance."""
    scheduler, x, states = recording.scheduler, recording.first, {}
    begin = getattr(scheduler, "begin_index", None) or 0
    for i, t in enumerate(scheduler.timesteps[begin:]):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        first = i if case.guided == "stacked" else 2 * i
        if case.guided == "stacked":
            one, other = recording.predict(i, torch.cat([scaled, scaled])).chunk(2)
        else:
            one, other = recording.predict(first, scaled), recording.predict(first + 1, scaled)
        cond, uncond = (one, other) if case.cond_first else (other, one)
        cond, uncond, noisy = (part[:, : x.shape[1]].double() for part in (cond, uncond, scaled))
        alpha, sigma, kind = levels(scheduler, begin + i, t)
        network = recording.calls[first][0]
        last, before, running = states.get(network, (None, None, None))
        before = before if sigma == last else running  # Heun's second evaluation at one level
        output, running = guide(kind, alpha, sigma, noisy, cond, uncond, w(i) if callable(w) else w, before)
        states[network] = sigma, before, running
        x = scheduler.step(output.to(x.dtype), t, x, return_dict=False)[0]
    return x


def error(one, other):
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


SCALES = {"dit": 4.0, "flux_true_cfg": 4.0, "qwenimage": 4.0, "musicldm": 2.0}
SCALES["wan22"] = lambda i: 5.0 if i < 3 else 3.0
FAMILIES = ["sd", "sd_v_prediction", "sdxl", "sd3", "flux_true_cfg", "wan", "wan22", "pixart", "dit", "sana",
            "ltx", "qwenimage", "musicldm", "sd_inpaint", "sd_img2img"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_against_a_loop(name):
    case, pipe = TINY[name], fresh(name)
    recording = Recording(case, pipe)
    expected = by_hand(case, recording, SCALES.get(name, 5.0))
    found = final_sample(case, pipe.to(accel={"apg": OPTIONS}))
    assert error(found, expected) < 1e-5 < 1e-2 < error(expected, recording.plain)


SOLVERS = {
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DDIMScheduler": {},
    "HeunDiscreteScheduler": {},
    "UniPCMultistepScheduler": {"use_karras_sigmas": True},
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sd_v_prediction"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_against_a_loop(name, solver):
    case, pipe = TINY[name], fresh(name)
    pipe.scheduler = getattr(diffusers, solver).from_config(pipe.scheduler.config, **SOLVERS[solver])
    recording = Recording(case, pipe)
    expected = by_hand(case, recording, 5.0)
    found = final_sample(case, pipe.to(accel={"apg": OPTIONS}))
    assert error(found, expected) < 1e-5 < 1e-2 < error(expected, recording.plain)


class Spy(Accelerator):
    """Inside of APG: what the networks predict in each step, and what the solver gets in the end."""

    def start(self, run):
        self.seen.clear()
        self.raw = []

    def evaluate(self, call, proceed):
        output = proceed(call)
        if call.network == next(iter(call.run.networks)):
            self.raw.append(torch.stack(output[0]) if isinstance(output[0], (list, tuple)) else output[0])
        return output

    def update(self, call, proceed):
        self.seen.append((call.run.path[call.index], self.raw, call.sample, call.output))
        self.raw = []
        return proceed(call)


def spied(case, pipe, accel, steps=STEPS, **overrides):
    spy = Spy()
    spy.seen = []
    result = run(case, pipe.to(accel=[accel, spy]), steps, **overrides)
    return result, spy.seen


def rescaled(output, raw):
    return rescale_noise_cfg(output, raw[0].chunk(2)[1].double(), 0.7)


def with_skipped_layers(output, raw):
    return output + 2.8 * (raw[0].chunk(2)[1] - raw[1]) if len(raw) > 1 else output


def as_it_is(output, raw):
    return output


SKIP = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.7}


@pytest.mark.parametrize(
    ("name", "post", "overrides"),
    [
        ("sd", rescaled, {"guidance_rescale": 0.7}),
        ("sd3", with_skipped_layers, SKIP),
        ("sd3", with_skipped_layers, {**SKIP, "generator": "equal"}),
        ("sd_controlnet", as_it_is, {}),
        ("sd_inpaint_blend", as_it_is, {}),
        ("sana", as_it_is, {"generator": "equal"}),
    ],
)
def test_what_else_a_pipeline_does_sees_the_true_prediction(name, post, overrides):
    if "generator" in overrides:  # halves that are equal do not mislead
        overrides = {**overrides, "generator": [torch.Generator().manual_seed(0) for _ in range(2)]}
    case, pipe, before = TINY[name], fresh(name), None
    _, seen = spied(case, pipe, {"apg": OPTIONS}, **overrides)
    if post is with_skipped_layers:
        assert [len(raw) for _, raw, _, _ in seen] == [1, 2, 2, 2, 2, 1]
    for level, raw, sample, output in seen:
        uncond, cond = raw[0].double().chunk(2)
        kind = "flow" if level.p == -1 else "epsilon"
        expected, before = guide(kind, level.alpha, level.sigma, sample, cond, uncond, 5.0, before)
        assert error(output, post(expected, raw)) < 1e-5


def z_image(cls=diffusers.ZImagePipeline):
    with seeded(0):
        network = diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
        )  # fmt: skip
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    pipe = cls(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


Z_IMAGE = {
    "prompt_embeds": [normal(5, 16, seed=1), normal(7, 16, seed=2)], "height": 32, "width": 32,
    "negative_prompt_embeds": [normal(4, 16, seed=3)] * 2, "prompt": None, "output_type": "latent",
}  # fmt: skip


@pytest.mark.parametrize("truncation", [1.0, 0.5])
def test_lists_and_negative_predictions(truncation):
    """Z-Image: lists of tensors, the conditional ones first, x0 - eps, c + g (c - u), an end of guidance."""
    case, before = TINY["flux"], None
    call = {**Z_IMAGE, "guidance_scale": 4.0, "cfg_truncation": truncation, "max_sequence_length": MAX_LENGTH}
    _, seen = spied(case, z_image(), {"apg": OPTIONS}, **call)
    assert {len(raw[0]) for _, raw, _, _ in seen} == ({4} if truncation == 1 else {4, 2})
    for level, raw, sample, output in seen:
        expected = -raw[0][:2, :, 0]
        if len(raw[0]) == 4:
            cond, uncond = (-raw[0][:, :, 0].double()).chunk(2)
            expected, before = guide("flow", level.alpha, level.sigma, sample, cond, uncond, 5.0, before)
        assert error(output, expected) < 1e-5


def test_a_subclass_has_the_conventions_of_its_base():
    class Other(diffusers.ZImagePipeline):
        pass

    results = [run(TINY["flux"], z_image(cls).to(accel="apg"), 3, **Z_IMAGE) for cls in Other.__mro__[:2]]
    assert torch.equal(*results)


def test_an_unknown_pipeline_that_negates_is_refused(monkeypatch):
    monkeypatch.delitem(branches._CONVENTIONS, "ZImage")
    with pytest.raises(UnsupportedPipeline, match="ZImagePipeline gives its scheduler the negative"):
        run(TINY["flux"], z_image().to(accel={"apg": {"order": "cond_first"}}), 3, **Z_IMAGE)


GUIDED = [name for name, case in TINY.items() if case.guided in ("stacked", "sequential")]


@pytest.mark.parametrize("name", GUIDED)
def test_plain_guidance_is_bit_identical(name):
    case, pipe = TINY[name], fresh(name)
    plain = run(case, pipe, STEPS)
    assert torch.equal(run(case, pipe.to(accel={"apg": {"eta": 1}}), STEPS), plain)
    assert not torch.equal(run(case, pipe.to(accel="apg"), STEPS), plain)
    report = pipe.accel.report
    assert report.skipped == 0 and report.requested == case.updates(STEPS) * case.calls_per_step


OFF: dict = {
    "sd": {"guidance_scale": 1.0},
    "pixart": {"guidance_scale": 1.0},
    "dit": {"guidance_scale": 1.0},
    "sd3": {"guidance_scale": 1.0},
    "wan": {"guidance_scale": 1.0},
    "flux_true_cfg": {"negative_prompt": None},
    "qwenimage": {"negative_prompt": None},
    "flux": {},
    "hunyuan_video": {},
}


@pytest.mark.parametrize("name", OFF)
def test_calls_without_guidance_pass_through(name):
    """Two samples that start from equal noise are no two branches."""
    case, pipe = TINY[name], fresh(name)
    options = dict(OFF[name])
    if isinstance(case.call.get("prompt"), list):
        options["generator"] = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain = run(case, pipe, STEPS, **options)
    options |= (
        {"generator": [torch.Generator().manual_seed(0) for _ in range(2)]} if "generator" in options else {}
    )
    assert torch.equal(run(case, pipe.to(accel={"apg": OPTIONS}), STEPS, **options), plain)


def test_equal_noise_in_sequential_guidance():
    case, pipe = TINY["flux_true_cfg"], fresh("flux_true_cfg")
    call = {"generator": [torch.Generator().manual_seed(0) for _ in range(2)]}
    both = run(case, pipe.to(accel={"apg": OPTIONS}), STEPS, **call)
    call = {"prompt": PROMPTS[:1], "negative_prompt": ["blur"]}
    torch.testing.assert_close(run(case, pipe, STEPS, **call)[0], both[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "order"), [("sd", "cond_first"), ("pixart", "cond_first"), ("dit", "uncond_first"),
                        ("flux_true_cfg", "uncond_first"), ("wan", "uncond_first")],
)  # fmt: skip
def test_a_wrong_order_is_found_in_the_first_step(name, order):
    right = {"cond_first": "uncond_first", "uncond_first": "cond_first"}[order]
    pipe = fresh(name).to(accel={"apg": {"order": order}})
    with pytest.raises(UnsupportedPipeline, match=f"set order='{right}'"):
        run(TINY[name], pipe, STEPS)
    expected = run(TINY[name], pipe.to(accel="apg"), STEPS)
    assert torch.equal(run(TINY[name], pipe.to(accel={"apg": {"order": right}}), STEPS), expected)


class Calls(diffusers.DiffusionPipeline):
    """Guidance of two calls in either order, in one loop or several."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, loops, guidance_scale=5.0, uncond_first=True, spoil=None):
        for steps in loops:
            x = normal(2, 4, 16, 16)
            self.scheduler.set_timesteps(steps)
            for t in self.scheduler.timesteps:
                branches = [0, 1] if uncond_first else [1, 0]
                found = {n: self.unet(x, t, normal(2, 6, 32, seed=n)).sample for n in branches}
                output = found[0] + guidance_scale * (found[1] - found[0])
                x = self.scheduler.step(output if spoil is None else output[spoil], t, x).prev_sample
        return x


@pytest.fixture
def calls():
    pipe = fresh("sd")
    return Calls(pipe.unet, pipe.scheduler)


def test_two_calls_in_either_order(calls):
    """With the unconditional call first, the combination is replaced where the solver gets it."""
    expected = calls.to(accel={"apg": OPTIONS})([STEPS], uncond_first=False)
    with pytest.raises(UnsupportedPipeline, match="set order='uncond_first'"):
        calls([STEPS])
    found = calls.to(accel={"apg": {**OPTIONS, "order": "uncond_first"}})([STEPS])
    assert error(found, expected) < 1e-5


def test_momentum_begins_anew_with_every_loop(calls):
    calls.to(accel={"apg": OPTIONS})
    expected = calls([STEPS], uncond_first=False)
    assert torch.equal(calls([4, STEPS], uncond_first=False), expected)
    assert torch.equal(calls([STEPS], uncond_first=False), expected)
    weaker = calls.to(accel={"apg": {**OPTIONS, "momentum": 0.0}})([STEPS], uncond_first=False)
    assert error(weaker, expected) > 1e-2


def test_networks_that_share_the_steps_have_a_momentum_each():
    case, pipe = TINY["wan22"], fresh("wan22")
    results = []
    for momentum in (0.0, -0.5):
        _, seen = spied(case, pipe, {"apg": {"momentum": momentum}})
        results.append([output for *_, output in seen])
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][-1], results[1][-1])


def test_the_device_is_not_waited_for_in_the_loop(monkeypatch):
    waits = []
    for name, owner in (("equal", torch), ("take_apart", module)):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, name=name, original=original: waits.append(name) or original(*args)
        )
    for family in ("sd", "flux_true_cfg"):
        run(TINY[family], fresh(family).to(accel={"apg": OPTIONS}), 12)
        assert sorted(set(waits)) == ["equal", "take_apart"] and len(waits) <= 3
        waits.clear()


def test_with_skipped_steps():
    case, pipe = TINY["sd"], fresh("sd")
    alone = run(case, pipe.to(accel={"apg": OPTIONS}), 12)
    idle = run(case, pipe.to(accel=[{"sada": {"tolerance": 0.0}}, {"apg": OPTIONS}]), 12)
    assert torch.equal(idle, alone)
    expected, errors = run(case, pipe.to(accel={"apg": OPTIONS}), 30), []
    for tolerance in (0.002, 1e9):
        pipe.to(accel=[{"sada": {"tolerance": tolerance}}, {"apg": OPTIONS}])
        errors.append(error(run(case, pipe, 30), expected))
    assert pipe.accel.report.skipped > 5 and [a.name for a in pipe.accel.stack] == ["apg", "sada"]
    assert errors[0] < errors[1] < 0.5
    assert torch.isfinite(run(case, pipe.to(accel=["reuse", {"apg": OPTIONS}]), 12)).all()


@pytest.mark.parametrize("name", ["few-step:8", "s3"])
def test_with_other_solvers(name, tmp_path):
    case, pipe, before = TINY["sd"], fresh("sd"), None
    accel = {name: {}}
    if name == "s3":
        path = solver_of(pipe.scheduler).path
        schedule = solver_schedule("unipc2", grid("trailing", 8, path)).to_dict()
        (tmp_path / "s.json").write_text(json.dumps([{**schedule, "facts": {"family": {"path": path.name}}}]))
        accel = {"s3": {"file": str(tmp_path / "s.json")}}
    _, seen = spied(case, pipe, [accel, {"apg": OPTIONS}], steps=8)
    assert len(seen) == 8
    for level, raw, sample, output in seen:
        uncond, cond = raw[0].double().chunk(2)
        expected, before = guide("epsilon", level.alpha, level.sigma, sample, cond, uncond, 5.0, before)
        assert error(output, expected) < 1e-5


def test_a_part_of_the_network_s_output_is_refused(calls):
    calls.to(accel="apg")
    with pytest.raises(UnsupportedPipeline, match="cannot tell the latents"):
        calls([3], uncond_first=False, spoil=(slice(None), slice(None), slice(8)))


@pytest.mark.parametrize("name", ["sd", "flux_true_cfg", "qwenimage"])
def test_half_precision(name):
    case, pipe = TINY[name], fresh(name)
    exact = run(case, pipe.to(accel={"apg": OPTIONS}), STEPS)
    found = run(case, pipe.to(torch.bfloat16), STEPS)
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    assert found.shape == exact.shape


@pytest.mark.parametrize("preset", APG.presets)
def test_presets(preset):
    name = "wan" if preset == "waver" else "sdxl"
    result = run(TINY[name], fresh(name).to(accel=f"apg:{preset}"), 4)
    assert torch.isfinite(result).all()

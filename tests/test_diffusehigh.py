"""DiffuseHigh on tiny pipelines: against image-to-image, loops written independently, and its limits."""

import copy
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tiny_pipelines import TINY, fresh, normal, uniform, vp

from diffaccel import DiffuseHighPipeline, accelerate
from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.noise import path_of
from diffaccel.pipelines.accelerator import Accelerator
from diffaccel.pipelines.late_start import late_start, prepared
from diffaccel.pipelines.latent_images import LatentImages
from diffaccel.pipelines.structure_guidance import Guide, Record, StructureGuidance, sharpened, upsampled
from diffaccel.pipelines.wavelets import low_band, with_low_band

SMALL, LARGE, STEPS, LATE = (32, 32), (64, 64), 5, 3
FAMILIES = ["sd", "sd_v_prediction", "sdxl", "dit", "sd3", "flux", "flux_true_cfg", "pixart", "sana",
            "qwenimage"]  # fmt: skip
NOT_SET = ("guidance_scale", "output_type", "use_resolution_binning")
RULES = {"num_inference_steps": STEPS, "noising_steps": LATE, "dwt_steps": 2, "output_type": "pt"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def call_of(name):
    return {key: value for key, value in TINY[name].call.items() if key not in NOT_SET}


def made(pipe, name, sizes=(64,), **options):
    call = {**call_of(name), **RULES, **options}
    call.setdefault("generator", seeded())
    high = DiffuseHighPipeline.from_pipe(pipe)
    return high(call.pop("prompt", None), target_sizes=list(sizes), **call)


def enlarge(name, pipe, images, **options):
    """Images made of given ones, without sharpening unless it is asked for."""
    return made(pipe, name, **{"image": images, "sharpening_alpha": 0.0, **options})


# ---------------------------------------------------------------- sharpening


def test_sharpening():
    images, sigmas = uniform(2, 3, 12, 12), torch.tensor([0.4, 2.0])
    assert torch.equal(sharpened(images, 0.0, sigmas), images)
    flat = torch.full((2, 3, 8, 8), 0.7)
    assert torch.allclose(sharpened(flat, 1.0, sigmas), flat, atol=1e-6)
    inside = torch.nn.functional.pad(images, (2,) * 4)
    assert torch.allclose(sharpened(inside, 1.5, sigmas).mean((2, 3)), inside.mean((2, 3)), atol=1e-6)
    tap = torch.exp(-1 / (2 * sigmas[0] ** 2))
    line = torch.stack([tap, torch.ones(()), tap]) / (1 + 2 * tap)
    blurred = (line[:, None] * line * images[0, 0, 4:7, 4:7]).sum()
    expected = 2.5 * images[0, 0, 5, 5] - 1.5 * blurred
    assert sharpened(images, 1.5, sigmas)[0, 0, 5, 5].item() == pytest.approx(expected.item(), abs=1e-5)
    assert upsampled(images, (12, 12)) is images


# ---------------------------------------------------------------- images and latents


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sana", "qwenimage"])
def test_latents_are_those_of_the_pipeline(name):
    """Its own packing, scales and shifts, seen from its latents and the images that it makes of them."""
    pipe, case = fresh(name), TINY[name]
    ways = LatentImages(pipe)
    call = {**case.call, "num_inference_steps": 2}
    images = pipe(**{**call, "output_type": "pt"}, generator=seeded())[0]
    assert images.shape[-2:] == ((64, 64) if name == "qwenimage" else SMALL)
    latents = pipe(**{**call, "output_type": "latent"}, generator=seeded())[0]
    assert ways.explains(latents, images)
    assert not ways.explains(latents, 1 - images)
    size = tuple(images.shape[-2:])
    plain = ways.unpack(latents, size)
    assert torch.equal(ways.pack(plain), latents)
    assert (ways.decode(plain) - images).abs().max() < 1e-5
    assert plain.shape[-1] * ways.factor == size[1]


def test_encoding_is_the_inverse_of_decoding_s_units():
    for name in ("sd", "sd3", "sana", "qwenimage"):
        pipe = fresh(name)
        ways, images = LatentImages(pipe), uniform(2, 3, 64, 64)
        given = (2 * images - 1)[:, :, None] if ways.has_frames else 2 * images - 1
        found = pipe.vae.encode(given)
        own = found.latent if hasattr(found, "latent") else found.latent_dist.mode()
        factor, mean = ways._statistics(images)
        recovered = ways.encode(images) * factor + mean
        assert torch.allclose(recovered, own[:, :, 0] if ways.has_frames else own, atol=1e-5)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(("name", "cls"), [("sd", "StableDiffusionImg2ImgPipeline"),
                                           ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
                                           ("sd3", "StableDiffusion3Img2ImgPipeline")])  # fmt: skip
def test_without_structure_it_is_image_to_image(name, cls):
    pipe, images = fresh(name), uniform(2, 3, *SMALL)
    latents = LatentImages(pipe).encode(upsampled(images, LARGE))
    other = getattr(diffusers, cls)(**pipe.components)
    call = {key: value for key, value in call_of(name).items() if key not in ("height", "width")}
    if name == "sdxl":
        call |= {"original_size": SMALL, "target_size": SMALL}
    if name == "sd3":
        call |= {"height": 64, "width": 64}
    expected = other(**call, image=latents, strength=LATE / STEPS, num_inference_steps=STEPS,
                     guidance_scale=10.0, generator=seeded(), output_type="pt").images  # fmt: skip
    found = enlarge(name, pipe, images, dwt_steps=0)
    assert torch.allclose(found.images, expected, atol=2e-5)


def test_without_steps_it_is_the_autoencoder():
    pipe, images = fresh("sd"), uniform(2, 3, *SMALL)
    found = enlarge("sd", pipe, images, sizes=(32, 32), noising_steps=0)
    once = pipe.vae.decode(pipe.vae.encode(2 * images - 1).latent_dist.mode()).sample
    once = (once / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(found.stages[1], once, atol=1e-5)
    assert len(found.stages) == 3
    assert not found.reports


# ---------------------------------------------------------------- against loops written independently


def test_stable_diffusion_step_by_step():
    pipe, images = fresh("sd"), uniform(2, 3, *SMALL)
    large = upsampled(images, LARGE)
    text, empty = (pipe.encode_prompt(prompts, "cpu", 1, False)[0]
                   for prompts in (TINY["sd"].call["prompt"], [""] * 2))  # fmt: skip
    vae, factor = pipe.vae, pipe.vae.config.scaling_factor
    band = low_band(large)
    pipe.scheduler.set_timesteps(STEPS)
    times, path = pipe.scheduler.timesteps[-LATE:], path_of(pipe.scheduler)
    levels = [(level.alpha, level.sigma) for level in path.levels[-LATE - 1 :]]
    z = vae.encode(2 * large - 1).latent_dist.mode() * factor
    x = levels[0][0] * z + levels[0][1] * randn_tensor(z.shape, seeded())
    for index, time in enumerate(times):
        alpha, sigma = levels[index]
        cond, uncond = (pipe.unet(x, time, states).sample for states in (text, empty))
        x0 = (x - sigma * (uncond + 10 * (cond - uncond))) / alpha
        if index < 2:
            decoded = (vae.decode(x0 / factor).sample / 2 + 0.5).clamp(0, 1)
            x0 = vae.encode(2 * with_low_band(decoded, band) - 1).latent_dist.mode() * factor
        ratio = levels[index + 1][1] / levels[index + 1][0] / (sigma / alpha)
        x = levels[index + 1][0] * (ratio * x / alpha + (1 - ratio) * x0)
    expected = (vae.decode(x / factor).sample / 2 + 0.5).clamp(0, 1)
    found = enlarge("sd", pipe, images)
    assert torch.allclose(found.images, expected, atol=2e-4)
    plain = enlarge("sd", pipe, images, dwt_steps=0)
    assert (plain.images - expected).abs().max() > 1e-2  # structure guidance has done something


class AfterStep(Accelerator):
    """The exchange in what a first-order solver returns: x0 is found from two samples, and corrected."""

    def __init__(self, guide):
        self.guide = guide

    def update(self, call, proceed):
        result = proceed(call)
        if call.step >= 2:
            return result
        level, target = call.run.path[call.index], call.run.path[call.index + 1]
        ratio = target.sigma / target.alpha / (level.sigma / level.alpha)
        x0 = (result[0] / target.alpha - ratio * call.sample / level.alpha) / (1 - ratio)
        changed = self.guide.apply(x0, self.guide.band())
        return (result[0] + target.alpha * (1 - ratio) * (changed - x0), *result[1:])


class InNetwork(Accelerator):
    """The exchange in both halves of what the network returns: guidance keeps a common shift."""

    def __init__(self, guide):
        self.guide = guide

    def evaluate(self, call, proceed):
        output = proceed(call)
        if call.step >= 2:
            return output
        level, sample = call.run.path[call.index], call.sample.chunk(2)[0]
        channels = sample.shape[1]
        uncond, cond = output[0][:, :channels].chunk(2)
        x0 = level.x0(uncond + 10 * (cond - uncond), sample)
        shift = (self.guide.apply(x0, self.guide.band()) - x0) / level.x0_per_output
        changed = output[0].clone()
        changed[:, :channels] += shift.repeat(2, 1, 1, 1)
        return (changed, *output[1:])


def placed(name, pipe, kind):
    """A stage with the exchange where it belongs, or in another place."""
    ways, large = LatentImages(pipe), upsampled(uniform(2, 3, *SMALL), LARGE)
    shift = {"mu": 1.0} if pipe.scheduler.config.get("use_dynamic_shifting") else {}
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS, **shift)
    late, latents = late_start(prepared(scheduler), LATE), ways.encode(large)
    level = path_of(late)[0]
    begin = ways.pack(level.alpha * latents + level.sigma * normal(*latents.shape))
    guide, record = Guide(large, ways, 2), Record()
    stack = [StructureGuidance(record, late, begin, guide if kind is None else replace(guide, steps=0))]
    other = accelerate(copy.copy(pipe), [*([] if kind is None else [kind(guide)]), *stack])
    call = {**call_of(name), "num_inference_steps": LATE, "generator": seeded(), "height": 64, "width": 64}
    if "guidance_scale" in TINY[name].call:
        call["guidance_scale"] = 10.0
    if name in ("pixart", "sana"):
        call["use_resolution_binning"] = False
    other(**call, latents=begin, output_type="latent")
    return record.latents


@pytest.mark.parametrize("name", ["sd", "sd_v_prediction", "sdxl", "sd3", "flux"])
def test_placed_after_the_step_of_a_first_order_solver(name):
    pipe = fresh(name)
    expected, found = placed(name, pipe, AfterStep), placed(name, pipe, None)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    if name == "sd":  # not because nothing has happened
        plain = placed(name, pipe, lambda guide: Accelerator())
        assert ((found - plain).norm() / found.norm()).item() > 1e-2


@pytest.mark.parametrize("name", ["sd", "sd_v_prediction", "pixart", "sana"])
def test_placed_in_the_network_for_any_solver(name):
    pipe = fresh(name)
    expected, found = placed(name, pipe, InNetwork), placed(name, pipe, None)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


# ---------------------------------------------------------------- the way up


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_climbs(name):
    pipe, before = fresh(name), fresh(name)
    size = 64 if name == "qwenimage" else 32
    ladder = [(2 * size, 2 * size), (88, 96)] if name in ("sd", "flux") else [(2 * size, 2 * size)]
    result = made(pipe, name, sizes=ladder)
    sizes = [tuple(stage.shape[-2:]) for stage in result.stages]
    assert sizes == [(size, size), *ladder]
    case = TINY[name]
    steps = [STEPS, *[LATE] * len(ladder)]
    assert [report.evaluated for report in result.reports] == [case.calls_per_step * n for n in steps]
    assert result.images is result.stages[-1]
    assert result.images.isfinite().all()
    assert 0.01 < result.images.std() < 0.4
    assert set(vars(pipe)) == set(vars(before))
    assert vars(pipe.scheduler).keys() == vars(before.scheduler).keys()


def test_the_first_stage_is_the_pipeline():
    pipe = fresh("sdxl")
    expected = pipe(**call_of("sdxl"), num_inference_steps=STEPS, guidance_scale=5.0, generator=seeded(),
                    original_size=SMALL, target_size=SMALL, output_type="pt").images  # fmt: skip
    assert torch.equal(made(pipe, "sdxl", noising_steps=0).stages[0], expected)


def test_shifted_schedules_stay_those_of_the_first_size():
    class Levels(Accelerator):
        def update(self, call, proceed):
            seen.append(call.run.path[call.index].sigma)
            return proceed(call)

    seen, pipe = [], fresh("flux")
    pipe.scheduler.register_to_config(base_image_seq_len=64, max_image_seq_len=256, max_shift=3.0)
    accelerate(pipe, [Levels()])
    made(pipe, "flux")
    assert seen[STEPS:] == seen[STEPS - LATE : STEPS]
    del seen[STEPS:]
    first = list(seen)
    seen.clear()
    enlarge("flux", pipe, uniform(2, 3, *SMALL))
    assert seen == first[-LATE:]


def test_randomness_is_the_generator_s():
    pipe = fresh("sd")
    once, again, other = (made(pipe, "sd", generator=seeded(seed)).images for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.allclose(once, other, atol=1e-2)
    both = made(pipe, "sd", generator=[seeded(3), seeded(4)]).images
    call = {**call_of("sd"), "prompt": call_of("sd")["prompt"][1]}
    alone = DiffuseHighPipeline(pipe)(**call, **RULES, target_sizes=64, generator=[seeded(4)]).images
    assert torch.allclose(both[1], alone[0], atol=1e-4)


def test_pictures_and_their_number():
    pipe = fresh("sd")
    pixels = uniform(1, 3, *SMALL).mul(255).byte()
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    one, two = (enlarge("sd", pipe, image).images for image in (picture, [picture, picture]))
    tensor = enlarge("sd", pipe, pixels.float() / 255).images
    assert one.shape == (2, 3, 64, 64)
    assert torch.allclose(one, two, atol=1e-4)
    assert torch.allclose(one, tensor, atol=1e-5)
    resized = enlarge("sd", pipe, picture.resize((48, 48)))
    assert resized.stages[0].shape == (2, 3, 32, 32)
    many = enlarge("sd", pipe, uniform(4, 3, *SMALL), num_images_per_prompt=2)
    assert many.images.shape == (4, 3, 64, 64)
    for kind, cls in (("pil", Image.Image), ("np", object)):
        shown = enlarge("sd", pipe, picture, output_type=kind).images
        assert isinstance(shown[0], cls)
    assert shown.shape == (2, 64, 64, 3)


def test_default_ladder_and_sizes():
    high = DiffuseHighPipeline.from_pipe(fresh("sd"))
    result = high("a boot", num_inference_steps=2, noising_steps=0)
    assert result.images[0].size == (128, 128)
    assert [stage.shape[-1] for stage in result.stages] == [32, 64, 96, 128]


# ---------------------------------------------------------------- with accelerators and schedulers


def test_accelerators_serve_every_stage():
    pipe = fresh("sd")
    high, call = DiffuseHighPipeline.from_pipe(pipe), {"num_inference_steps": 10, "noising_steps": 7}
    plain = made(pipe, "sd", **call)
    for spec in ("reuse", [{"sada": {"tolerance": 0.2}}, "apg"]):
        assert high.to(accel=spec).pipe is pipe
        result = made(pipe, "sd", **call)
        assert all(report.evaluated < report.requested for report in result.reports)
        assert [report.requested for report in result.reports] == [10, 7]
        assert 1e-6 < (result.images - plain.images).abs().mean() < 0.1
    pipe.to(accel=None)
    assert torch.equal(made(pipe, "sd", **call).images, plain.images)


def test_accelerators_without_effect_change_nothing():
    pipe = fresh("sd3")
    plain = made(pipe, "sd3").images
    pipe.to(accel={"sada": {"max_skips": 0}})
    assert torch.equal(made(pipe, "sd3").images, plain)


@pytest.mark.parametrize("cls", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler",
                                 "UniPCMultistepScheduler", "LCMScheduler"])  # fmt: skip
def test_other_schedulers(cls):
    pipe = fresh("sd")
    options = {"skip_prk_steps": True} if cls == "PNDMScheduler" else {}
    pipe.scheduler = vp(getattr(diffusers, cls), steps_offset=1, **options)
    result = made(pipe, "sd")
    assert 0.01 < result.images.std() < 0.5
    rest = {"HeunDiscreteScheduler": 2 * LATE - 1, "PNDMScheduler": LATE + 1}.get(cls, LATE)
    assert result.reports[1].evaluated == rest


def test_half_precision_keeps_the_autoencoder_s():
    pipe = fresh("sd").to(torch.bfloat16)
    result = made(pipe, "sd")
    assert pipe.vae.dtype == torch.bfloat16
    assert result.images.dtype == torch.float32
    assert result.images.isfinite().all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [("ddim", "takes neither"), ("sd_img2img", "takes a picture"), ("wan", "makes videos")],
)
def test_pipelines_of_another_kind(name, reason):
    with pytest.raises(UnsupportedPipeline, match=reason):
        DiffuseHighPipeline.from_pipe(fresh(name))


def test_networks_that_take_no_other_size():
    with pytest.raises(UnsupportedPipeline, match="64 x 64 pixels at most, not 96 x 96"):
        made(fresh("sd3"), "sd3", sizes=(64, 96))
    pipe = fresh("sd")
    forward = pipe.unet.forward

    def narrow(sample, *args, **kwargs):
        if sample.shape[-1] > 16:
            raise ValueError("no positions for 32 x 32")
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = narrow
    with pytest.raises(UnsupportedPipeline, match="does not run at 64 x 64: no positions for 32 x 32"):
        made(pipe, "sd")


def test_latents_of_an_unknown_kind():
    pipe = fresh("sd")
    postprocess = pipe.image_processor.postprocess
    pipe.image_processor.postprocess = lambda image, **kwargs: postprocess(-image, **kwargs)
    with pytest.raises(UnsupportedPipeline, match="makes images of its latents is not known"):
        made(pipe, "sd")


def test_schedules_that_accelerators_bring():
    pipe = fresh("sd").to(accel="few-step:8")
    with pytest.raises(UnsupportedPipeline, match="few-step brings a schedule of its own"):
        made(pipe, "sd")


@pytest.mark.parametrize(("options", "reason"), [
    ({"noising_steps": 7}, "noising_steps=7 of num_inference_steps=5"),
    ({"dwt_mode": "zero"}, "dwt_mode='zero' is none of 'symmetric', 'periodization'"),
    ({"sharpening_sigma": (2.0, 0.1)}, "two rising numbers"),
    ({"output_type": "latent"}, "none of 'pil', 'np', 'pt'"),
    ({"sizes": (65,)}, "multiples of 2"),
    ({"sizes": (64, 32)}, "sizes rise"),
    ({"sizes": ((64, 128),)}, "another shape"),
    ({"sizes": ("big",)}, "expected whole numbers, or pairs"),
    ({"sizes": ()}, "empty"),
    ({"strengths": 0.3}, "takes no 'strengths' here"),
    ({"denoising_end": 0.5}, "takes no 'denoising_end' here"),
    ({"image": uniform(3, 3, 32, 32)}, "3 images for 2 samples"),
    ({"image": 2 * uniform(2, 3, 32, 32)}, r"in \[0, 1\]"),
])  # fmt: skip
def test_arguments(options, reason):
    with pytest.raises(OptionError, match=reason):
        made(fresh("sd"), "sd", **options)


def test_labels_and_prompts():
    with pytest.raises(OptionError, match="takes no prompt; give class_labels"):
        DiffuseHighPipeline(fresh("dit"))("a boot", target_sizes=64)
    with pytest.raises(OptionError, match="takes no height and width"):
        made(fresh("dit"), "dit", height=64, width=64)
    with pytest.raises(OptionError, match="DiTPipeline makes squares"):
        made(fresh("dit"), "dit", sizes=((64, 68),))

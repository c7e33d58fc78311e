"""What Feynman-Kac correctors refuse, and how they end with a part of a path."""

import copy
import math

import diffusers
import pytest
import torch
from corrected import BOOT, DRESS, SIZE, corrected, seeded
from tiny.text import clip
from tiny_pipelines import SAFETY, autoencoder, ddim_scheduler, fresh, unet, uniform
from torch import Tensor

from diffaccel import FeynmanKacPipeline, accelerate
from diffaccel.errors import OptionError, UnsupportedPipeline, UnsupportedScheduler
from diffaccel.samplers import UnifiedSolverScheduler
from diffaccel.samplers.schedule import Schedule, Step


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"conditions": [BOOT, DRESS], "weights": [1, -1]}, "sum to 0"),
        ({"weights": [1.0, 1.0]}, "1 conditions, 2 weights"), ({"weights": [0.0]}, "sum to 0"),
        ({"weights": [math.nan]}, "finite"), ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"), ({"num_particles": 1}, "one particle"),
        ({"zeta": 0.0}, "zeta=0"), ({"output": "best"}, "output"), ({"guidance_scale": math.inf}, "guidance"),
        ({"negative_prompt": "blur"}, "guidance_scale"), ({"generator": [seeded()]}, "one torch.Generator"),
        ({"prompt": "a"}, "no 'prompt' here"), ({"latents": None}, "no 'latents' here"),
        ({"prompt_embeds": None}, "no 'prompt_embeds'"), ({"heigth": 32}, "did you mean 'height'"),
        ({"conditions": None}, "takes prompts"), ({"conditions": 3}, "takes prompts"),
        ({"models": [None, None]}, "2 models"), ({"resampling": "best"}, "no resampling"),
    ],
)  # fmt: skip
def test_options_are_checked(options, what):
    fkc = FeynmanKacPipeline.from_pipe(fresh("sd"))
    with pytest.raises(OptionError, match=what):
        fkc(**{"conditions": BOOT, "generator": seeded(), **options})


def test_labels_are_checked():
    with pytest.raises(OptionError, match="boot"):
        corrected("dit", "boat", num_particles=2)
    with pytest.raises(OptionError, match="unconditional"):
        corrected("ddim", BOOT, num_particles=2)
    with pytest.raises(OptionError, match="nothing to guide"):
        corrected("ddim", None, num_particles=2, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("name", "what"), [("sd_img2img", "starts from a picture"), ("sd_inpaint", "starts from a picture"),
                       ("sd_inpaint_blend", "starts from a picture")],
)  # fmt: skip
def test_pipelines_that_start_from_pictures_are_refused(name, what):
    with pytest.raises(UnsupportedPipeline, match=what):
        FeynmanKacPipeline.from_pipe(fresh(name))


@pytest.mark.parametrize(
    "scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"],
)  # fmt: skip
def test_solvers_of_two_stages_are_refused(scheduler):
    pipe = fresh("sd")
    pipe.scheduler = getattr(diffusers, scheduler)()
    with pytest.raises(UnsupportedPipeline, match="twice a step"):
        FeynmanKacPipeline.from_pipe(pipe)
    fkc = FeynmanKacPipeline.from_pipe(fresh("sd"))
    fkc._origin.scheduler = pipe.scheduler
    with pytest.raises(UnsupportedPipeline, match="twice a step"):
        fkc(BOOT, num_particles=2)


def test_schedulers_without_known_levels_are_refused():
    pipe = fresh("ddim")
    pipe.scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=4)
    with pytest.raises(UnsupportedScheduler, match="discrete"):
        corrected("ddim", None, pipe=pipe, num_particles=2)
    pipe = fresh("ddim")
    pipe.scheduler = diffusers.DDIMInverseScheduler()
    with pytest.raises(UnsupportedScheduler, match="does not decrease"):
        corrected("ddim", None, pipe=pipe, num_particles=2)


def test_pure_noise_whose_prediction_says_nothing_is_refused():
    pipe = fresh("sd")
    pipe.scheduler = ddim_scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UnsupportedScheduler, match="does not determine"):
        corrected("sd", pipe=pipe, num_particles=2)
    pipe = fresh("sd_v_prediction")
    options = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    pipe.scheduler = ddim_scheduler(**options)
    result = corrected("sd_v_prediction", pipe=pipe, num_particles=2)
    assert result.report.log_snr[0] is None and bool(result.latents.isfinite().all())


def test_schedules_that_save_an_evaluation_are_refused():
    pipe = fresh("sd")
    for first in ("mean", "none"):
        schedule = Schedule((14.0, 3.0, 0.7, 0.0), (Step(),) * 3, first).to_dict()
        pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, schedules=[schedule])
        if first == "mean":
            with pytest.raises(UnsupportedScheduler, match="saves the first evaluation"):
                corrected("sd", pipe=pipe, num_particles=2, steps=2)
        else:
            assert len(corrected("sd", pipe=pipe, num_particles=2, steps=3).report.log_snr) == 3


def test_accelerated_pipelines_are_refused():
    with pytest.raises(UnsupportedPipeline, match="accelerated"):
        FeynmanKacPipeline.from_pipe(accelerate(fresh("sd"), "reuse"))


class Guiding(diffusers.StableDiffusionPipeline):
    """Guides itself whatever its arguments say."""

    do_classifier_free_guidance = True


def test_a_pipeline_that_still_guides_itself_is_refused():
    pipe = fresh("sd")
    pipe.__class__ = Guiding
    with pytest.raises(UnsupportedPipeline, match="still guides itself"):
        corrected("sd", pipe=pipe, num_particles=2)
    with pytest.raises(UnsupportedPipeline, match="still guides itself"):
        corrected("sd", [BOOT, BOOT], models=[None, pipe], num_particles=2)


def test_two_evaluations_a_step_are_refused():
    pipe = fresh("sd")
    forward = pipe.scheduler.scale_model_input

    def twice(sample, timestep):
        pipe.unet(sample, timestep, torch.zeros(len(sample), 7, 32))
        return forward(sample, timestep)

    fkc = FeynmanKacPipeline.from_pipe(pipe)
    fkc._origin.scheduler = copy.copy(pipe.scheduler)
    fkc._origin.scheduler.scale_model_input = twice
    with pytest.raises(UnsupportedPipeline, match="twice a step"):
        fkc(BOOT, num_particles=2, **SIZE)


def test_networks_that_see_a_picture_are_refused():
    parts = {
        "vae": autoencoder(),
        "unet": unet(in_channels=8),
        "scheduler": ddim_scheduler(),
        **clip(),
        **SAFETY,
    }
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(UnsupportedPipeline, match="further inputs, such as a picture"):
        FeynmanKacPipeline.from_pipe(pipe)(BOOT, num_particles=2, image=uniform(1, 3, 32, 32))


def test_samples_that_a_callback_changes_are_refused():
    def change(pipe, step, timestep, values):
        return {"latents": values["latents"] * 0.9}

    with pytest.raises(UnsupportedPipeline, match="changes the samples"):
        corrected("sd", num_particles=2, callback_on_step_end=change)

    def change_in_place(pipe, step, timestep, values):
        values["latents"].mul_(0.9)
        return {}

    with pytest.raises(UnsupportedPipeline, match="changes the samples"):
        corrected("sd", num_particles=2, callback_on_step_end=change_in_place)

    def look(pipe, step, timestep, values):
        return {"latents": values["latents"].clone()}

    result = corrected("sd", num_particles=2, callback_on_step_end=look)
    assert torch.equal(result.latents, corrected("sd", num_particles=2).latents)


def test_a_loop_that_ends_early_is_an_error():
    def stop(pipe, step, timestep, values):
        pipe._interrupt = step == 1
        return values

    with pytest.raises(UnsupportedPipeline, match="left its loop"):
        corrected("sd", num_particles=2, callback_on_step_end=stop)


def test_a_part_of_the_path_ends_with_noise():
    """Stable Diffusion XL leaves the last steps to a refiner: the particles are those of that level."""
    result = corrected("sdxl", num_particles=2, steps=6, denoising_end=0.5)
    whole = corrected("sdxl", num_particles=2, steps=6)
    assert isinstance(result.images, Tensor) and len(result.images) == 1
    assert 0 < len(result.report.log_snr) < len(whole.report.log_snr)
    assert result.report.log_snr == whole.report.log_snr[: len(result.report.log_snr)]
    assert torch.equal(result.images, result.latents[result.drawn])

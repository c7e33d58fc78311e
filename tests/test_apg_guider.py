"""The guider of modular pipelines against the accelerator of the others."""

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks
from tiny_pipelines import MAX_LENGTH, PROMPTS, SMALL, TINY, fresh, normal, run

from diffaccel import OptionError, UnsupportedPipeline
from diffaccel.pipelines.apg_guider import APGGuider

STEPS = 6
OPTIONS = {"eta": 0.1, "rescale": 0.2, "momentum": -0.5}
BLOCKS = {"sd3": StableDiffusion3AutoBlocks, "sdxl": StableDiffusionXLAutoBlocks}


def modular(name, guider):
    """A modular pipeline of the components of an ordinary one."""
    pipe = BLOCKS[name]().init_pipeline()
    parts = {key: part for key, part in fresh(name).components.items() if part is not None}
    pipe.update_components(**{key: part for key, part in parts.items() if key in pipe._component_specs})
    pipe.update_components(guider=guider)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(guider, APGGuider):
        guider.connect(pipe.scheduler)
    return pipe


def sample(name, pipe, steps=STEPS):
    call = {**SMALL, "prompt": PROMPTS, "negative_prompt": ["", ""], "output_type": "latent"}
    call |= {"max_sequence_length": MAX_LENGTH} if name == "sd3" else {}
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, num_inference_steps=steps, generator=generator, output="latents")


def error(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_guider_is_the_accelerator(name):
    pipe = modular(name, APGGuider(guidance_scale=5.0, **OPTIONS))
    ordinary = fresh(name).to(accel={"apg": OPTIONS})
    expected = run(TINY[name], ordinary, STEPS, negative_prompt=["", ""])
    plain = run(TINY[name], ordinary.to(accel=None), STEPS, negative_prompt=["", ""])
    found = sample(name, pipe)
    assert error(found, expected) < 1e-5 < 1e-2 < error(expected, plain)
    assert torch.equal(sample(name, pipe), found), "nothing is remembered from call to call"
    network = pipe.transformer if name == "sd3" else pipe.unet
    assert not network._forward_pre_hooks, "hooks are removed"


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}, {"start": 0.2, "stop": 0.7}], ids=str)
def test_reduces_to_plain_guidance(options):
    plain = sample("sd3", modular("sd3", ClassifierFreeGuidance(guidance_scale=5.0, **options)))
    found = sample("sd3", modular("sd3", APGGuider(guidance_scale=5.0, eta=1.0, **options)))
    assert torch.equal(found, plain)
    other = sample("sd3", modular("sd3", APGGuider(guidance_scale=5.0, **options)))
    assert error(other, plain) > 1e-3


def test_guidance_that_starts_late_has_a_momentum():
    results = []
    for momentum in (0.0, -0.5):
        guider = APGGuider(5.0, momentum=momentum, start=0.5)
        results.append(sample("sd3", modular("sd3", guider)))
    assert error(*results) > 1e-3


def test_no_memory_of_a_loop_that_was_broken_off():
    """The next one may begin at a lower noise level, as image to image does."""
    pipe = fresh("sd3")
    guider = APGGuider(5.0, momentum=-0.5).connect(pipe.scheduler)

    def guided(step, seed):
        x, cond, uncond = (normal(2, 4, 16, 16, seed=seed + n) for n in range(3))
        guider.set_state(step, 8, pipe.scheduler.timesteps[step])
        pipe.scheduler.set_begin_index(step)
        guider._sample = x
        return guider.forward(cond, uncond).pred

    pipe.scheduler.set_timesteps(8)
    expected = guided(4, 7)
    pipe.scheduler.set_timesteps(8)
    guided(2, 1), guided(3, 2)
    assert not torch.equal(guided(4, 7), expected)
    pipe.scheduler.set_timesteps(8)
    assert torch.equal(guided(4, 7), expected)


def test_configuration(tmp_path):
    guider = APGGuider(guidance_scale=6.0, momentum=-0.75, dims="frame", stop=0.9)
    assert isinstance(guider.config["eta"], float) and guider.config["momentum"] == -0.75
    guider.save_pretrained(tmp_path)
    again = APGGuider.from_pretrained(tmp_path)
    assert again.apg == guider.apg and all(
        guider.config[name] == value for name, value in again.config.items() if name[0] != "_"
    )
    scheduler = fresh("sd3").scheduler
    other = guider.connect(scheduler).new(guidance_scale=3.0)
    assert (other.guidance_scale, other.apg, other.scheduler) == (3.0, guider.apg, scheduler)
    assert "guidance_scale" in repr(guider) and "num_conditions" in repr(guider)
    with pytest.raises(OptionError, match="eta=2"):
        APGGuider(eta=2.0)


def test_it_has_to_know_the_scheduler():
    pipe = modular("sd3", APGGuider())
    pipe.guider.connect(None)
    with pytest.raises(UnsupportedPipeline, match=r"connect\(pipe.scheduler\)"):
        sample("sd3", pipe)
    assert not pipe.transformer._forward_pre_hooks


def test_accelerators_under_a_guider():
    pipe = modular("sd3", APGGuider(5.0, **OPTIONS))
    with pytest.raises(UnsupportedPipeline, match="its guidance is a component"):
        pipe.to(accel="apg")
    plain = sample("sd3", pipe)
    pipe.to(accel={"sada": {"tolerance": 1e9}})
    assert torch.isfinite(sample("sd3", pipe, 12)).all() and pipe.accel.report.skipped > 0
    assert torch.equal(sample("sd3", pipe.to(accel=None)), plain)


def test_it_is_not_what_diffusers_calls_by_this_name():
    theirs = AdaptiveProjectedGuidance(5.0, -0.5, 0.0, eta=0.1)
    ours = APGGuider(5.0, momentum=-0.5, eta=0.1)
    assert error(sample("sd3", modular("sd3", theirs)), sample("sd3", modular("sd3", ours))) > 1e-2

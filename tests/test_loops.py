"""Pipelines with unusual sampling loops run as they are, or are refused with the reason."""

import inspect

import diffusers
import pytest
import torch
from tiny.recipe import scheduler
from tiny_pipelines import TINY, fresh, run

from diffaccel import Accelerator, UnsupportedPipeline, accelerate
from diffaccel.noise import probe

CASE = TINY["sd"]


def unusual(name):
    parts = {**fresh("sd").components, "requires_safety_checker": False}
    if name == "StableDiffusionParadigmsPipeline":
        parts["scheduler"] = scheduler("DDIMParallelScheduler")
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    pipe = cls(**{key: part for key, part in parts.items() if key in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_schedulers_whose_attributes_are_copied_and_put_back():
    """A panorama keeps the state of the solver of each view, in mid-call."""
    pipe, updates = unusual("StableDiffusionPanoramaPipeline"), []

    class Look(Accelerator):
        def update(self, call, proceed):
            updates.append(call.step)
            return proceed(call)

    call = {"prompt": "a red boot"}
    plain = run(CASE, pipe, 4, **call)
    assert torch.equal(run(CASE, accelerate(pipe, Look()), 4, **call), plain)
    assert updates == [0, 1, 2, 3]
    accelerate(pipe, None)
    assert torch.equal(run(CASE, pipe, 4, **call), plain)
    assert "step" not in vars(pipe.scheduler) and "set_timesteps" not in vars(pipe.scheduler)


REFUSED = {
    ("Panorama", "reuse"): "views of one sample",
    ("Paradigms", "reuse"): "many steps at once",
    ("Paradigms", "apg"): "many steps at once",
    ("AttendAndExcite", "sada"): "differentiates",
    ("SAG", "reuse"): "attention maps",
    ("SAG", "few-step"): "schedulers of some classes",
}


@pytest.mark.parametrize(("name", "accel"), REFUSED)
def test_loops_that_are_refused(name, accel):
    with pytest.raises(UnsupportedPipeline, match=REFUSED[name, accel]):
        unusual(f"StableDiffusion{name}Pipeline").to(accel=accel)


def test_the_number_of_samples_may_not_change_in_mid_loop():
    class Twice(diffusers.DDIMPipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=4, generator=None):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(1, 3, 16, 16, generator=generator)
            for t in self.scheduler.timesteps:
                out = self.unet(x, t).sample
                both = self.scheduler.step(torch.cat([out, out]), t, torch.cat([x, x])).pred_original_sample
                x = self.scheduler.step(out, t, x + 0 * both[:1]).prev_sample
            return (x,)

    pipe = Twice(**fresh("ddim").components).to(accel="sada")
    with pytest.raises(UnsupportedPipeline, match="2 samples in one update and 1 in the next"):
        pipe(num_inference_steps=4)


def test_arguments_that_only_the_own_scheduler_takes():
    class Own(diffusers.DDIMPipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=8, generator=None):
            self.scheduler.set_timesteps(num_inference_steps, device="cpu", original_steps=50)

    class Scheduler(diffusers.DDIMScheduler):
        def set_timesteps(self, num_inference_steps, device=None, original_steps=None):
            super().set_timesteps(num_inference_steps, device)

    pipe = Own(**fresh("ddim").components)
    pipe.scheduler = Scheduler()  # the constructor makes a DDIMScheduler of it
    pipe(num_inference_steps=8)
    pipe.to(accel={"few-step": {"final_denoise": True}})
    with pytest.raises(UnsupportedPipeline, match=r"few-step .* set_timesteps\(\) as only its own scheduler"):
        pipe(num_inference_steps=9)


def test_unknown_schedulers_are_not_taken_for_known_ones():
    """Amused's tokens and Wuerstchen's cosine would have been sampled on a path with linear betas."""
    pipe = fresh("sd")
    for name in ("AmusedScheduler", "DDPMWuerstchenScheduler"):
        pipe.scheduler = getattr(diffusers, name)(**({"mask_token_id": 3} if "Amused" in name else {}))
        with pytest.raises(UnsupportedPipeline, match=f"few-step .*{name}"):
            pipe.to(accel="few-step")


def test_schedulers_with_defaults_for_two_steps_can_be_probed():
    assert len(probe(diffusers.SCMScheduler())) == 10


def test_pipelines_that_call_others_keep_their_schedulers():
    pipe = fresh("sd")
    pipe.__dict__["prior_pipe"] = fresh("ddim")
    with pytest.raises(UnsupportedPipeline, match="pipelines of its own"):
        pipe.to(accel="few-step")


def test_the_sample_may_stand_anywhere_among_the_arguments_of_a_solver():
    """CogVideoXDPMScheduler has an older prediction in the second place."""

    class Scheduler(diffusers.DDIMScheduler):
        def step(self, model_output, old, timestep, sample, return_dict=True):
            assert old is None
            return super().step(model_output, timestep, sample, return_dict=return_dict)

    class Pipeline(diffusers.DDIMPipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps=8, generator=None):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(1, 3, 16, 16, generator=generator)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, None, t, x, return_dict=False)[0]
            return (x,)

    pipe = Pipeline(**fresh("ddim").components)
    pipe.scheduler = Scheduler()
    plain = pipe(8, torch.Generator().manual_seed(0))[0]
    pipe.to(accel={"reuse": {"every": 1}})
    assert torch.equal(pipe(8, torch.Generator().manual_seed(0))[0], plain)
    pipe.to(accel={"sada": {"tolerance": 1e9}})
    pipe(8, torch.Generator().manual_seed(0))
    assert pipe.accel.report.skipped > 0 and pipe.accel.report.batch == 1


def test_schedulers_whose_step_takes_no_sample_are_refused():
    pipe = fresh("ddim")
    pipe = diffusers.KarrasVePipeline(unet=pipe.unet, scheduler=diffusers.KarrasVeScheduler())
    with pytest.raises(UnsupportedPipeline, match="takes no timestep and sample"):
        pipe.to(accel="reuse")

"""What goes on working under an accelerator: callbacks, saving, other schedulers; and taking it off."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler

from diffaccel import Reuse, accelerate, zoo

pipe = zoo.load("tiny-fashion-sd")
pipe.set_progress_bar_config(disable=True)


def show(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
    """Is called after each step, whether its network was evaluated or skipped."""
    print(f"step {step}: latents have the deviation {float(tensors['latents'].std()):.3f}")
    return tensors


def sample(**arguments: Any) -> torch.Tensor:
    """Returns an image (1, 3, 32, 32) in [0, 1] of always the same noise."""
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 12, "guidance_scale": 4.0, "generator": generator, "output_type": "pt"}
    return pipe("a photo of a green dress", **call, **arguments).images


pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
plain = sample()
accelerate(pipe, ["apg", Reuse(every=3)])  # the same as pipe.to(accel=...); the order follows from the kinds
sample(callback_on_step_end=show)
print(pipe.accel)  # the stack, and the report of the last call
pipe.save_pretrained("out/examples/callbacks")  # an ordinary folder, without accelerators
assert type(DiffusionPipeline.from_pretrained("out/examples/callbacks")).__name__ == "StableDiffusionPipeline"

pipe.to(accel=None)
assert torch.equal(sample(), plain) and not hasattr(pipe, "accel")  # to the bit

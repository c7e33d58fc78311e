"""Feature inheritance: cheaper steps instead of fewer ones, counted in floating-point operations."""

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

from diffaccel import zoo
from diffaccel.eval import count_flops, fidelity

pipe = zoo.load("tiny-fashion-sd")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
prompts = ["a photo of a red sneaker", "a photo of a bag"]


def sample(steps: int, accel: Any = None) -> torch.Tensor:
    """Returns images (2, 3, 32, 32) in [0, 1] of always the same noise."""
    pipe.to(accel=accel)
    call = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "pt"}
    return pipe(prompts, **call, generator=torch.Generator().manual_seed(0)).images


images: list[torch.Tensor] = []
for name, steps, accel in [
    ("plain, 20 steps", 20, None),
    ("plain, 10 steps", 10, None),
    ("inherit: the whole U-Net at every 3rd step", 20, "inherit"),
    ("inherit: at every 2nd step", 20, {"inherit": {"every": 2}}),
    ("inherit: whole blocks of it only", 20, {"inherit": {"level": "block"}}),
]:
    operations = count_flops(lambda steps=steps, accel=accel: images.append(sample(steps, accel)))
    error = fidelity(images[-1], images[0]).rms
    print(f"{name:45}{operations / 2e9:6.1f} GFLOP an image, RMS error {error:.4f}")

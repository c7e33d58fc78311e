"""Larger images than a model was trained for: 64 pixels by a model of 32, with SADA in all stages."""

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler

from diffaccel import DiffuseHighPipeline, zoo

pipe = zoo.load("tiny-fashion-sd")
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
high = DiffuseHighPipeline.from_pipe(pipe)  # any text-to-image pipeline with a VAE
pipe.set_progress_bar_config(disable=True)
high.to(accel="sada")
result = high(
    ["a photo of a red coat", "a photo of a sneaker"],
    target_sizes=[64],
    num_inference_steps=20,
    noising_steps=6,  # of the 20, at each larger size
    diffusehigh_guidance_scale=5.0,
    generator=torch.Generator().manual_seed(0),
)
out = Path("out/examples/diffusehigh")
out.mkdir(parents=True, exist_ok=True)
for number, image in enumerate(result.images):
    image.save(out / f"{number}.png")
for stage, report in zip(result.stages, result.reports, strict=True):
    print(f"{stage.shape[-1]} pixels: {report.evaluated:.3g} of {report.requested} evaluations per image")

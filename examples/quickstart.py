"""Load a pipeline, accelerate it, see what was saved and what was lost, undo it."""

import time

import torch
from diffusers import DPMSolverMultistepScheduler

from diffaccel import zoo
from diffaccel.eval import fidelity

# An ordinary StableDiffusionPipeline: DiffusionPipeline.from_pretrained(...) works as well.
pipe = zoo.load("tiny-fashion-sd")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
prompts = ["a photo of a red sneaker", "a photo of a bag", "a photo of a blue dress", "a photo of a coat"]


def sample(steps: int = 50) -> tuple[torch.Tensor, float]:
    """Returns images (4, 3, 32, 32) in [0, 1] of always the same noise, and the seconds they took."""
    begin, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    call = {"num_inference_steps": steps, "guidance_scale": 5.0, "generator": generator}
    return pipe(prompts, **call, output_type="pt").images, time.perf_counter() - begin


sample(2)  # warm-up
plain, seconds = sample()
pipe.to(accel="sada")
fast, less = sample()
report = pipe.accel.report
print(report)
print(f"speed-up {seconds / less:.2f}, RMS error {fidelity(fast, plain).rms:.5f}")

pipe.to(accel=None)  # as if it had never been accelerated
assert torch.equal(sample()[0], plain)
few, _ = sample(round(report.evaluated))
print(f"plain, {report.evaluated:.0f} steps: RMS error {fidelity(few, plain).rms:.5f}")

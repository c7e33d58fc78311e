"""APG: high guidance scales with fewer clipped pixels."""

from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

from diffaccel import zoo
from diffaccel.samplers import UnifiedSolverScheduler

pipe = zoo.load("tiny-fashion-sd")
pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, solver="dpm++2m")
pipe.set_progress_bar_config(disable=True)
prompts = ["a photo of a red shirt", "a photo of a white bag", "a photo of a blue dress", "a photo of a coat"]
out = Path("out/examples/guidance")
out.mkdir(parents=True, exist_ok=True)


def sample(scale: float, accel: Any) -> torch.Tensor:
    """Returns images (4, 3, 32, 32) in [0, 1] of always the same noise."""
    pipe.to(accel=accel)
    call = {"num_inference_steps": 20, "guidance_scale": scale, "output_type": "pt"}
    return pipe(prompts, **call, generator=torch.Generator().manual_seed(0)).images


for scale in (3.0, 12.0):
    for name, accel in {"plain": None, "apg": "apg", "apg-mean": {"apg": {"origin": "mean"}}}.items():
        images = sample(scale, accel)
        clipped = (images == 1).any(1).float().mean()  # pixels with a channel at its end
        print(f"guidance {scale:4g}, {name:9} {100 * clipped:.1f} % of the pixels are clipped")
        save_image(images, out / f"{name}-{scale:g}.png")

"""Feynman-Kac correctors: a product of two prompts, by weighted particles."""

from pathlib import Path

import torch

from diffaccel import FeynmanKacPipeline, zoo

pipe = zoo.load("tiny-fashion-sd")
pipe.set_progress_bar_config(disable=True)
fkc = FeynmanKacPipeline.from_pipe(pipe)
result = fkc(
    ["a photo of a bag", "a photo of a red sneaker"],
    weights=[1.0, 0.5],
    num_particles=4,
    num_inference_steps=20,
    generator=torch.Generator().manual_seed(0),
)
out = Path("out/examples/products.png")
out.parent.mkdir(parents=True, exist_ok=True)
result.images[0].save(out)
print(result.report)

"""A plan within a budget of error, searched on the model itself, and used by accel="auto".

The command line is ``diffaccel tune tiny-fashion-dit --budget "psnr>=20"``. This is a tiny one: with 6 images
it promises 75 % of the images, with 80 % confidence; without these options it takes 64, for 95 % and 95 %.
"""

from pathlib import Path

import torch

from diffaccel import Plan, cli, zoo

STEPS, GUIDANCE, OUT = 12, 2.5, "out/examples/tune"
cli.main([
    "tune", "tiny-fashion-dit", "--budget", "psnr>=20", "--steps", str(STEPS), "--guidance", str(GUIDANCE),
    "--images", "6", "--candidates", "6", "--coverage", "0.75", "--confidence", "0.8", "--batch", "2",
    "--rounds", "3", "--out", OUT,
])  # fmt: skip

plan = Plan.load(Path(OUT) / "plan.json")
print(plan.stack, plan.steps, plan.promise)

pipe = zoo.load("tiny-fashion-dit")
pipe.set_progress_bar_config(disable=True)
pipe.to(accel=f"{OUT}/plan.json")  # "auto" is the plan that `tune --store` keeps with the model
generator = torch.Generator().manual_seed(1)
images = pipe([1, 2], GUIDANCE, generator, STEPS).images  # the steps of the plain run; the plan decides
images[0].save(f"{OUT}/image.png")
print(pipe.accel.report)

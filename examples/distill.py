"""Distillation from Python: pairs of the teacher, a run, an ordinary pipeline folder.

The command line is ``diffaccel distill pairs | rectified-flow | export``. This run is far too short to make a
good student (zoo.load("tiny-fashion-dit-2rf") is one, after 512,000 images).
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffaccel import distill, zoo
from diffaccel.distill.runs import export_run

out = Path("out/examples/distill")
teacher = zoo.load("tiny-fashion-dit")
teacher.set_progress_bar_config(disable=True)
labels = ["bag", "red sneaker", "coat"]
distill.make_pairs(out / "pairs", teacher, labels, count=48, steps=6, guidance=1.5, model="tiny-fashion-dit")

run = distill.start(distill.Config(
    method="rectified-flow", teacher="tiny-fashion-dit", pairs=str(out / "pairs"), run=str(out / "run"),
    images=160, batch=16, warmup_images=32, steps=(1, 2), eval_count=0,
    options={"density": "u-shaped", "premetric": "huber"},
))  # fmt: skip
print(run.trainer.fit())  # "complete"; a run that was stopped goes on by distill.resume(out / "run")
folder = export_run(run, out / "student", overwrite=True)

student = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)  # by diffusers alone
student.set_progress_bar_config(disable=True)
image = student([teacher.labels["bag"]], generator=torch.Generator().manual_seed(0), num_inference_steps=1)
image.images[0].save(out / "bag.png")

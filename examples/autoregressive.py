"""DiSA on a masked autoregressive pipeline: fewer diffusion steps for later tokens."""

from pathlib import Path

import torch

from diffaccel import zoo

pipe = zoo.load("tiny-fashion-mar")
pipe.set_progress_bar_config(disable=True)
labels = [pipe.labels[name] for name in ("red sneaker", "bag", "blue dress", "coat")]
out = Path("out/examples/autoregressive")
out.mkdir(parents=True, exist_ok=True)
call = {"num_inference_steps": 16, "num_head_steps": 50, "guidance_scale": 3.0, "temperature": 0.7}

for name, accel in {
    "none": {"disa": {"kind": "constant", "lower": 50}},  # the plain pipeline, with a report
    "disa": "disa",  # 50 head steps for the first tokens, 5 for the last
    "auto": "disa:auto",  # as many as a tolerance asks for
    "trunk": ["disa", "reuse"],  # and the trunk at every second autoregressive step only
}.items():
    pipe.to(accel=accel)
    images = pipe(labels, **call, generator=torch.Generator().manual_seed(0)).images
    report, head = pipe.accel.report, pipe.accel.report.counts["head"]
    print(f"{name:6}head {head.evaluated:.0f} of {head.requested}, trunk {report.evaluated:.0f} of "
          f"{report.requested} evaluations, {report.seconds['total']:.2f} s")  # fmt: skip
    images[0].save(out / f"{name}.png")

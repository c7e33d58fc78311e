"""Five evaluations: a schedule that was searched for the model, and known solvers, against 50 steps."""

from typing import Any

import torch

from diffaccel import zoo
from diffaccel.eval import fidelity

pipe = zoo.load("tiny-fashion-dit")
pipe.set_progress_bar_config(disable=True)
labels = [pipe.labels[name] for name in ("red sneaker", "bag", "blue dress", "coat")]


def sample(steps: int, accel: Any = None) -> torch.Tensor:
    """Returns images (4, 3, 32, 32) in [0, 1] of always the same noise."""
    pipe.to(accel=accel)
    generator = torch.Generator().manual_seed(0)
    images = pipe(labels, 2.5, generator, steps, output_type="np").images  # labels, guidance, noise, steps
    return torch.from_numpy(images).movedim(-1, 1)


fine = sample(50)
print("RMS distance to 50 steps of DPM-Solver++ 2M, with five evaluations:")
for name, accel in {
    "the model's own scheduler": None,
    "UniPC 2": {"solver": {"solver": "unipc2", "grid": "trailing"}},
    "theta 2 (in the angle)": {"solver": {"solver": "theta2", "grid": "trailing"}},
    "S3, searched for this model": "s3",  # for others: diffaccel search s3 MODEL, and accel="s3:FILE"
}.items():
    print(f"  {name:30}{fidelity(sample(5, accel), fine).rms:.4f}")

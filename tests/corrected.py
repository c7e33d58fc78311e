"""Calls of tiny pipelines with particles."""

import torch
from tiny_pipelines import TINY, fresh

from diffaccel import FeynmanKacPipeline

SIZE = {"height": 32, "width": 32, "output_type": "latent"}
BOOT, DRESS = "a red boot", "a photo of a green dress"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def corrected(name, conditions=BOOT, weights=None, steps=5, seed=0, pipe=None, **options):
    """One call of a tiny pipeline with particles, with the arguments of its case."""
    ours = ("prompt", "negative_prompt", "guidance_scale", "guidance_scale_2", "true_cfg_scale",
            "class_labels", "batch_size", "prompt_template")  # fmt: skip
    call = {key: value for key, value in TINY[name].call.items() if key not in ours}
    fkc = FeynmanKacPipeline.from_pipe(pipe if pipe is not None else fresh(name))
    return fkc(conditions, weights, num_inference_steps=steps, generator=seeded(seed), **{**call, **options})

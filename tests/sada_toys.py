"""The exact mixture in the plainest sampling loop, and what SADA does there."""

import functools
import math

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from diffaccel import Sada
from diffaccel.pipelines.sada_rules import ErrorRule
from diffaccel.toy import toy_t

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_CLIP = {**VP, "clip_sample": False}
Output = diffusers.models.unets.unet_2d.UNet2DOutput


class Loop(DiffusionPipeline):
    """The plainest sampling loop: noise in, latents out, in float64."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, noise, num_inference_steps=50, first=0, after=None):
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps[first:]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        x = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for step, t in enumerate(timesteps):
            scale = getattr(self.scheduler, "scale_model_input", lambda sample, t: sample)
            out = self.unet(scale(x, t), t).sample
            x = self.scheduler.step(out, t, x).prev_sample
            if after is not None:
                x = after(step, x)
        return x


class Foreign(torch.nn.Module):
    """Toy T with other inputs and outputs than those of `GaussianMixtureModel`."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.mixture = kind, toy_t()

    def forward(self, x, t):
        t = float(t)
        if self.kind == "edm":  # sigma_data 0.5, input c_in x, t = log(sigma) / 4
            sigma, d = math.exp(4 * t), 0.5
            norm = math.hypot(sigma, d)
            x0 = self.mixture.x0(x * norm, 1.0, sigma)
            return Output(sample=(x0 - d**2 / norm * x) * norm / (sigma * d))
        if self.kind == "angle":
            alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
            x0, eps = self.mixture.x0(x, alpha, sigma), self.mixture.eps(x, alpha, sigma)
            return Output(sample=alpha * eps - sigma * x0)
        assert self.kind == "rising flow"
        return Output(sample=self.mixture.x0(x, t, 1 - t) - self.mixture.eps(x, t, 1 - t))


def toy(prediction_type="epsilon", scheduler=None, model=None):
    if model is None:
        model = toy_t(prediction_type=prediction_type)
    if scheduler is None:
        scheduler = DPMSolverMultistepScheduler(**VP, prediction_type=prediction_type, steps_offset=1)
    return Loop(model, scheduler)


def flow_toy():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return Loop(toy_t(prediction_type="flow_prediction", path="flow"), scheduler)


def noise(count=64, seed=0):
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(model):
    """Returns a list that grows by the rows of every real evaluation."""
    rows, forward = [], model.forward

    def count(sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    model.forward = count
    return rows


def rms(a, b):
    return (a - b).pow(2).mean().sqrt().item()


def skips(pipe, count):
    return [pipe.accel.report.skipped_steps(n) for n in range(count)]


@functools.cache
def plain(steps=50):
    """Toy T's 256 samples by DPM++ 2M; the card's rms is that to 50 steps."""
    return toy()(noise(256), num_inference_steps=steps)


class Forced(Sada):
    """Skips given steps, whatever the error: to test the reconstruction alone."""

    name = ""
    pattern = frozenset(range(11, 46, 2))

    def start_rule(self, run):
        rule = ErrorRule(0.0, self.max_skips, self.order)
        plan = rule.plan

        def forced(call, x0, result, ran):
            plan(call, x0, result, ran)
            return np.full(len(x0), call.step + 1 in self.pattern)

        rule.plan = forced
        return rule

    def _in_range(self, call):
        return True

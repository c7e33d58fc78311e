"""The 1-D mixture of the solver tests: exact x0, an exact ODE, and a loop that drives our scheduler.

All in float64 and in terms of y = sample / alpha and the ratio S = sigma / alpha.
"""

import functools
import math

import numpy as np
import torch
from diffusers import DDIMPipeline
from scipy.integrate import solve_ivp

from diffaccel.samplers import UnifiedSolverScheduler
from diffaccel.samplers.exponential import Level
from diffaccel.toy import GaussianMixtureModel

WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.0, 0.6]), np.array([0.35, 0.25])
HIGH, LOW = 8.0, 0.08
START = 8 * np.array([-1.9, -1.1, -0.45, 0.1, 0.35, 0.8, 1.3, 2.2])
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def x0_of(y, ratio):
    """The posterior mean of the data."""
    y = np.asarray(y, dtype=np.float64)[..., None]
    var = STDS**2 + ratio**2
    logs = np.log(WEIGHTS) - 0.5 * np.log(var) - (y - MEANS) ** 2 / (2 * var)
    share = np.exp(logs - logs.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    return (share * (MEANS + STDS**2 / var * (y - MEANS))).sum(-1)


def exact(y, high, low):
    """The end of the probability-flow ODE: dy / dlambda = x0 - y."""
    span = (-math.log(high), -math.log(low))
    field = lambda lam, value: x0_of(value, math.exp(-lam)) - value  # noqa: E731
    return solve_ivp(field, span, y, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]


@functools.cache
def ending(high=HIGH, low=LOW):
    return exact(START, high, low)


def log_grid(count, high=HIGH, low=LOW, rough=False):
    """Nodes with equal steps of lambda, or with steps that alternate 1 : 2."""
    gaps = np.array([1.0, 2.0] * (count // 2)) if rough else np.ones(count)
    position = np.concatenate([[0], np.cumsum(gaps)]) / gaps.sum()
    return tuple(float(s) for s in np.exp(math.log(high) + position * math.log(low / high)))


def solver(kind="vp", prediction="epsilon", **options):
    """A scheduler for VP samples of SD's betas, or for a flow."""
    if kind == "flow" and prediction != "flow_prediction":
        options["use_flow_sigmas"] = True
    return UnifiedSolverScheduler(prediction_type=prediction, **{**SD, **options})


def output_of(y, level, prediction="epsilon"):
    """What a network would predict."""
    x0 = x0_of(y, level.ratio)
    eps = (y - x0) / level.ratio
    norm = math.hypot(level.alpha, level.sigma)
    return {
        "epsilon": eps, "sample": x0, "flow_prediction": eps - x0,
        "v_prediction": (level.alpha * eps - level.sigma * x0) / norm,
    }[prediction]  # fmt: skip


def drive(schedule, kind="vp", prediction="epsilon", exact_nodes=1, start=START):
    """The y at the end of a schedule; the first nodes may be set to the exact solution."""
    scheduler = solver("vp" if kind == "ve" else kind, prediction, schedules=[schedule.to_dict()])
    scheduler.set_timesteps(schedule.evaluations)
    if kind == "ve":
        scheduler.levels = [Level(1.0, sigma) for sigma in schedule.sigmas]
    levels, y = scheduler.levels, start
    x, skipped = torch.tensor(start * levels[0].alpha), int(schedule.analytic_first != "none")
    for number, timestep in enumerate(scheduler.timesteps, skipped):
        level = levels[number]
        if 0 < number < exact_nodes:
            y = exact(y, levels[number - 1].ratio, level.ratio)
            x = torch.tensor(y * level.alpha)
        seen = scheduler.scale_model_input(x, timestep).numpy()
        output = torch.tensor(output_of(seen / level.alpha, level, prediction))
        x = scheduler.step(output, timestep, x).prev_sample
    return x.numpy() / levels[-1].alpha


def rms(difference):
    return float(np.sqrt(np.mean(np.square(difference))))


def toy_pipe():
    """A pipeline of a mixture of pictures, with our scheduler."""
    pipe = DDIMPipeline(GaussianMixtureModel(), solver())
    pipe.scheduler = solver()  # as that of SD; the pipeline has made another
    pipe.set_progress_bar_config(disable=True)
    return pipe

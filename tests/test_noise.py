"""The path of every scheduler, against networks that know only the scaled input and the timestep."""

import inspect
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffaccel.errors import UnsupportedScheduler
from diffaccel.noise import is_stochastic, path_of

SHAPE = (2, 3, 4)
MEAN = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EPS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALL = ("epsilon", "sample", "v_prediction")
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0}


def vp_level(scheduler, timestep, index):
    """alpha, sigma of a VP network; log(sigma / alpha) is linear between integer timesteps."""
    abars = scheduler.alphas_cumprod.double().numpy()
    step = int(timestep)
    if step == timestep:
        return math.sqrt(abars[step]), math.sqrt(1 - abars[step])
    logs = np.log((1 - abars) / abars) / 2
    ratio = math.exp(np.interp(float(timestep), np.arange(len(logs)), logs))
    return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)


def inverse_level(scheduler, timestep, index):
    """DDIM inversion feeds the network a sample that is one stride less noisy than its timestep."""
    step, clean = (
        int(timestep) - 1000 // scheduler.num_inference_steps,
        float(scheduler.initial_alpha_cumprod),
    )
    return (math.sqrt(clean), math.sqrt(1 - clean)) if step < 0 else vp_level(scheduler, step, index)


def flow_level(scheduler, timestep, index):
    return 1 - float(timestep) / 1000, float(timestep) / 1000


def rounded_flow_level(scheduler, timestep, index):
    """These cast the timesteps to integers."""
    assert abs(float(scheduler.sigmas[index]) - float(timestep) / 1000) <= 1.001e-3
    return 1 - float(scheduler.sigmas[index]), float(scheduler.sigmas[index])


def rising_level(scheduler, timestep, index):
    return float(timestep) / 1000, 1 - float(timestep) / 1000


def minimax_level(scheduler, timestep, index):
    return float(timestep), 1 - float(timestep)


def edm_level(scheduler, timestep, index):
    return 1.0, math.exp(4 * float(timestep))


def trig_level(scheduler, timestep, index):
    return math.cos(math.pi / 2 * float(timestep)), math.sin(math.pi / 2 * float(timestep))


def outputs(alpha, sigma, x0, eps, d=None):
    if d is not None:
        skip, out = d**2 / (sigma**2 + d**2), sigma * d / math.hypot(sigma, d)
        network = (x0 - skip * (x0 + sigma * eps)) / out
        return {"epsilon": network, "v_prediction": -network}
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": (alpha * eps - sigma * x0) / math.hypot(alpha, sigma),
        "flow_prediction": eps - x0,
        "data - noise": x0 - eps,
    }


@dataclass
class Case:
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    predictions: tuple[str, ...] = ALL
    level: Any = vp_level
    output: str | None = None  # what the network predicts, if the scheduler has no such setting
    exact: tuple[str, ...] | None = None  # predictions for which a point mass is integrated exactly
    steps: int = 10

    def build(self, prediction):
        own = {} if self.output else {"prediction_type": prediction}
        scheduler = getattr(diffusers, f"{self.name}Scheduler")(**self.config, **own)
        scheduler.set_timesteps(self.steps)
        return scheduler


NO_CLIP = {**SD, "clip_sample": False, "steps_offset": 1}
LEADING = {**SD, "timestep_spacing": "leading"}
TRAILING = {**SD, "timestep_spacing": "trailing"}
FLOWS = ("epsilon", "sample", "flow_prediction")
VELOCITY = {"predictions": ("flow_prediction",), "output": "flow_prediction", "level": flow_level}
CASES = [
    Case("DDIM", NO_CLIP),
    Case("DDIM", {**NO_CLIP, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, ALL[1:]),
    Case("DDIM", {**NO_CLIP, "timestep_spacing": "trailing", "set_alpha_to_one": False}, exact=(), steps=7),
    Case("DDIMParallel", NO_CLIP),
    Case("DDIMInverse", NO_CLIP, ALL[::2], inverse_level),
    Case("DDIMInverse", {**NO_CLIP, "set_alpha_to_one": False}, ALL, inverse_level),
    Case("CogVideoXDDIM", {**NO_CLIP, "timestep_spacing": "trailing"}),
    Case("PNDM", {**SD, "skip_prk_steps": True, "steps_offset": 1}, ALL[::2], exact=("epsilon",)),
    Case("PNDM", SD, ALL[::2], exact=("epsilon",)),
    Case("EulerDiscrete", LEADING),
    Case("EulerDiscrete", {**TRAILING, "final_sigmas_type": "sigma_min"}),
    Case("HeunDiscrete", LEADING),
    Case("KDPM2Discrete", LEADING, ALL[::2]),
    Case("LMSDiscrete", TRAILING),
    Case("DPMSolverMultistep", SD),
    Case("DPMSolverMultistep", {**TRAILING, "solver_order": 3, "rescale_betas_zero_snr": True}, ALL[1:]),
    Case("DPMSolverMultistep", {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    Case("DPMSolverMultistep", {**FLOW, "solver_order": 3}, FLOWS, rounded_flow_level),
    Case("DPMSolverMultistepInverse", SD),
    Case("DPMSolverSinglestep", SD),
    Case("DPMSolverSinglestep", FLOW, FLOWS, rounded_flow_level),
    Case("UniPCMultistep", {**SD, "solver_order": 3}),
    Case("UniPCMultistep", {**SD, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    Case("UniPCMultistep", FLOW, FLOWS[1:], rounded_flow_level),
    Case("DEISMultistep", SD),
    Case("DEISMultistep", FLOW, FLOWS, rounded_flow_level),
    Case("EDMEuler", {}, ALL[::2], edm_level),
    Case("EDMDPMSolverMultistep", {"sigma_data": 1.0}, ALL[::2], edm_level),
    Case("IPNDM", {}, ("v_prediction",), trig_level, "v_prediction", exact=()),
    Case("FlowMatchEulerDiscrete", {"shift": 3.0}, **VELOCITY),
    Case("FlowMatchEulerDiscrete", {"invert_sigmas": True}, ("flow",), rising_level, "data - noise"),
    Case("FlowMatchHeunDiscrete", {"shift": 3.0}, **VELOCITY),
    Case("FlowMapEulerDiscrete", {"shift": 3.0}, **VELOCITY),
    Case("LTXEulerAncestralRF", {"eta": 0.0}, **VELOCITY),
    Case("MiniMaxH3", {"shift": 3.0}, ("flow",), minimax_level, "data - noise"),
]
RUNS = [
    pytest.param(case, prediction, id=f"{case.name}-{number}-{prediction}")
    for number, case in enumerate(CASES)
    for prediction in case.predictions
]
EXACT = [run for run in RUNS if run.values[0].exact is None or run.values[1] in run.values[0].exact]


def scale(scheduler, sample, timestep):
    return (
        scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
    )


def walk(case, prediction, std):
    """Yields scheduler, path, index, sample, output, x0, eps, result of the updates for N(MEAN, std^2)."""
    scheduler = case.build(prediction)
    path = path_of(scheduler)
    start = path[0]
    sample = start.alpha * MEAN + start.sigma * EPS
    assert len(path) == len(scheduler.timesteps)
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scale(scheduler, sample, timestep)
        assert torch.allclose(scaled, sample * path.input_scale(index), rtol=1e-6)
        if isinstance(getattr(scheduler, "step_index", None), int):
            assert scheduler.step_index == index
        # the network: it sees only the scaled input and the timestep
        alpha, sigma = case.level(scheduler, timestep, index)
        d = scheduler.config.get("sigma_data")
        x = scaled.double() * (math.hypot(sigma, d) if d else 1)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2) if std or sigma else 0.0
        x0 = MEAN + gain * (x - alpha * MEAN)
        eps = (x - alpha * x0) / sigma if sigma else EPS
        output = outputs(alpha, sigma, x0, eps, d)[case.output or prediction]
        result = scheduler.step(output, timestep, sample)
        yield scheduler, path, index, sample, output, x0, eps, result
        sample = result.prev_sample


def close(ours, truth, tolerance=1e-5):
    return (ours - truth).abs().max() <= tolerance * max(1, truth.abs().max())


@pytest.mark.parametrize(("case", "prediction"), RUNS)
def test_x0_and_eps_at_every_step(case, prediction):
    for _, path, index, sample, output, x0, eps, result in walk(case, prediction, std=0.5):
        level = path[index]
        assert close(level.x0(output, sample), x0), (index, level)
        if abs(level.jacobian) > 0.01 and level.sigma:
            assert close(level.eps(output, sample), eps, 2e-5), (index, level)
        if getattr(result, "pred_original_sample", None) is not None:
            assert close(level.x0(output, sample), result.pred_original_sample)
        if level.sigma > 0.01:  # the schedulers' float32 shows below
            assert close(level.output(x0, sample), output, 2e-5)


@pytest.mark.parametrize(("case", "prediction"), EXACT)
def test_a_point_mass_keeps_its_noise(case, prediction):
    """These solvers are exact for constant x0 and eps: sample = alpha_i x0 + sigma_i eps, also at the end."""
    tolerance = 1e-3 if case.name == "LMSDiscrete" else 5e-5  # LMS integrates numerically, to 1e-4
    for _, path, index, sample, _, _, _, result in walk(case, prediction, std=0.0):
        for level, reached in ((path[index], sample), (path[index + 1], result.prev_sample)):
            scale = math.hypot(level.alpha, level.sigma)
            truth = (level.alpha * MEAN + level.sigma * EPS) / scale
            assert close(reached / scale, truth, tolerance), (index, level)


NEEDED = {
    "AmusedScheduler": [0],
    "RFD4ProteinaScheduler": ["log", "1/t", 1.0, 1.0],
    "VQDiffusionScheduler": [5],
}


def test_every_deterministic_scheduler_is_tested():
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    accepted = set()
    for name in names:
        maker = getattr(diffusers, name)
        if maker.__module__.startswith("diffusers.utils"):  # a dummy: torchsde is not installed
            continue
        scheduler = maker(*NEEDED.get(name, ()))
        if is_stochastic(scheduler):
            continue
        try:
            path_of(scheduler)
        except UnsupportedScheduler as error:
            if "call its set_timesteps first" not in str(error):
                continue
        accepted.add(name.removesuffix("Scheduler"))
    assert accepted | {"LTXEulerAncestralRF"} == {case.name for case in CASES}


GRIDS = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {})


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: next(iter(grid), "linspace"))
@pytest.mark.parametrize(
    "name", ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"]
)
def test_x0_of_multistep_schedulers_is_theirs(name, grid):
    """Their timesteps are rounded, the sigmas are not: only the index gives the level."""
    for prediction in ALL:
        scheduler = getattr(diffusers, f"{name}Scheduler")(**SD, **grid, prediction_type=prediction)
        scheduler.set_timesteps(6)
        path, sample = path_of(scheduler), 5 * EPS
        for index, timestep in enumerate(scheduler.timesteps):
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)
            theirs = scheduler.convert_model_output(MEAN, sample=sample)
            ours = path[index].eps if name == "DEISMultistep" else path[index].x0
            assert close(ours(MEAN, sample), theirs, 1e-4 if name == "DEISMultistep" else 1e-5)
            sample = scheduler.step(MEAN, timestep, sample).prev_sample


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: next(iter(grid), "linspace"))
@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete"])
def test_x0_of_ve_schedulers_is_theirs(name, grid):
    for prediction in ("epsilon", "v_prediction"):
        scheduler = getattr(diffusers, f"{name}Scheduler")(**SD, **grid, prediction_type=prediction)
        scheduler.set_timesteps(6)
        path, sample = path_of(scheduler), 14 * EPS
        for index, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(sample, timestep)
            assert torch.allclose(scaled, sample * path.input_scale(index), rtol=1e-6)
            result = scheduler.step(MEAN, timestep, sample)
            assert close(path[index].x0(MEAN, sample), result.pred_original_sample)
            sample = result.prev_sample


STOCHASTIC = [
    ("DDPM", {**SD, "clip_sample": False}, {}),
    ("DDPMParallel", {**SD, "clip_sample": False}, {}),
    ("LCM", {}, {}),
    ("TCD", {}, {}),
    ("UnCLIP", {"clip_sample": False}, {}),
    ("CogVideoXDPM", {"clip_sample": False}, {}),
    ("EulerAncestralDiscrete", SD, {}),
    ("KDPM2AncestralDiscrete", SD, {}),
    ("SASolver", SD, {}),
    ("FlowMatchLCM", {}, {}),
    ("LTXEulerAncestralRF", {}, {}),
    ("SCM", {}, {"intermediate_timesteps": None}),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, {}),
    ("DPMSolverMultistep", {**SD, "algorithm_type": "sde-dpmsolver++"}, {}),
]


@pytest.mark.parametrize(("name", "config", "options"), STOCHASTIC, ids=[name for name, *_ in STOCHASTIC])
def test_stochastic_schedulers_keep_their_marginals(name, config, options):
    """For a point mass at 0 the sample stays of variance sigma_i^2, whatever the noise that is injected."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(5, **options)
    assert is_stochastic(scheduler)
    path = path_of(scheduler)
    generator = torch.Generator().manual_seed(0)
    data = getattr(scheduler.config, "sigma_data", 1.0)
    sample = path[0].sigma * torch.randn(20_000, 1, 1, 1, generator=generator) * data
    old, timesteps = None, scheduler.timesteps[: len(path)]
    for index, timestep in enumerate(timesteps):
        spread = float(sample.std()) / data
        assert spread == pytest.approx(path[index].sigma, rel=0.03), index
        output = path[index].output(torch.zeros_like(sample), sample)
        scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else None
        if name == "CogVideoXDPM":
            back = timesteps[index - 1] if index else None
            sample, old = scheduler.step(output, old, timestep, back, sample, generator=generator)[:2]
            continue
        extra = (
            {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        )
        if name == "UnCLIP":
            extra["prev_timestep"] = timesteps[index + 1] if index + 1 < len(path) else None
        sample = scheduler.step(output, timestep, sample, **extra).prev_sample
    assert float(sample.std()) / data == pytest.approx(path[len(path)].sigma, rel=0.03, abs=1e-4)


def test_stochastic_settings_of_other_schedulers_do_not_count():
    sde = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    assert is_stochastic(sde) == "algorithm_type is 'sde-dpmsolver++'"
    assert is_stochastic(diffusers.EulerDiscreteScheduler.from_config(sde.config)) is None
    noisy = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert is_stochastic(noisy) == "stochastic_sampling is on"
    assert is_stochastic(diffusers.FlowMatchHeunDiscreteScheduler.from_config(noisy.config)) is None
    assert is_stochastic(diffusers.LTXEulerAncestralRFScheduler(eta=0.0)) is None
    assert "eta=0" in is_stochastic(diffusers.TCDScheduler())
    assert "discrete" in is_stochastic(diffusers.AmusedScheduler(mask_token_id=0))


def test_foreign_settings_do_not_change_the_path():
    dpm = diffusers.DPMSolverMultistepScheduler(**SD, prediction_type="v_prediction")
    flow = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dpm.config)
    assert flow.config["prediction_type"] == "v_prediction"
    flow.set_timesteps(4)
    assert path_of(flow).prediction_type == "flow_prediction"


def test_subclasses_are_recognised():
    class Mine(diffusers.DDIMScheduler):
        pass

    scheduler = Mine(**SD)
    scheduler.set_timesteps(4)
    assert path_of(scheduler).kind == "vp"


def test_refusals_say_what_is_wrong():
    class Mine:
        pass

    with pytest.raises(
        UnsupportedScheduler, match=r"Mine has noise levels.*DDIMScheduler, .*EulerDiscreteScheduler"
    ):
        path_of(Mine())
    with pytest.raises(UnsupportedScheduler, match="AmusedScheduler samples discrete tokens"):
        path_of(diffusers.AmusedScheduler(mask_token_id=0))
    with pytest.raises(UnsupportedScheduler, match="set_timesteps"):
        path_of(diffusers.EulerDiscreteScheduler())
    for config, problem in [
        ({"prediction_type": "flow_prediction"}, "not prediction_type 'flow_prediction'"),
        ({"prediction_type": "v_prediction", "use_flow_sigmas": True}, "not prediction_type 'v_prediction'"),
        ({**SD, "use_karras_sigmas": True, "use_flow_sigmas": True}, "sigmas up to 14.6"),
    ]:
        scheduler = diffusers.DPMSolverMultistepScheduler(**config)
        scheduler.set_timesteps(4)
        with pytest.raises(UnsupportedScheduler, match=problem):
            path_of(scheduler)


# velocity, check 2 of the sada card


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
def test_velocity_in_eps_and_v_form(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SD)
    scheduler.set_timesteps(50)
    path = path_of(scheduler)
    for index in range(50):
        level, stored = path[index], path[index].alpha * MEAN + path[index].sigma * EPS
        x = path.to_time_coordinates(index, stored)
        norm = math.hypot(level.alpha, level.sigma)
        alpha, sigma = level.alpha / norm, level.sigma / norm
        assert torch.allclose(x, alpha * MEAN + sigma * EPS)
        beta = 2 * sigma / alpha * path.turns[index]
        velocity = path.velocity(index, MEAN, EPS)
        assert close(-beta / 2 * x + beta / 2 / sigma * EPS, velocity, 1e-10)
        assert close(beta / 2 * alpha / sigma * level.convert(EPS, stored, "v_prediction"), velocity, 1e-10)
        step = path.time(index) * 1000 - 1
        assert beta == pytest.approx(1000 * np.interp(step, np.arange(1000), scheduler.betas), rel=0.015)
    with pytest.raises(ZeroDivisionError, match="infinite"):
        final = path_of(scheduler) if name != "DDIM" else path_of(CASES[0].build("epsilon"))
        final.velocity(len(final), MEAN, EPS)


DENSE = [
    ("DDIM", SD, 0.1),
    ("EulerDiscrete", LEADING, 0.1),
    ("DPMSolverMultistep", TRAILING, 0.1),
    ("CogVideoXDDIM", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 0.1),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, 0.1),
    ("MiniMaxH3", {"shift": 3.0}, 0.1),
    ("EDMEuler", {}, 0.1),
    ("IPNDM", {}, 0.1),
]


@pytest.mark.parametrize(("name", "config", "tolerance"), DENSE, ids=[name for name, *_ in DENSE])
def test_velocity_is_the_derivative_of_the_exact_solution(name, config, tolerance):
    """For N(0, S^2) the probability-flow ODE keeps x / sqrt(alpha^2 S^2 + sigma^2) constant."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(1000)
    path, data = path_of(scheduler), 0.7

    def solution(index):
        level = path[index]
        std = math.sqrt(level.alpha**2 * data**2 + level.sigma**2)
        return path.to_time_coordinates(index, std * EPS)

    middle = 500
    level, std = path[middle], math.sqrt(path[middle].alpha ** 2 * data**2 + path[middle].sigma ** 2)
    x0, eps = level.alpha * data**2 / std * EPS, level.sigma / std * EPS
    velocity = path.velocity(middle, x0, eps)
    errors, steps = [], (160, 80, 40, 20)
    for reach in steps:
        left, right = middle + reach, middle - reach
        rise, run = solution(right) - solution(left), path.time(right) - path.time(left)
        # grids that are not uniform: parabola through three points
        a, b = path.time(middle) - path.time(left), path.time(right) - path.time(middle)
        back, front = (solution(middle) - solution(left)) / a, (solution(right) - solution(middle)) / b
        difference = (b * back + a * front) / (a + b)
        assert close(difference, rise / run, 1.0)
        errors.append(float((difference - velocity).norm() / velocity.norm()))
    assert errors[-1] < 5e-3
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert abs(rates[-1] - 2) < tolerance, (errors, rates)


def test_time_runs_from_noise_to_data():
    for case in CASES:
        if case.name in ("DDIMInverse", "DPMSolverMultistepInverse", "PNDM"):
            continue
        path = path_of(case.build(case.predictions[0]))
        times = [path.time(index) for index in range(len(path) + 1)]
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(times)), case
        assert path.kind == "edm" or 0 <= times[-1] <= times[0] <= 1


def test_own_ends_and_times():
    """DDIM's strides do not reach the end of every grid: with 7 steps the last one goes to timestep 0."""
    scheduler = diffusers.DDIMScheduler(**NO_CLIP, timestep_spacing="trailing")
    scheduler.set_timesteps(7)
    last, final = path_of(scheduler).levels[-2:]
    sample = last.alpha * MEAN + last.sigma * EPS
    reached = scheduler.step(EPS, scheduler.timesteps[-1], sample).prev_sample
    assert final.sigma == pytest.approx(math.sqrt(0.00085), rel=1e-4)
    assert close(reached, final.alpha * MEAN + final.sigma * EPS)

    own = diffusers.IPNDMScheduler()
    own.set_timesteps(10)
    assert path_of(own).times == pytest.approx([*own.timesteps.tolist(), 0.0], abs=1e-4)

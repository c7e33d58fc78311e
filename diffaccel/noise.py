"""The path: how much signal and noise a scheduler's samples hold, and what its network predicts.

A step index ``i`` of a scheduler stands for the pair

    sample = alpha x0 + sigma eps        (the tensor that ``scheduler.step`` receives)
    output = p x0 + q eps                (the tensor that the network predicts)

and these two equations, solved for ``x0`` and ``eps``, give every conversion between predictions; their
determinant is ``K = alpha q - sigma p``.  No other module knows where a scheduler keeps its levels.

| kind | sample                | levels from                         | time t             | velocity dx/dt |
|------|-----------------------|-------------------------------------|--------------------|----------------|
| vp   | alpha^2 + sigma^2 = 1 | alphas_cumprod, or sigmas[i] = S    | (n + 1) / T        | phi'(t) v      |
| ve   | alpha = 1, sigma = S  | sigmas[i] = S                       | as vp, in VP units | as vp          |
| edm  | alpha = 1             | sigmas[i]                           | sigma              | eps            |
| flow | alpha = 1 - sigma     | sigmas[i]                           | sigma              | eps - x0       |

References:
    Stochastic Interpolants: A Unifying Framework for Flows and Diffusions (2023), arXiv 2303.08797.
    Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364 (edm).
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .errors import UnsupportedScheduler

__all__ = [
    "Kind",
    "NoiseLevel",
    "Path",
    "Prediction",
    "family_name",
    "is_stochastic",
    "path_of",
    "prediction_coefficients",
    "probe",
    "trial_of",
    "wide",
]

Kind = Literal["vp", "ve", "edm", "flow"]
Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]

SINGULAR = 1e-8

_PROBED: WeakKeyDictionary[Any, tuple[tuple[Any, ...], "Path"]] = WeakKeyDictionary()


class NoiseLevel(NamedTuple):
    """One level of a path: ``sample = alpha x0 + sigma eps`` and ``output = p x0 + q eps``.

    All tensors have one shape (B, *).  Conversions compute in and return at least float32; float64 stays.
    The predictions are those of the network: what a scheduler clips or thresholds, it clips afterwards.

    Arguments:
        alpha: The signal scale, at least 0.
        sigma: The noise scale, at least 0.
        p: The share of x0 in the network's output.
        q: The share of eps in the network's output.
    """

    alpha: float
    sigma: float
    p: float
    q: float

    @property
    def log_snr(self) -> float:
        """The half log-SNR lambda = log(alpha / sigma); +inf at sigma = 0 and -inf at alpha = 0."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf

    @property
    def jacobian(self) -> float:
        """The determinant K = alpha q - sigma p; at 0 the output does not determine x0 and eps."""
        return self.alpha * self.q - self.sigma * self.p

    @property
    def x0_per_output(self) -> float:
        """The derivative d x0 / d output = -sigma / K at a fixed sample; ZeroDivisionError at K = 0."""
        return 1 / self.p if self.q == 0 else -self.sigma / self._regular()

    @property
    def eps_per_output(self) -> float:
        """The derivative d eps / d output = alpha / K at a fixed sample; ZeroDivisionError at K = 0."""
        return 1 / self.q if self.p == 0 else self.alpha / self._regular()

    def x0(self, output: Tensor, sample: Tensor) -> Tensor:
        """Returns x0 = (q sample - sigma output) / K; ZeroDivisionError at K = 0, unless output is x0."""
        if self.q == 0:
            return wide(output) / self.p
        jacobian = self._regular()
        return torch.sub(self.q / jacobian * wide(sample), wide(output), alpha=self.sigma / jacobian)

    def eps(self, output: Tensor, sample: Tensor) -> Tensor:
        """Returns eps = (alpha output - p sample) / K; ZeroDivisionError at K = 0, unless output is eps."""
        if self.p == 0:
            return wide(output) / self.q
        return (self.alpha * wide(output) - self.p * wide(sample)) / self._regular()

    def output(self, x0: Tensor, sample: Tensor) -> Tensor:
        """Returns the network's output p x0 + q eps for a given x0, where eps = (sample - alpha x0) / sigma.

        Raises:
            ZeroDivisionError: At sigma = 0, where the sample does not determine eps, if q is not 0.
        """
        x0 = wide(x0)
        if self.q == 0:
            return self.p * x0
        if self.sigma < SINGULAR:
            raise ZeroDivisionError("a sample without noise (sigma = 0) does not determine eps")
        return self.p * x0 + self.q * (wide(sample) - self.alpha * x0) / self.sigma

    def convert(self, output: Tensor, sample: Tensor, to: Prediction) -> Tensor:
        """Returns the same prediction in another parametrisation.

        Arguments:
            output: The network's output.
            sample: The noisy sample.
            to: ``"epsilon"``, ``"sample"`` (x0), ``"v_prediction"`` (alpha eps - sigma x0 in VP units) or
                ``"flow_prediction"`` (eps - x0).

        Raises:
            ZeroDivisionError: At K = 0.
            ValueError: If ``to`` is unknown.
        """
        p, q = prediction_coefficients(to, self.alpha, self.sigma)
        return p * self.x0(output, sample) + q * self.eps(output, sample)

    def _regular(self) -> float:
        if abs(self.jacobian) < SINGULAR:
            raise ZeroDivisionError(f"the output does not determine x0 and eps, K is 0: {self}")
        return self.jacobian


@dataclass(frozen=True)
class Path:
    """The noise levels that a scheduler goes through; `path_of` makes it, after ``set_timesteps``.

    ``path[i]`` is the level of the sample in the i-th solver update: i is ``scheduler.step_index``, or the
    number of calls of ``step`` so far (DDIM, DDPM, PNDM); ``path[len(path)]`` is the final level.

    The velocity of the probability-flow ODE in VP coordinates, with alpha = cos phi and sigma = sin phi, is

        dx/dt = alpha' x0 + sigma' eps = phi'(t) (alpha eps - sigma x0),  phi' = -alpha' / sigma

    and phi' = beta alpha / (2 sigma) with beta(t) = T beta_n, t = (n + 1) / T, for a table of T betas; alpha'
    is the slope of its alphas, so that t, alpha and beta agree to second order in 1 / T.

    Arguments:
        kind: The coordinates of the scheduler's sample, see the table of this module.
        prediction_type: What the network predicts; for EDM the sign of F; (p, q) of a level has the details.
        levels: The len(path) + 1 levels.
        scales: The factors of ``scale_model_input``.
        times: The time t of each level.
        turns: The rate phi'(t) of each level; 1 for edm and flow.
    """

    kind: Kind
    prediction_type: str
    levels: tuple[NoiseLevel, ...]
    scales: tuple[float, ...]
    times: tuple[float, ...]
    turns: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.levels) - 1

    def __getitem__(self, index: int) -> NoiseLevel:
        return self.levels[index]

    def input_scale(self, index: int) -> float:
        """Returns the factor by which ``scale_model_input`` multiplies the sample of the update ``index``."""
        return self.scales[index]

    def time(self, index: int) -> float:
        """Returns the time t of the level: in [0, 1] with noise at 1, or sigma for ``"edm"``.

        Levels noisier than the scheduler's table of betas (Stable Video Diffusion's sigma_max) have time 1.
        """
        return self.times[index]

    def velocity(self, index: int, x0: Tensor, eps: Tensor) -> Tensor:
        """Returns dx/dt of the probability-flow ODE; t is `time`, x is what `to_time_coordinates` returns.

        Arguments:
            index: The index of the level.
            x0: The predicted x0, with shape (B, *).
            eps: The predicted eps, with shape (B, *).

        Raises:
            ZeroDivisionError: At sigma = 0 of a VP model, where it is infinite.

        References:
            SADA: Stability-guided Adaptive Diffusion Acceleration (2025), arXiv 2507.17135.
        """
        x0, eps = wide(x0), wide(eps)
        if self.kind == "edm":
            return eps
        if self.kind == "flow":
            return eps - x0
        if math.isinf(self.turns[index]):
            raise ZeroDivisionError("the velocity of a VP model is infinite at sigma = 0")
        scale = self._time_scale(index)
        alpha, sigma = scale * self.levels[index].alpha, scale * self.levels[index].sigma
        return self.turns[index] * (alpha * eps - sigma * x0)

    def to_time_coordinates(self, index: int, sample: Tensor) -> Tensor:
        """Returns the x of `velocity` for a scheduler's sample, (B, *): VE ones divided by sqrt(1 + S^2)."""
        return wide(sample) * self._time_scale(index)

    def _time_scale(self, index: int) -> float:
        return self.scales[index] if self.kind == "ve" else 1.0


def path_of(scheduler: Any) -> Path:
    """Returns the path of a scheduler; call it after every ``set_timesteps``, of which it is a snapshot.

    Raises:
        UnsupportedScheduler: If its levels are not known, its settings contradict each other, it works on
            discrete tokens, or ``set_timesteps`` has not been called.
    """
    name = family_name(scheduler)
    ready = getattr(scheduler, "num_inference_steps", None) or getattr(scheduler, "custom_timesteps", False)
    if not ready:
        raise UnsupportedScheduler(f"{name} has no levels yet; call its set_timesteps first")
    return _FAMILIES[name](scheduler, name)


def family_name(scheduler: Any) -> str:
    """Returns the name of the class that tells how a scheduler keeps its levels: its own or that of a base.

    Raises:
        UnsupportedScheduler: If its levels are not known, or it works on discrete tokens.
    """
    name, supported = _known(scheduler, _FAMILIES), ", ".join(sorted(_FAMILIES))
    if name is None:
        what = _NOISY.get(_known(scheduler, _NOISY) or "", "has noise levels that are not known")
        raise UnsupportedScheduler(f"{type(scheduler).__name__} {what}; supported: {supported}")
    return name


def probe(scheduler: Any) -> Path:
    """Returns the path of ten steps of a scheduler, which is left as it is: what can be known before a call.

    It is worked out anew only where the scheduler's config or table has been replaced, since accelerators ask
    for it at each call of a pipeline.

    Raises:
        UnsupportedScheduler: As `path_of`.
    """
    made_of = getattr(scheduler, "config", None), getattr(scheduler, "alphas_cumprod", None)
    known, path = _PROBED.get(scheduler, ((), None))
    if path is None or any(old is not new for old, new in zip(known, made_of, strict=True)):
        path = path_of(trial_of(scheduler))
        _PROBED[scheduler] = made_of, path
    return path


def trial_of(scheduler: Any) -> Any:
    """Returns a copy of a scheduler, prepared for ten steps if it is of a kind that is known."""
    trial = copy.deepcopy(scheduler)
    if _known(trial, _FAMILIES):
        steps = min(getattr(trial, "grids", (10,)))  # FixedGridScheduler has no others
        options: dict[str, Any] = {"mu": 1.0} if _setting(trial, "use_dynamic_shifting") else {}
        if "intermediate_timesteps" in inspect.signature(trial.set_timesteps).parameters:
            options["intermediate_timesteps"] = None  # SCM's default is for two steps only
        trial.set_timesteps(steps, **options)
    return trial


def is_stochastic(scheduler: Any) -> str | None:
    """Returns why the updates of a scheduler inject noise, or None if they are deterministic.

    Only the object is inspected: the ``eta`` and ``s_churn`` of ``step`` are off unless set (except TCD's).
    """
    if name := _known(scheduler, _NOISY):
        return f"{name} {_NOISY[name]}"
    if str(_setting(scheduler, "algorithm_type")).startswith("sde"):
        return f"algorithm_type is {scheduler.config.algorithm_type!r}"
    if _setting(scheduler, "zeta"):
        return f"zeta is {scheduler.config.zeta}"
    if _setting(scheduler, "stochastic_sampling"):
        return "stochastic_sampling is on"
    if _setting(scheduler, "eta") and _setting(scheduler, "s_noise"):  # LTXEulerAncestralRF
        return f"eta is {scheduler.config.eta} and s_noise is {scheduler.config.s_noise}"
    return None


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32, or in its own type if that is wider."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _known(scheduler: Any, names: dict[str, Any]) -> str | None:
    """Returns the nearest base class that is listed by name, which needs no import of optional classes."""
    packages = ("diffusers", "diffaccel")
    bases = [base for base in type(scheduler).__mro__ if base.__module__.split(".")[0] in packages]
    return next((base.__name__ for base in bases if base.__name__ in names), None)


def _setting(scheduler: Any, key: str) -> Any:
    """Returns a setting that the scheduler itself has, or None; ``from_config`` keeps those of others too."""
    makers = [vars(base)["__init__"] for base in type(scheduler).__mro__ if "__init__" in vars(base)]
    own = any(key in inspect.signature(maker).parameters for maker in makers if maker is not object.__init__)
    return scheduler.config[key] if own else None


def prediction_coefficients(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Returns (p, q) of the output p x0 + q eps of a network that predicts in this way.

    Arguments:
        prediction: "epsilon", "sample", "v_prediction" or "flow_prediction".
        alpha: The signal scale.
        sigma: The noise scale.

    Raises:
        ValueError: If the prediction is unknown.
    """
    norm = math.hypot(alpha, sigma)
    table = {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "v_prediction": (-sigma / norm, alpha / norm),
        "flow_prediction": (-1.0, 1.0),
    }
    if prediction not in table:
        raise ValueError(f"unknown prediction type {prediction!r}; known: {', '.join(table)}")
    return table[prediction]


def _prediction(scheduler: Any, allowed: tuple[str, ...]) -> str:
    prediction = str(scheduler.config.prediction_type).removeprefix("original_")  # Euler: "original_sample"
    if prediction not in allowed:
        where = f"{type(scheduler).__name__} with these settings"
        raise UnsupportedScheduler(f"{where} takes {', '.join(allowed)}, not prediction_type {prediction!r}")
    return prediction


def _sigmas(scheduler: Any, name: str) -> list[float]:
    """Returns ``sigmas[i]`` of each update and the final one; two-stage solvers have mid-points at odd i."""
    sigmas = [float(sigma) for sigma in scheduler.sigmas.tolist()]
    if name == "KDPM2DiscreteScheduler":
        sigmas[1::2] = scheduler.sigmas_interpol.tolist()[1::2]
    elif name == "KDPM2AncestralDiscreteScheduler":
        sigmas[1::2] = scheduler.sigmas_interpol.tolist()[0::2]
    elif name == "DPMSolverSDEScheduler":
        sigmas[1::2] = np.sqrt(np.multiply(sigmas[0::2], sigmas[1::2])).tolist()
    return sigmas[: min(len(scheduler.timesteps), len(sigmas) - 1) + 1]


def _cumulative(scheduler: Any, name: str) -> list[float]:
    """Returns the alphas_cumprod of each update and the final one, which schedulers choose differently."""
    table = scheduler.alphas_cumprod.cpu().double().tolist()
    steps = [int(step) for step in scheduler.timesteps.tolist()]
    clean = 1.0
    if name == "TCDScheduler":
        steps.append(0)
    elif name in ("DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler", "UnCLIPScheduler"):
        steps.append(-1)
    else:
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        if name == "DDIMInverseScheduler":  # its timesteps are the targets of the updates
            clean = float(scheduler.initial_alpha_cumprod)
            steps = [min(step - stride, len(table) - 1) for step in steps] + steps[-1:]
        else:
            clean = float(scheduler.final_alpha_cumprod)
            steps.append(steps[-1] - stride)
    return [table[step] if step >= 0 else clean for step in steps]


def _vp_clock(scheduler: Any, phis: list[float]) -> tuple[list[float], list[float]]:
    """Returns t and phi'(t) for angles phi = atan2(sigma, alpha), from the scheduler's table of alphas."""
    alphas = np.sqrt(np.append(1.0, scheduler.alphas_cumprod.cpu().double().numpy()).clip(0, 1))
    knots = np.linspace(0, 1, len(alphas))
    times = np.interp(phis, np.arccos(alphas), knots)
    slopes = np.interp(times, knots, np.gradient(alphas, knots, edge_order=2))
    turns = [-slope / math.sin(phi) if phi > 0 else math.inf for slope, phi in zip(slopes, phis, strict=True)]
    return times.tolist(), [float(turn) for turn in turns]


def _assemble(
    kind: Kind, prediction: str, pairs: list[tuple[float, float]], clock: Any, sign: int = 1
) -> Path:
    outputs = [prediction_coefficients(prediction, *pair) for pair in pairs]
    levels = tuple(NoiseLevel(*pair, sign * p, sign * q) for pair, (p, q) in zip(pairs, outputs, strict=True))
    scales = tuple(1 / math.hypot(*pair) if kind == "ve" else 1.0 for pair in pairs)
    times, turns = clock([math.atan2(sigma, alpha) for alpha, sigma in pairs])
    return Path(kind, prediction, levels, scales, tuple(times), tuple(turns))


def _vp_model(scheduler: Any, kind: Kind, pairs: list[tuple[float, float]]) -> Path:
    prediction = _prediction(scheduler, ("epsilon", "sample", "v_prediction"))
    return _assemble(kind, prediction, pairs, lambda phis: _vp_clock(scheduler, phis))


def _table(scheduler: Any, name: str) -> Path:
    """Levels sqrt(abar), sqrt(1 - abar) with abar = alphas_cumprod[timesteps[i]]."""
    abars = _cumulative(scheduler, name)
    return _vp_model(scheduler, "vp", [(math.sqrt(abar), math.sqrt(1 - abar)) for abar in abars])


def _ve(scheduler: Any, name: str) -> Path:
    """Sample x / alpha at S = sigma / alpha of a VP model, to which scale_model_input leads back."""
    return _vp_model(scheduler, "ve", [(1.0, ratio) for ratio in _sigmas(scheduler, name)])


def _vp(scheduler: Any, name: str) -> Path:
    """VP sample at S = sigma / alpha, or a flow if use_flow_sigmas is on."""
    if _setting(scheduler, "use_flow_sigmas"):
        return _flow(scheduler, name)
    phis = [math.atan(ratio) for ratio in _sigmas(scheduler, name)]
    return _vp_model(scheduler, "vp", [(math.cos(phi), math.sin(phi)) for phi in phis])


def _flow(scheduler: Any, name: str) -> Path:
    """Sample (1 - t) x0 + t eps, output eps - x0; or turned round: output x0 - eps."""
    prediction, sigmas = "flow_prediction", _sigmas(scheduler, name)
    if _setting(scheduler, "prediction_type"):
        prediction = _prediction(scheduler, ("epsilon", "sample", "flow_prediction"))
    inverted = _setting(scheduler, "invert_sigmas")  # Mochi: sigmas rise to 1 at the data
    if inverted:
        sigmas = [1 - sigma for sigma in sigmas]
    if max(sigmas) > 1:
        raise UnsupportedScheduler(f"{name}: use_flow_sigmas with sigmas up to {max(sigmas):.3g}, above 1")
    sign = -1 if inverted or name == "MiniMaxH3Scheduler" else 1
    pairs = [(1 - sigma, sigma) for sigma in sigmas]
    return _assemble("flow", prediction, pairs, lambda phis: (sigmas, [1.0] * len(phis)), sign)


def _edm(scheduler: Any, name: str) -> Path:
    """Sample x0 + sigma eps, output F of x0 = c_skip sample + c_out F."""
    prediction, d = _prediction(scheduler, ("epsilon", "v_prediction")), scheduler.config.sigma_data
    sign = 1 if prediction == "epsilon" else -1  # of c_out
    sigmas = _sigmas(scheduler, name)
    scales = [1 / math.hypot(sigma, d) for sigma in sigmas]  # c_in
    # p = (1 - c_skip) / c_out, q = -c_skip sigma / c_out, c_skip = d^2 c_in^2, c_out = sign sigma d c_in
    pairs = zip(sigmas, scales, strict=True)
    levels = tuple(NoiseLevel(1.0, s, sign * s * c_in / d, -sign * d * c_in) for s, c_in in pairs)
    return Path("edm", prediction, levels, tuple(scales), tuple(sigmas), (1.0,) * len(sigmas))


def _unified(scheduler: Any, name: str) -> Path:
    """The nodes of our own schedulers; an analytic first step is made before the first evaluation."""
    prediction, first = scheduler.config.prediction_type, len(scheduler.levels) - len(scheduler.timesteps) - 1
    pairs = [(level.alpha, level.sigma) for level in scheduler.levels[first:]]
    if scheduler.path.is_flow:
        sigmas = [sigma for _, sigma in pairs]
        return _assemble("flow", prediction, pairs, lambda phis: (sigmas, [1.0] * len(phis)))
    return _assemble("vp", prediction, pairs, lambda phis: _vp_clock(scheduler, phis))


def _trig(scheduler: Any, name: str) -> Path:
    """Sample cos(phi) x0 + sin(phi) eps and output cos(phi) eps - sin(phi) x0, with t = 2 phi / pi."""
    if name == "SCMScheduler":  # eps has the standard deviation sigma_data
        phis = [float(phi) for phi in scheduler.timesteps.tolist()]
        pairs = [(math.cos(phi), math.sin(phi)) for phi in phis]
    else:
        pairs = list(zip(scheduler.alphas.tolist(), scheduler.betas.tolist(), strict=True))
    turn = math.pi / 2
    return _assemble(
        "vp", "v_prediction", pairs, lambda phis: ([phi / turn for phi in phis], [turn] * len(phis))
    )


_FAMILIES: dict[str, Callable[[Any, str], Path]] = {
    f"{name}Scheduler": family
    for family, names in {
        _table: "CogVideoXDDIM CogVideoXDPM DDIM DDIMInverse DDIMParallel DDPM DDPMParallel LCM PNDM "
        "TCD UnCLIP",
        _ve: "DPMSolverSDE EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete "
        "KDPM2Discrete LMSDiscrete",
        _vp: "DEISMultistep DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep SASolver "
        "UniPCMultistep",
        _flow: "AnchoredFlow FlowMapEulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM "
        "LTXEulerAncestralRF MiniMaxH3",
        _edm: "CosineDPMSolverMultistep EDMDPMSolverMultistep EDMEuler",
        _trig: "IPNDM SCM",
        _unified: "FixedGrid UnifiedSolver",
    }.items()
    for name in names.split()
}

_NOISY = {
    f"{name}Scheduler": reason
    for reason, names in {
        "is ancestral": "DDPM DDPMParallel DDPMWuerstchen EulerAncestralDiscrete KDPM2AncestralDiscrete "
        "RePaint UnCLIP",
        "solves an SDE": "CogVideoXDPM CosineDPMSolverMultistep DPMSolverSDE KarrasVe RFD4Proteina SASolver "
        "ScoreSdeVe ScoreSdeVp",
        "adds noise to its x0": "CMStochasticIterative ConsistencyDecoder FlowMatchLCM HeliosDMD LCM SCM",
        "adds noise unless step is called with eta=0": "TCD",
        "samples discrete tokens": "Amused BlockRefinement DiscreteDDIM EntropyBound VQDiffusion",
    }.items()
    for name in names.split()
}

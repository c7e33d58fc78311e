"""Where each of diffusers' schedulers, and ours, keeps its levels, and whether its updates are random."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import UnsupportedScheduler
from .path import Kind, NoiseLevel, Path, prediction_coefficients

__all__ = ["family_name", "is_stochastic", "path_of", "probe", "trial_of"]

_PROBED: WeakKeyDictionary[Any, tuple[tuple[Any, ...], Path]] = WeakKeyDictionary()


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

"""Where the nodes of a solver lie: grids of noise-to-signal ratios, from noisy to clean.

References:
    | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), equation 5
    | https://arxiv.org/abs/2206.00364
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..errors import OptionError, closest
from .paths import TrainingPath

__all__ = ["GRIDS", "grid", "karras"]

RHO = 7.0
STD = 0.5


def _uniform_time(count: int, path: TrainingPath) -> np.ndarray:
    """Equal steps of the training time, the last node a step away from clean."""
    times = np.linspace(path.last_time, path.first_time, count)
    return np.array([path.ratio(time) for time in times])


def _trailing(count: int, path: TrainingPath) -> np.ndarray:
    """Equal steps of the training time from the noisiest on, so that the last one ends at time 0."""
    times = path.last_time * np.arange(count, 0, -1) / count
    return np.array([path.ratio(max(time, path.first_time)) for time in times])


def karras(count: int, high: float, low: float, rho: float = RHO) -> np.ndarray:
    """Returns numbers from ``high`` to ``low`` in equal steps of their power 1 / rho."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), count) ** rho


def _log_snr(count: int, path: TrainingPath) -> np.ndarray:
    """Equal steps of the half log-SNR."""
    return np.exp(np.linspace(math.log(path.noisiest), math.log(path.smallest), count))


def _theta(count: int, path: TrainingPath) -> np.ndarray:
    """Equal steps of theta = atan(S / c), down to 0; or to the cleanest level that the network knows."""
    high = math.atan2(path.noisiest, STD)
    angles = np.linspace(high, max(high / count, math.atan2(path.smallest, STD)), count)
    return STD * np.tan(angles)


GRIDS: Mapping[str, Callable[[int, TrainingPath], np.ndarray]] = {
    "uniform": _uniform_time,
    "trailing": _trailing,
    "karras": lambda count, path: karras(count, path.noisiest, path.smallest),
    "log_snr": _log_snr,
    "theta": _theta,
}
"""The grids by name: nodes with an evaluation each; a last node at 0 follows them."""


def grid(name: str, count: int, path: TrainingPath) -> tuple[float, ...]:
    """Returns ``count`` falling ratios sigma / alpha, and 0.

    Arguments:
        name: One of ``GRIDS``.
        count: The number of evaluations, at least 1.
        path: The model's path.

    Raises:
        OptionError: If there is no such grid, or no grid with so many nodes.
    """
    if name not in GRIDS:
        raise OptionError(f"no grid {name!r}; {closest(name, GRIDS)}")
    if count < 1:
        raise OptionError(f"num_inference_steps is {count}; expected at least 1")
    sigmas = [float(sigma) for sigma in GRIDS[name](count, path)]
    return (*sigmas, 0.0)

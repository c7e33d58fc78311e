"""In which units a network counts noise, and what its output means: the border between models and one path.

A denoiser's posterior mean does not depend on the scale of its sample, so a network that was trained on one
path can be asked on any other: the sample x = alpha x0 + sigma eps is multiplied by
hypot(alpha_s, sigma_s) / hypot(alpha, sigma), where (alpha_s, sigma_s) is the level of the network's own path
with the same ratio sigma / alpha.

References:
    | Improving the Training of Rectified Flows (2024), arXiv 2405.20320, section on initialization
    | Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364 (EDM)
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedScheduler
from ..noise import path_of, prediction_coefficients

__all__ = ["Level", "Units", "units_of"]

_EDGE = 1e-5


class Level(NamedTuple):
    """Levels of a network's own path, each of shape (B).

    Arguments:
        timestep: What the network is given as time.
        alpha: The signal scale of its sample.
        sigma: The noise scale of its sample.
        scale: The factor from the sample to what the network is given.
        p: The share of x0 in its output.
        q: The share of eps in its output.
        beyond: Whether the level asked for has more noise than any that the network knows.
    """

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor
    scale: Tensor
    p: Tensor
    q: Tensor
    beyond: Tensor


class Units(ABC):
    """Where a network's own path has a level of the same ratio of noise to signal."""

    @abstractmethod
    def level(self, alpha: Tensor, sigma: Tensor) -> Level:
        """Returns the network's level for levels of any path.

        Arguments:
            alpha: Signal scales of shape (B), at least 0.
            sigma: Noise scales of shape (B), at least 0; not both may be 0.
        """

    @abstractmethod
    def time(self, part: Tensor) -> Tensor:
        """Returns the time t of the straight path, (B), at a part in [0, 1] of the network's own range.

        Uniform parts are uniform timesteps of the network.
        """


class FlowUnits(Units):
    """The straight path alpha = 1 - t, sigma = t; the network's time is offset + slope t.

    Arguments:
        offset: The network's time at t = 0.
        slope: The change of its time from t = 0 to t = 1.
        sign: 1 if it predicts eps - x0, -1 if it predicts x0 - eps.
    """

    def __init__(self, offset: float, slope: float, sign: int = 1) -> None:
        self.offset, self.slope, self.sign = offset, slope, sign

    def level(self, alpha: Tensor, sigma: Tensor) -> Level:
        """Returns the level, which is exact for every ratio."""
        t = sigma / (alpha + sigma)
        one = torch.ones_like(t)
        timestep = self.offset + self.slope * t
        return Level(timestep, 1 - t, t, one, -self.sign * one, self.sign * one, torch.zeros_like(t) > 0)

    def time(self, part: Tensor) -> Tensor:
        """Returns the part itself."""
        return part


class TableUnits(Units):
    """A variance-preserving path given by a table, at whole and at broken timesteps; EDM aside, all others.

    Between the entries log(sigma / alpha) is linear.  Beyond either end of the table, the level is that end.

    Arguments:
        alphas_cumprod: alpha^2 of the T timesteps, falling.
        prediction_type: "epsilon", "sample" or "v_prediction".

    Raises:
        UnsupportedScheduler: If the prediction is of another kind.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        squared = alphas_cumprod.detach().cpu().double().clamp_min(2.0**-24)  # as diffusers has it
        self.log_ratios = 0.5 * ((1 - squared) / squared).log()  # rises with the timestep
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise UnsupportedScheduler(f"prediction_type {prediction_type!r} has no table of betas")
        self.prediction_type = prediction_type
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def level(self, alpha: Tensor, sigma: Tensor) -> Level:
        """Returns the level, with a timestep between 0 and T - 1."""
        table = self._table(alpha)
        wanted = (sigma / alpha).log()
        place = wanted.clamp(table[0], table[-1])
        after = torch.searchsorted(table, place).clamp(1, len(table) - 1)
        low, high = table[after - 1], table[after]
        timestep = (after - 1) + (place - low) / (high - low)
        own_sigma, own_alpha = torch.sigmoid(2 * place).sqrt(), torch.sigmoid(-2 * place).sqrt()
        one, zero = torch.ones_like(place), torch.zeros_like(place)
        p, q = {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-own_sigma, own_alpha)}[
            self.prediction_type
        ]
        return Level(timestep, own_alpha, own_sigma, one, p, q, wanted > table[-1])

    def time(self, part: Tensor) -> Tensor:
        """Returns the time at the timestep part (T - 1), which may be broken."""
        table = self._table(part)
        place = part * (len(table) - 1)
        before = place.long().clamp(0, len(table) - 2)
        return torch.sigmoid(table[before] + (place - before) * (table[before + 1] - table[before]))

    def _table(self, like: Tensor) -> Tensor:
        place = (like.device, like.dtype)
        if place not in self._copies:  # a copy at each evaluation would wait for the device
            self._copies[place] = self.log_ratios.to(*place)
        return self._copies[place]


class EDMUnits(Units):
    """The path alpha = 1, sigma with the preconditioning of EDM, sigma at most 1e5.

    Arguments:
        sigma_data: The standard deviation of the data.
        prediction_type: "epsilon" or "v_prediction": the sign of F, as in diffusers.
    """

    def __init__(self, sigma_data: float, prediction_type: str) -> None:
        self.sigma_data, self.prediction_type = sigma_data, prediction_type
        prediction_coefficients(prediction_type, 1.0, 1.0)  # raises for an unknown one

    def level(self, alpha: Tensor, sigma: Tensor) -> Level:
        """Returns the level; with F = (x0 - c_skip x) / c_out, x = x0 + sigma eps."""
        noise = (sigma / alpha).clamp(_EDGE, 1 / _EDGE)
        data2, one = self.sigma_data**2, torch.ones_like(noise)
        norm = (noise.square() + data2).sqrt()
        c_skip, c_out = data2 / norm.square(), noise * self.sigma_data / norm
        if self.prediction_type == "v_prediction":
            c_out = -c_out
        p, q = (1 - c_skip) / c_out, -c_skip * noise / c_out
        return Level(noise.log() / 4, one, noise, 1 / norm, p, q, sigma / alpha > noise)

    def time(self, part: Tensor) -> Tensor:
        """Returns the time at sigma = 0.002 to 80, of which the logarithm goes with the part."""
        return torch.sigmoid(math.log(0.002) + part * math.log(80 / 0.002))


def units_of(scheduler: Any, early: tuple[float, float], late: tuple[float, float], sign: int) -> Units:
    """Returns the units of a network whose pipeline has this scheduler.

    Arguments:
        scheduler: The scheduler, after ``set_timesteps``.
        early: The sigma of a step and what the network was given as time.
        late: The same of a later step.
        sign: -1 if the pipeline gives the scheduler the negative of what the network predicts.

    Raises:
        UnsupportedScheduler: If its levels are not known.
    """
    path, name = path_of(scheduler), type(scheduler).__name__
    if path.kind == "flow":
        return FlowUnits(*_line(int(scheduler.config.num_train_timesteps), early, late), sign)
    if sign != 1:
        raise UnsupportedScheduler(f"the pipeline negates predictions, for {name}, not a flow")
    if path.kind == "edm":
        return EDMUnits(float(scheduler.config.sigma_data), str(scheduler.config.prediction_type))
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UnsupportedScheduler(f"{name} has no table of betas")
    return TableUnits(table, str(scheduler.config.prediction_type).removeprefix("original_"))


def _line(length: int, early: tuple[float, float], late: tuple[float, float]) -> tuple[float, float]:
    """Returns offset and slope of a network's time: one of the known ones, as schedulers may round it."""
    for slope in (length, 1, -length, -1):
        offset = max(0, -slope)
        rounding = 1 if abs(slope) == length else 2 / length
        if all(abs(offset + slope * sigma - time) <= rounding for sigma, time in (early, late)):
            return float(offset), float(slope)
    raise UnsupportedScheduler(
        f"the network is given the times {early[1]:g} and {late[1]:g} at the noise levels {early[0]:g} and "
        f"{late[0]:g}; expected t or 1 - t, or {length} times that"
    )

"""The path that a model was trained on, as a map between its time and the ratio sigma / alpha."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, UnsupportedScheduler
from .exponential import Level

__all__ = ["LARGEST", "TrainingPath", "betas_of", "flow_settings"]

LARGEST = 1e6
"""The ratio that stands for pure noise, where alpha is 0."""


@dataclass(frozen=True)
class TrainingPath:
    """A variance-preserving path with a table of alphas, or the straight path of flow matching.

    Arguments:
        steps: The number of training timesteps T.
        alphas_cumprod: The table of alpha^2 at the timesteps 0 .. T - 1; None for flow matching.
    """

    steps: int
    alphas_cumprod: Sequence[float] | None = None

    @property
    def is_flow(self) -> bool:
        """Whether it is the straight path."""
        return self.alphas_cumprod is None

    @property
    def name(self) -> str:
        """What tells paths from another: "flow", or "vp" with its largest ratio."""
        return "flow" if self.is_flow else f"vp {self.largest:.4g}"

    @cached_property
    def _logs(self) -> np.ndarray:
        """The logarithms of the table's ratios."""
        abar = np.clip(np.asarray(self.alphas_cumprod, dtype=np.float64), 1 / (1 + LARGEST**2), 1 - 1e-15)
        return 0.5 * np.log((1 - abar) / abar)

    @property
    def first_time(self) -> float:
        """The time of the cleanest level that the network knows."""
        return 1.0 if self.is_flow else 0.0

    @property
    def last_time(self) -> float:
        """The time of the noisiest level."""
        return float(self.steps if self.is_flow else self.steps - 1)

    @property
    def largest(self) -> float:
        """The largest ratio."""
        return self.ratio(self.last_time)

    @property
    def noisiest(self) -> float:
        """The first ratio of grids; on the straight path, which begins at pure noise, a timestep later."""
        return self.ratio(self.steps - 1)

    @property
    def smallest(self) -> float:
        """The smallest ratio of a network's evaluation."""
        return self.ratio(self.first_time)

    def ratio(self, time: float) -> float:
        """Returns sigma / alpha at a training time, whole or not; the table's logarithms are interpolated."""
        if self.is_flow:
            sigma = time / self.steps
            return min(sigma / (1 - sigma), LARGEST) if sigma < 1 else LARGEST
        return float(np.exp(np.interp(time, np.arange(self.steps), self._logs)))

    def time(self, ratio: float) -> float:
        """Returns the training time of a ratio, within the table."""
        if self.is_flow:
            return self.steps * (1.0 if ratio >= LARGEST else ratio / (1 + ratio))
        return float(np.interp(math.log(max(ratio, 1e-30)), self._logs, np.arange(self.steps)))

    def level(self, ratio: float) -> Level:
        """Returns alpha and sigma of the model's samples at a ratio."""
        if self.is_flow:
            return Level(1 / (1 + ratio), ratio / (1 + ratio))
        scale = math.hypot(1.0, ratio)
        return Level(1 / scale, ratio / scale)


def flow_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns what schedulers of flow matching leave unsaid in their configuration: the prediction type.

    Arguments:
        config: The configuration of any scheduler, possibly without the name of its class.

    Raises:
        UnsupportedScheduler: If its path is neither variance-preserving nor straight, or is turned round.
    """
    maker = str(config.get("_class_name", ""))
    if "sigma_data" in config or config.get("invert_sigmas") or maker.startswith(("IPNDM", "MiniMaxH3")):
        raise UnsupportedScheduler(
            f"the settings of {maker or 'this scheduler'} are for another path (EDM, trigonometric, inverted "
            "sigmas); UnifiedSolverScheduler knows the variance-preserving and the straight one"
        )
    if config.get("thresholding"):
        raise UnsupportedScheduler(
            f"{maker or 'this scheduler'} has dynamic thresholding, which is not known here"
        )
    silent = "shift" in config and "beta_schedule" not in config and "prediction_type" not in config
    flow = silent or maker.startswith(("FlowMatch", "FlowMap", "LTXEuler"))
    return {"prediction_type": "flow_prediction"} if flow else {}


def betas_of(count: int, start: float, end: float, kind: str, trained: Any, zero_snr: bool) -> Tensor:
    """Returns the table of betas (T), float64.

    Arguments:
        count: The number T of training timesteps.
        start: The first beta.
        end: The last beta.
        kind: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained: The betas themselves, or None.
        zero_snr: Whether to rescale them so that the last level is pure noise (arXiv 2305.08891, algorithm
            1).

    Raises:
        OptionError: If the kind is unknown, or the betas are not between 0 and 1.
    """
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        times = torch.arange(count + 1, dtype=torch.float64) / count
        bars = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bars[1:] / bars[:-1]).clamp(max=0.999)
    else:
        raise OptionError(f"no beta_schedule {kind!r}; known: linear, scaled_linear, squaredcos_cap_v2")
    if len(betas) != count or not bool(((betas > 0) & (betas <= 1)).all()):
        raise OptionError(f"{len(betas)} betas from {float(betas.min())} to {float(betas.max())}; "
                          f"expected {count} between 0 and 1")  # fmt: skip
    if not zero_snr:
        return betas
    roots = (1 - betas).cumprod(0).sqrt()
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    bars = roots**2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])

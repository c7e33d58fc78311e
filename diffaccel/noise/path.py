"""The noise levels of a path, and what a network's output says of x0 and eps at one of them."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Kind", "NoiseLevel", "Path", "Prediction", "prediction_coefficients", "wide"]

Kind = Literal["vp", "ve", "edm", "flow"]
Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]

SINGULAR = 1e-8


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
        kind: The coordinates of the scheduler's sample, see the table of `diffaccel.noise`.
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


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32, or in its own type if that is wider."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

r"""One step of an exponential integrator, as a linear combination of what is known.

From a node s to a node t, with ratios S = sigma / alpha, lambda = -log S, h = lambda_t - lambda_s, and
derivatives f^(k) of the predicted quantity at s (orders n, k < n):

.. math::
    \text{eps}: x_t &= \frac{\alpha_t}{\alpha_s} x_s - \sigma_t \sum_k h^{k+1} \varphi_{k+1}(h) f^{(k)} \\
    \text{x0}: x_t &= \frac{\sigma_t}{\sigma_s} e^{-\zeta^2 h} x_s
        + \alpha_t c \sum_k h^{k+1} \varphi_{k+1}(-c h) f^{(k)} + \sigma_t \sqrt{1 - e^{-2 \zeta^2 h}} z,
        \quad c = 1 + \zeta^2 \\
    \text{theta}: v_t &= v_s - \sum_k \frac{(\theta_t - \theta_s)^{k+1}}{(k+1)!} F^{(k)}

In the third, theta = atan(S / c) for data of standard deviation c, v = x / (alpha sqrt(c^2 + S^2)) and
F = sin(theta) x0 / c - cos(theta) eps: exact in one step for Gaussian data, and regular at S = 0.

Derivatives are estimated from other nodes j: a solves sum_j a_j (z_j - z_s)^q / q! = [q = k], q = 1..m, and
f^(k) = sum_j a_j (f_j - f_s).

References:
    | A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (2024)
    | https://arxiv.org/abs/2312.07243

    | DPM-Solver++ (2022), https://arxiv.org/abs/2211.01095; UniPC (2023), https://arxiv.org/abs/2302.04867
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .schedule import Step

__all__ = ["Combination", "Level", "combine", "phi"]


@dataclass(frozen=True)
class Level:
    """A noise level: sample = alpha x0 + sigma eps.

    Arguments:
        alpha: The signal scale, above 0.
        sigma: The noise scale, at least 0.
    """

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """S = sigma / alpha."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> float:
        """The half log-SNR, lambda = -log S; infinite at S = 0."""
        return -math.log(self.ratio) if self.sigma else math.inf


class Combination(NamedTuple):
    """A step as numbers: x_t = sample x_s + sum_j (x0[j] x0_j + eps[j] eps_j) + noise z.

    Arguments:
        sample: The factor of the start node's sample.
        x0: The factors of the nodes' x0.
        eps: The factors of the nodes' eps.
        noise: The factor of fresh noise.
    """

    sample: float
    x0: list[float]
    eps: list[float]
    noise: float


def phi(k: int, z: float) -> float:
    """Returns phi_k(z), where phi_0 = exp(z), phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z and phi_k(0) = 1 / k!.

    Arguments:
        k: At least 0.
        z: Any finite number.
    """
    if abs(z) < 2:  # the recurrence would cancel
        return math.fsum(z**j / math.factorial(j + k) for j in range(30))
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def combine(step: Step, nodes: Sequence[Level], target: Level, order: int, zeta: float = 0.0,
            std: float = 0.5, scaled: bool = True) -> Combination:  # fmt: skip
    """Returns the step from a node to the target.

    Arguments:
        step: The decisions; its order is replaced by ``order``.
        nodes: The known nodes, newest first; ``step.start`` counts them.
        target: The level to reach.
        order: The Taylor order, at most the number of nodes.
        zeta: The noise scale: 0 for the ODE, 1 for the reverse SDE; only for the prediction "sample".
        std: The data's standard deviation c of the prediction "theta".
        scaled: Whether the first derivative is scaled as the step says.
    """
    start = nodes[step.start]
    others = _active(step, len(nodes), max(order - 1, step.estimate if order > 1 else 0))
    position = [_position(step.prediction, node, std) for node in nodes]
    origin, end = position[step.start], _position(step.prediction, target, std)
    factor, weights = _taylor(step.prediction, start, target, end - origin, order, zeta, std)
    if scaled and order > 1:
        weights[1] *= _scaling(step, end - origin, zeta)
    if order > 2:
        weights[2] *= step.damping
    shares = np.zeros(len(nodes))
    shares[step.start] = weights[0]
    for k in range(1, order):
        count = max(k, step.estimate or order - 1) if k == 1 else order - 1
        chosen = others[:count]
        if chosen:
            estimate = _stencil(np.array([position[j] - origin for j in chosen]), k)
            shares[chosen] += weights[k] * estimate
            shares[step.start] -= weights[k] * estimate.sum()
    parts = [_parts(step.prediction, node, std) for node in nodes]
    noise = target.sigma * math.sqrt(-math.expm1(-2 * zeta**2 * (end - origin))) if zeta else 0.0
    x0 = [float(share * part[0]) for share, part in zip(shares, parts, strict=True)]
    eps = [float(share * part[1]) for share, part in zip(shares, parts, strict=True)]
    if scaled and len(step.corrections) <= 2 * len(nodes):  # fewer nodes after a start in mid-schedule
        for place, (more_x0, more_eps) in enumerate(
            zip(step.corrections[::2], step.corrections[1::2], strict=True)
        ):
            x0[place] += target.alpha * more_x0
            eps[place] += target.alpha * more_eps
    return Combination(factor, x0, eps, noise)


def _active(step: Step, count: int, needed: int) -> list[int]:
    """Returns the nodes of the stencil: those that the step names, or the newest beside the start."""
    if step.points is not None:
        named = [j for j in step.points if j < count and j != step.start]
        if len(named) >= needed:
            return named[:needed]
    return [j for j in range(count) if j != step.start][:needed]


def _position(prediction: str, level: Level, std: float) -> float:
    return math.atan2(level.ratio, std) if prediction == "theta" else level.log_snr


def _parts(prediction: str, level: Level, std: float) -> tuple[float, float]:
    """Returns how x0 and eps make up the predicted quantity at a node."""
    if prediction == "theta":
        theta = math.atan2(level.ratio, std)
        return math.sin(theta) / std, -math.cos(theta)
    return (1.0, 0.0) if prediction == "sample" else (0.0, 1.0)


def _taylor(prediction: str, start: Level, target: Level, h: float, order: int, zeta: float,
            std: float) -> tuple[float, list[float]]:  # fmt: skip
    """Returns the factor of the sample, and those of the derivatives."""
    if prediction == "theta":
        scale = target.alpha * math.hypot(std, target.ratio)
        weights = [-scale * h ** (k + 1) / math.factorial(k + 1) for k in range(order)]
        return scale / (start.alpha * math.hypot(std, start.ratio)), weights
    if prediction == "epsilon":
        first = -target.alpha * (start.ratio - target.ratio)  # -sigma_t (e^h - 1), also at S = 0
        rest = [-target.sigma * h ** (k + 1) * phi(k + 1, h) for k in range(1, order)]
        return target.alpha / start.alpha, [first, *rest]
    if math.isinf(h):  # the last step to S = 0
        return 0.0, [target.alpha]
    c = 1 + zeta**2
    weights = [target.alpha * c * h ** (k + 1) * phi(k + 1, -c * h) for k in range(order)]
    return target.sigma / start.sigma * math.exp(-(zeta**2) * h), weights


def _stencil(distances: np.ndarray, k: int) -> np.ndarray:
    """Returns the weights that estimate the k-th derivative from differences to the start."""
    powers = np.arange(1, len(distances) + 1)[:, None]
    factorials = np.array([math.factorial(q) for q in range(1, len(distances) + 1)], dtype=float)[:, None]
    return np.linalg.solve(distances**powers / factorials, (powers[:, 0] == k).astype(float))


def _scaling(step: Step, h: float, zeta: float) -> float:
    """Returns the factor of the first derivative, 1 + O(h); with noise, too, bh2 is the midpoint rule."""
    z = -(1 + zeta**2) * h if step.prediction == "sample" else h
    if step.scaling == "bh1":
        return 0.5 * z**2 / (math.expm1(z) - z)
    if step.scaling == "bh2":
        return 0.5 * z * math.expm1(z) / (math.expm1(z) - z)
    return 1 + step.relaxation * h

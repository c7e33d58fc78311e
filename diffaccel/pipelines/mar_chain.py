r"""The steps of a token head: respaced ancestral diffusion, or Euler steps of a flow, as numbers.

Both are :math:`x \leftarrow a x + b o + \tau e^{\lambda / 2} n` with the head's output o, noise n and the
temperature :math:`\tau`.  A diffusion step from level :math:`\bar\alpha_t` to :math:`\bar\alpha_s`, with
:math:`\alpha = \bar\alpha_t / \bar\alpha_s` and :math:`\beta = 1 - \alpha`, has :math:`a = \alpha^{-1/2}`,
:math:`b = -\beta \alpha^{-1/2} (1 - \bar\alpha_t)^{-1/2}`, and :math:`\lambda` between
:math:`\log \beta (1 - \bar\alpha_s) / (1 - \bar\alpha_t)` and :math:`\log \beta` (arXiv 2102.09672, eq. 15).

References:
    | Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021)
    | https://arxiv.org/abs/2102.09672
    | DiSA: Diffusion Step Annealing in Autoregressive Image Generation (Zhao et al., 2025)
    | https://arxiv.org/abs/2505.20297
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError

__all__ = ["ChainStep", "alphas_cumprod", "chain", "diffusion_timesteps", "predicted_spread", "run_chain"]

OFFSET = 0.008


@dataclass(frozen=True)
class ChainStep:
    """One step of a head: ``x <- keep x + weight output + noise``.

    Arguments:
        timestep: What the head is told, in 0 ... 1000.
        alpha: The share of the token in x.
        sigma: The share of the noise in x.
        keep: The factor a of x.
        weight: The factor b of the output.
        small: The least log-variance of the noise; -inf for none.
        large: The largest one.
        flow: Whether the output is the velocity noise - token, and not the noise.
    """

    timestep: float
    alpha: float
    sigma: float
    keep: float
    weight: float
    small: float = -math.inf
    large: float = -math.inf
    flow: bool = False

    def token(self, sample: Tensor, output: Tensor) -> Tensor:
        """Returns the token x0 that the output (R, c) predicts for a sample (R, c)."""
        if self.flow:
            return sample - self.sigma * output
        return (sample - self.sigma * output) / self.alpha

    def deviation(self, variance: Tensor | float) -> Tensor | float:
        """Returns the noise's standard deviation; ``variance`` is 0 for the small and 1 for the large one."""
        if isinstance(variance, Tensor):
            return (0.5 * (variance * self.large + (1 - variance) * self.small)).exp()
        return math.exp(0.5 * (self.large if variance == 1 else self.small))


@functools.cache
def alphas_cumprod(count: int = 1000) -> tuple[float, ...]:
    """Returns the levels of the cosine schedule, "squaredcos_cap_v2" of diffusers, in double precision."""

    def signal(u: float) -> float:
        return math.cos((u + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    product, levels = 1.0, []
    for i in range(count):
        product *= 1 - min(1 - signal((i + 1) / count) / signal(i / count), 0.999)
        levels.append(product)
    return tuple(levels)


def diffusion_timesteps(steps: int, count: int = 1000, start: int = 950) -> list[int]:
    r"""Returns :math:`\min(\mathrm{round}(i (T - 1) / (n - 1)), start)`, falling and without repetition.

    The clip is that of the official sampler (arXiv 2505.20297): at the end of the cosine schedule an error of
    the noise is multiplied by thousands.

    Arguments:
        steps: The number n of steps before the clip.
        count: The number T of levels.
        start: The largest timestep.

    Raises:
        OptionError: If there are fewer than 2 steps: one step would take pure noise for a token.
    """
    if steps < 2:
        raise OptionError(f"a diffusion head needs 2 steps or more, not {steps}")
    return sorted({min(round(i * (count - 1) / (steps - 1)), start) for i in range(steps)}, reverse=True)


@functools.cache
def chain(kind: str, steps: int, count: int = 1000, start: int = 950) -> tuple[ChainStep, ...]:
    """Returns the steps of a head, noisiest first.

    Arguments:
        kind: "diffusion", for a head that predicts noise, or "flow", for one that predicts velocity.
        steps: The number of steps; a diffusion has fewer where the clip makes some equal.
        count: The number of levels of the diffusion.
        start: The largest timestep of the diffusion.

    Raises:
        OptionError: If the number of steps is too small.
    """
    if kind == "flow":
        if steps < 1:
            raise OptionError(f"a flow head needs 1 step or more, not {steps}")
        times = [1 - i / steps for i in range(steps)]
        return tuple(ChainStep(1000 * t, 1 - t, t, 1.0, -1 / steps, flow=True) for t in times)
    grid, levels = diffusion_timesteps(steps, count, start), alphas_cumprod(count)
    pairs = zip(grid, [*(levels[t] for t in grid[1:]), 1.0], strict=True)
    return tuple(_diffusion_step(t, levels[t], after) for t, after in pairs)


def _diffusion_step(timestep: int, now: float, after: float) -> ChainStep:
    alpha = now / after
    beta = 1 - alpha
    step = ChainStep(
        timestep, math.sqrt(now), math.sqrt(1 - now), 1 / math.sqrt(alpha),
        -beta / math.sqrt(alpha * (1 - now)),
    )  # fmt: skip
    if after == 1:
        return step  # nothing is added at the end
    small, large = math.log(beta * (1 - after) / (1 - now)), math.log(beta)
    return ChainStep(step.timestep, step.alpha, step.sigma, step.keep, step.weight, small, large)


def run_chain(
    predict: Callable[[Tensor, float], Tensor],
    steps: Sequence[ChainStep],
    noise: Tensor,
    variance: float | None = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, float]:
    """Draws tokens.

    Arguments:
        predict: The head with its condition and guidance: from x with shape (R, c) and a timestep to the
            output, with shape (R, c), or (R, 2 c) with a learned variance.
        steps: The steps.
        noise: The first sample and the noise of all steps but the last, with shape (1 or more, R, c).
        variance: 0 for the small variance, 1 for the large one, None for the learned one.
        temperature: The factor of the noise of the steps.

    Returns:
        The tokens (R, c), and their `predicted_spread` (NaN for a single step).
    """
    sample, first, middle = noise[0], noise[0], _middle(steps)
    spread = math.nan
    for number, step in enumerate(steps):
        output = predict(sample, step.timestep).to(sample.dtype)
        share: Tensor | float = 0.0 if variance is None else variance
        if variance is None:
            output, raw = output.chunk(2, dim=-1)
            share = (raw + 1) / 2
        if number == 0:
            first = step.token(sample, output)
        elif number == middle:
            spread = predicted_spread(step, step.token(sample, output) - first)
        sample = step.keep * sample + step.weight * output
        if step.large > -math.inf:
            sample = sample + temperature * step.deviation(share) * noise[number + 1]
    return sample, spread


def predicted_spread(step: ChainStep, movement: Tensor) -> float:
    r"""Returns the standard deviation of tokens given their condition, read from a head's own predictions.

    At the noisiest step the predicted token is the conditional mean.  Where signal and noise are equal it has
    moved, with the variance :math:`m = \alpha^2 s^4 / (\alpha^2 s^2 + \sigma^2)` if the token is normal with
    standard deviation s.  This is solved for s, with the mean square of the movement as m.

    Arguments:
        step: The step, next to where signal and noise are equal.
        movement: The difference of the predicted tokens to those of the first step, with shape (R, c).
    """
    moved = movement.double().square().mean().item()
    a2, s2 = step.alpha**2, step.sigma**2
    return math.sqrt((moved * a2 + math.sqrt((moved * a2) ** 2 + 4 * a2 * moved * s2)) / (2 * a2))


def _middle(steps: Sequence[ChainStep]) -> int:
    """Returns the step after the first whose signal and noise are the most equal; 0 if there is none."""
    return min(range(1, len(steps)), key=lambda i: abs(steps[i].alpha - steps[i].sigma), default=0)


def levels_of(timestep: Tensor, count: int = 1000) -> Tensor:
    """Returns the cumulative products of the timesteps (R), in double precision."""
    return torch.tensor(alphas_cumprod(count), dtype=torch.float64, device=timestep.device)[timestep]

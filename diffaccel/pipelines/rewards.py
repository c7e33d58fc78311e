r"""Tilting by a reward: the target q(x) exp(beta r(x)), for any callable reward, and rewards of pictures.

At every level the reward of the predicted x0 stands for that of the sample, r_t(x) = r(x0(x)), with the
strength beta_t = scale / (1 + S^2), S = sigma / alpha, which is 0 in pure noise; at the last evaluation,
whose x0 is the result, it is the full scale.  The potential enters the log-weights by its differences, which
telescope: whatever r_t is, the final weights hold scale * r(result) and nothing else.

With the gradient, the noise z of a step is shifted by h = sqrt(v) beta_t' grad r(x0) / (1 + S'^2), where v is
the variance of the step in units of x0, and log N(z + h; 0, I) - log N(z + h; h, I) = -|h|^2 / 2 - <h, z> is
added to the log-weights: the exact ratio of the two kernels, so that the gradient may be any guess.  The
guess is exact for data of N(m, I), where d x0 / dx = 1 / (1 + S^2) in units of x0.

References:
    Feynman-Kac Correctors in Diffusion (2025), arXiv 2503.02819, Proposition 3.4.  Shifting by the whole
    gradient instead of its half makes the noise of the two contributions to the weight cancel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, UnsupportedPipeline
from ..noise import NoiseLevel

__all__ = ["Reward", "Tilt", "image_reward"]

Reward = Callable[[Tensor], Tensor]
"""A function from x0 in the scheduler's coordinates, (n, *), to n numbers."""


@dataclass(frozen=True)
class Tilt:
    """A reward and how strongly it counts.

    Arguments:
        reward: The reward.
        scale: What it is multiplied by.
        gradient: Whether the steps follow its gradient, too.

    Raises:
        OptionError: If the scale is not a finite number.
    """

    reward: Reward
    scale: float = 1.0
    gradient: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise OptionError(f"reward_scale is {self.scale}; expected a finite number")

    def strength(self, level: NoiseLevel) -> float:
        """Returns beta at a level: from 0 in pure noise to the scale without noise."""
        return self.scale * _share(level)

    def values(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the rewards (n), without the scale, and their gradient (n, *) if it is wanted.

        Raises:
            OptionError: If the reward does not return n finite numbers, or has no gradient.
        """
        with torch.set_grad_enabled(self.gradient):  # pipelines run without
            given = x0.detach().clone().requires_grad_(self.gradient)
            found = self.reward(given)
            if not isinstance(found, Tensor) or found.numel() != len(x0) or not bool(found.isfinite().all()):
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise OptionError(
                    f"the reward of {len(x0)} samples must be {len(x0)} finite numbers, not {what}"
                )
            value = found.detach().flatten().to(x0)
            if not self.gradient:
                return value, None
            if not found.requires_grad:
                raise OptionError("the reward is not differentiable in x0; use reward_gradient=False")
            return value, torch.autograd.grad(found.sum(), given)[0]

    def shift(self, gradient: Tensor, target: NoiseLevel, noise: float) -> Tensor:
        """Returns the shift h of a step's standard normal noise, (n, *).

        Arguments:
            gradient: The gradient of the reward at x0, with shape (n, *).
            target: The level that the step reaches.
            noise: The standard deviation of the step's noise, in the coordinates of the sample.
        """
        return noise / target.alpha * self.strength(target) * _share(target) * gradient


def _share(level: NoiseLevel) -> float:
    """Returns 1 / (1 + S^2): the part of the variance of a noisy sample of N(0, I) that is signal."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def image_reward(pipe: Any, reward: Reward) -> Reward:
    """Returns a reward of predicted latents, from one of pictures: they are decoded first.

    Arguments:
        pipe: A pipeline whose ``vae`` takes latents (n, C, h, w) scaled by a factor, perhaps shifted; or one
            without, whose samples are pictures in [-1, 1].
        reward: A function from pictures (n, 3, H, W) in [0, 1] to n numbers.

    Raises:
        UnsupportedPipeline: If the latents are normalized, or later packed, in ways that are not known here.
    """
    vae, name = getattr(pipe, "vae", None), type(pipe).__name__
    if vae is None:
        return lambda x0: reward((x0 / 2 + 0.5).clamp(0, 1))
    config = vae.config
    if getattr(config, "latents_mean", None) is not None or getattr(config, "scaling_factor", None) is None:
        raise UnsupportedPipeline(
            f"how {name} scales its latents is not known; write a reward that decodes them"
        )
    scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0

    def decoded(x0: Tensor) -> Tensor:
        if x0.ndim != 4 or x0.shape[1] != config.latent_channels:
            raise UnsupportedPipeline(
                f"the latents of {name}, {tuple(x0.shape)}, are packed; write a reward that decodes them"
            )
        images = vae.decode((x0 / scale + shift).to(vae.dtype)).sample
        return reward((images.to(x0.dtype) / 2 + 0.5).clamp(0, 1))

    return decoded

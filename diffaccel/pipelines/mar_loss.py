r"""What MAR is trained on: the error of the head at masked tokens, per token row.

For a noise head :math:`\frac1c |\epsilon - \hat\epsilon|^2`, with a learned variance plus the variational
bound in bits per dimension, in which :math:`\hat\epsilon` is a constant (arXiv 2102.09672, 3.1); for a
velocity head :math:`\frac1c |n - x_0 - \hat v|^2` (arXiv 2209.03003).

References:
    | Autoregressive Image Generation without Vector Quantization (Li et al., 2024)
    | https://arxiv.org/abs/2406.11838
    | Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021)
    | https://arxiv.org/abs/2102.09672
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .mar_chain import levels_of
from .mar_head import MARHead

__all__ = ["draw_mask_ratio", "draw_times", "head_loss"]

LOWEST, STD = 0.7, 0.25
BIN = 1 / 255  # half the width of a byte in [-1, 1]


def draw_mask_ratio(generator: torch.Generator) -> float:
    """Returns a part of tokens to mask: normal with mean 1 and deviation 0.25, truncated to [0.7, 1]."""
    while True:
        ratio = 1 - STD * abs(torch.randn((), generator=generator).item())
        if ratio >= LOWEST:
            return ratio


def draw_times(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Returns ``n`` times: uniform timesteps of a diffusion, logit-normal ones in 0 ... 1000 of a flow."""
    if kind == "flow":
        return 1000 * torch.randn(n, generator=generator).sigmoid().clamp(1e-4, 1 - 1e-4)
    return torch.randint(1000, (n,), generator=generator)


def head_loss(
    kind: str, head: MARHead, tokens: Tensor, condition: Tensor, times: Tensor, noise: Tensor
) -> Tensor:
    """Returns the loss of each row, with shape (R).

    Arguments:
        kind: "diffusion" or "flow".
        head: The head.
        tokens: The true tokens x0, with shape (R, c).
        condition: The trunk's conditions z, with shape (R, D).
        times: The times as `draw_times` gives them, with shape (R).
        noise: The noise, with shape (R, c).
    """
    if kind == "flow":
        t = (times / 1000)[:, None]
        output = head((1 - t) * tokens + t * noise, times, head.embed(condition))
        return (output.float() - (noise - tokens)).square().mean(-1)
    level = levels_of(times)[:, None]
    noisy = (level.sqrt().float() * tokens + (1 - level).sqrt().float() * noise).to(tokens.dtype)
    output = head(noisy, times, head.embed(condition)).float()
    if output.shape[-1] == tokens.shape[-1]:
        return (output - noise).square().mean(-1)
    output, raw = output.chunk(2, dim=-1)
    bound = _variational_bound(tokens, noisy, output.detach(), (raw + 1) / 2, times)
    return (output - noise).square().mean(-1) + bound


def _variational_bound(tokens: Tensor, noisy: Tensor, output: Tensor, share: Tensor, times: Tensor) -> Tensor:
    """Returns the bound's term of each row in bits per dimension: a KL, or at t = 0 a likelihood of bytes."""
    now = levels_of(times)[:, None]
    after = torch.where(times[:, None] > 0, levels_of((times - 1).clamp(min=0))[:, None], 1.0)
    alpha = now / after
    beta = 1 - alpha
    # at t = 0 the posterior is exact; its variance is taken from t = 1, as in the official code
    first, second = levels_of(torch.tensor([0, 1])).tolist()
    floor = (1 - second / first) * (1 - first) / (1 - second)
    small = torch.where(times[:, None] > 0, beta * (1 - after) / (1 - now), floor).log()
    log_variance = (share * beta.log() + (1 - share) * small).float()
    to_token, to_noisy = after.sqrt() * beta / (1 - now), alpha.sqrt() * (1 - after) / (1 - now)
    predicted = (noisy - (1 - now).sqrt() * output) / now.sqrt()
    mean, guess = ((to_token * x0 + to_noisy * noisy).float() for x0 in (tokens, predicted))
    small = small.float()
    kl = 0.5 * (log_variance - small - 1 + (small - log_variance).exp()
                + (mean - guess).square() * (-log_variance).exp())  # fmt: skip
    likelihood = _byte_log_likelihood(tokens.float(), guess, 0.5 * log_variance)
    return torch.where(times == 0, -likelihood.mean(-1), kl.mean(-1)) / math.log(2)


def _byte_log_likelihood(tokens: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Returns the log-probability of bytes in [-1, 1] under a normal law, by the tanh form of its CDF."""

    def cdf(x: Tensor) -> Tensor:
        return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)  # the logit of the CDF

    upper = cdf((tokens - mean + BIN) * (-log_deviation).exp())
    lower = cdf((tokens - mean - BIN) * (-log_deviation).exp())
    inside = (upper.sigmoid() - lower.sigmoid()).clamp(min=1e-12).log()
    return torch.where(tokens < -0.999, logsigmoid(upper),
                       torch.where(tokens > 0.999, logsigmoid(-lower), inside))  # fmt: skip

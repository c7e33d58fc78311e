r"""Distribution matching: the student's gradient, the fake score's loss, and both within subintervals.

A student makes samples x_s at a noise level s, clean ones at s = 0. They are led to more noise, t > s, by

    x_t = a_{t|s} x_s + s_{t|s} e',    a_{t|s} = a_t / a_s,    s_{t|s}^2 = s_t^2 - a_{t|s}^2 s_s^2,

where e' is fresh. The gradient of KL(student || teacher) at t is, in three forms that are equal,

    E[ a_{t|s} (score_F - score_R) dx_s ] = E[ (a_t a_{t|s} / s_t^2) (mu_F - mu_R) dx_s ]
                                          = E[ a_t a_{t|s} / (a_t s_t + s_t^2) (v_R - v_F) dx_s ],

with R for the teacher, F for the fake score, which is the student's own, mu for x0 and v for eps - x0. No x0
exists for x_s at s > 0. Any target that is linear in x0 and eps is made of the pseudo pair instead,

    e~ = (s_t / s_{t|s}) e',    x0~ = x_s / a_s - (a_t s_s^2 / (a_s^2 s_{t|s})) e',    x_t = a_t x0~ + s_t e~,

since E[-e' / s_{t|s} | x_t] is the score at t. At s = 0 the pair is (x_s, e') to the bit.

References:
    | Improved Distribution Matching Distillation for Fast Image Synthesis (2024), arXiv 2405.14867 (DMD2)
    | Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals (2025),
      arXiv 2510.27684, equations 9 to 13
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError, closest
from ..noise import wide
from .premetrics import broad

__all__ = ["FLOOR", "WEIGHTS", "Levels", "PathKind", "fake_loss", "kl_weight", "matching_gradient",
           "pseudo_pair", "straight", "subinterval_weight", "surrogate", "transition"]  # fmt: skip

PathKind = Literal["flow", "vp", "ve"]

WEIGHTS = ("clamp", "eps", "none")
"""The weights of the fake score's loss, see `subinterval_weight`."""

FLOOR = 1e-4
"""What is added to the normalizer of the gradient."""


class Levels(NamedTuple):
    """Scales of signal and noise, in x = alpha x0 + sigma eps, or of a transition.

    Arguments:
        alpha: The signal's, with shape (B).
        sigma: The noise's, with shape (B).
    """

    alpha: Tensor
    sigma: Tensor


def straight(t: Tensor) -> Levels:
    """Returns the levels 1 - t and t, of times (B) in [0, 1]."""
    return Levels(1 - t, t)


def transition(kind: PathKind, s: Levels, t: Levels) -> Levels:
    """Returns (a_{t|s}, s_{t|s}), by forms that lose nothing where t is close to s.

    Arguments:
        kind: "flow" for alpha = 1 - sigma, "vp" for alpha^2 + sigma^2 = 1, "ve" for alpha = 1.
        s: The levels of the samples, with alpha above 0.
        t: The levels to go to, with more noise.

    Raises:
        OptionError: If there is no such kind.
    """
    ratio = t.alpha / s.alpha
    if kind == "flow":
        low, high = s.sigma, t.sigma
        return Levels(ratio, ((high - low) * (high + low - 2 * high * low)).sqrt() / (1 - low))
    if kind == "vp":
        return Levels(ratio, (-torch.expm1(2 * (t.alpha.log() - s.alpha.log()))).sqrt())
    if kind == "ve":
        return Levels(ratio, ((t.sigma - s.sigma) * (t.sigma + s.sigma)).sqrt())
    raise OptionError(f"no kind of path {kind!r}; {closest(kind, ('flow', 'vp', 've'))}")


def pseudo_pair(kind: PathKind, x_s: Tensor, noise: Tensor, s: Levels, t: Levels) -> tuple[Tensor, Tensor]:
    """Returns (x0~, e~), each (B, *), in float32 or wider: what linear targets at t are made of.

    Arguments:
        kind: The path, see `transition`.
        x_s: The samples at the levels s, with shape (B, *).
        noise: The noise e' that leads from s to t, with shape (B, *).
        s: The levels of the samples.
        t: The levels of x_t.

    Raises:
        OptionError: If there is no such kind.
    """
    x_s, noise = wide(x_s), wide(noise)
    between = transition(kind, s, t).sigma
    share = t.alpha * s.sigma.square() / (s.alpha.square() * between)
    x0 = x_s / broad(s.alpha, x_s) - broad(share, x_s) * noise
    return x0, broad(t.sigma / between, x_s) * noise


def kl_weight(kind: PathKind, s: Levels, t: Levels) -> Tensor:
    """Returns the factor a_t a_{t|s} / s_t^2, (B), of mu_F - mu_R in the gradient of the KL divergence.

    Arguments:
        kind: The path, see `transition`.
        s: The levels of the samples.
        t: The levels at which the scores are compared.
    """
    return t.alpha * transition(kind, s, t).alpha / t.sigma.square()


@torch.no_grad()
def matching_gradient(real: Tensor, fake: Tensor, sample: Tensor, weight: Tensor | None = None,
                      floor: float = FLOOR) -> Tensor:  # fmt: skip
    """Returns the gradient of the student's sample, (B, *), in float32 or wider, finite.

    It is (fake - real) / (mean |sample - real| + floor), the mean over one sample, unless there is a weight.

    Arguments:
        real: The teacher's x0, with its guidance, of shape (B, *).
        fake: The fake score's x0, without any, of shape (B, *).
        sample: The student's x0, with shape (B, *).
        weight: What the difference is multiplied by instead, such as `kl_weight`, of shape (B).
        floor: The least normalizer.
    """
    real, fake, sample = wide(real), wide(fake), wide(sample)
    if weight is not None:
        return torch.nan_to_num(broad(weight, real) * (fake - real))
    size = (sample - real).abs().flatten(1).mean(1) + floor
    return torch.nan_to_num((fake - real) / broad(size, real))


def surrogate(gradient: Tensor, sample: Tensor) -> Tensor:
    """Returns a loss () of which the gradient by the sample is the given one, over the number of entries.

    Its value is half the mean square of the gradient. It is linear: the square of sample - (sample -
    gradient) has the same gradient, but in bfloat16 loses 17 % of one of size 0.01, and 80 % of 0.001.

    Arguments:
        gradient: The gradient (B, *).
        sample: What the student has made, with shape (B, *).
    """
    gradient, sample = wide(gradient).detach(), wide(sample)
    return (gradient * (sample - sample.detach()) + gradient.square() / 2).mean()


def subinterval_weight(name: str, between: Tensor, unit: Tensor, clamp: float = 10.0) -> Tensor:
    """Returns the weight (B) of the squared error of the fake score's output at t.

    | name    | weight                    |                                                            |
    |---------|---------------------------|------------------------------------------------------------|
    | "clamp" | min(1, clamp s_{t|s}^2)   | clamp(1 / s_{t|s}^2, 0, clamp) times s_{t|s}^2 of the paper |
    | "eps"   | 1 / c^2                   | the noise of the target is e' itself                       |
    | "none"  | 1                         |                                                            |

    It depends on t alone, and so changes the noise of the loss but not what makes it least.

    Arguments:
        name: One of ``WEIGHTS``.
        between: s_{t|s}, with shape (B).
        unit: The factor c of e' in the target, with shape (B): s_t K / (a_t s_{t|s}) for an output p x0 +
            q eps with K = a_t q - s_t p; (s_t + s_t^2 / a_t) / s_{t|s} for eps - x0.
        clamp: The bound of the first one; infinite for none.

    Raises:
        OptionError: If there is none of this name.
    """
    if name == "clamp":
        return (clamp * between.square()).clamp(max=1.0)
    if name == "eps":
        return 1 / unit.square()
    if name == "none":
        return torch.ones_like(between)
    raise OptionError(f"no weight {name!r}; {closest(name, WEIGHTS)}")


def fake_loss(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns the weighted mean square of output - target, of shape (), in float32 or wider.

    Arguments:
        output: What the fake score predicts, with shape (B, *).
        target: p x0 + q eps of the sample, or of its pseudo pair, with shape (B, *).
        weight: The weights (B).
    """
    error = (wide(output) - wide(target)).square().flatten(1).mean(1)
    return (weight.to(error) * error).mean()

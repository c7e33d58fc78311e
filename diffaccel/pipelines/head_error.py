r"""What a few head steps make of a normal token: exactly, since every step is linear then.

The best head for a token :math:`N(\mu, s^2)` predicts :math:`x_0 = \mu + s^2 \alpha (x - \alpha \mu) / D`
with :math:`D = \alpha^2 s^2 + \sigma^2`, so that mean and variance of x can be followed through a chain.
"""

import math
from collections.abc import Sequence

from .mar_chain import ChainStep

__all__ = ["drawn_moments", "normal_error"]


def drawn_moments(
    steps: Sequence[ChainStep], mean: float, spread: float, variance: float = 0.0, temperature: float = 1.0
) -> tuple[float, float]:
    """Returns mean and standard deviation of what a chain with the best head makes of a normal token.

    Arguments:
        steps: The steps of the chain.
        mean: The token's mean.
        spread: The token's standard deviation s.
        variance: 0 for the small variance of the steps, 1 for the large one.
        temperature: The factor of the noise of the steps.
    """
    at, var = 0.0, 1.0
    for step in steps:
        total = (step.alpha * spread) ** 2 + step.sigma**2
        noise = step.sigma / total  # d eps / dx; eps and x0 vanish or not at x = alpha mean
        token = step.alpha * spread**2 / total  # d x0 / dx
        slope = noise - token if step.flow else noise
        offset = (-noise * step.alpha - (1 - token * step.alpha if step.flow else 0.0)) * mean
        scale = step.keep + step.weight * slope
        at = scale * at + step.weight * offset
        var = scale**2 * var
        if step.large > -math.inf:
            share = step.large * variance + step.small * (1 - variance)
            var += temperature**2 * math.exp(share)
    return at, math.sqrt(var)


def normal_error(steps: Sequence[ChainStep], spread: float, variance: float = 0.0) -> float:
    r"""Returns the Wasserstein-2 distance of a drawn normal token to the true one, per channel.

    The token's mean is taken as :math:`(1 - s^2)^{1/2}`, since all tokens together have unit variance.

    Arguments:
        steps: The steps of the chain.
        spread: The token's standard deviation s.
        variance: 0 for the small variance of the steps, 1 for the large one.
    """
    mean = math.sqrt(max(0.0, 1 - spread**2))
    drawn, deviation = drawn_moments(steps, mean, spread, variance)
    return math.hypot(drawn - mean, deviation - spread)

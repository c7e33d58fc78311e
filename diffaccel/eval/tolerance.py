r"""How many images tell that a share of all images is within a limit: one-sided tolerance bounds.

Of n independent images, v violate a limit. If a share of more than 1 - q of all images did, so few would be
seen with a probability of at most :math:`P(B(n, 1 - q) \le v)`; where that is at most 1 - c, the limit is met
by the share q of all images with confidence c. No shape of the distribution is assumed.

References:
    Wilks, Determination of Sample Sizes for Setting Tolerance Limits, 1941, doi 10.1214/aoms/1177731788.
"""

import math
from collections.abc import Sequence

from scipy.stats import binom

from ..errors import OptionError

__all__ = ["allowed_violations", "needed", "tolerance_bound"]


def needed(coverage: float, confidence: float) -> int:
    """Returns the least number of measurements that can show a coverage: all of them within the limit.

    Arguments:
        coverage: The share q of all, within (0, 1).
        confidence: The probability c that the claim is right, within (0, 1).

    Raises:
        OptionError: If one is out of range.
    """
    for name, value in (("coverage", coverage), ("confidence", confidence)):
        if not 0 < value < 1:
            raise OptionError(f"{name} is {value}; expected a share within (0, 1)")
    return math.ceil(math.log1p(-confidence) / math.log(coverage) - 1e-9)


def allowed_violations(count: int, coverage: float, confidence: float) -> int:
    """Returns how many of ``count`` measurements may violate a limit that is then shown to hold.

    Raises:
        OptionError: If so few measurements show nothing, or a share is out of range.
    """
    least = needed(coverage, confidence)
    if count < least:
        raise OptionError(
            f"{count} measurements cannot show a coverage of {coverage:g} with confidence {confidence:g}; "
            f"at least {least} can"
        )
    violations = 0
    while binom.cdf(violations + 1, count, 1 - coverage) <= 1 - confidence:
        violations += 1
    return violations


def tolerance_bound(values: Sequence[float], coverage: float, confidence: float) -> float:
    """Returns what the share ``coverage`` of all values does not exceed, with the given confidence.

    It is one of the values: the largest, or one of the next if there are many.

    Arguments:
        values: Independent measurements.
        coverage: The share of all values, within (0, 1).
        confidence: The probability that the bound is right, within (0, 1).

    Raises:
        OptionError: If there are too few values, or a share is out of range.
    """
    return sorted(values, reverse=True)[allowed_violations(len(values), coverage, confidence)]

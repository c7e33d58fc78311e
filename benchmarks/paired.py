"""The relative cost of something, from pairs of measurements with and without it."""

import random
import statistics
from collections.abc import Callable

__all__ = ["paired"]


def paired(measure: Callable[[bool], float], pairs: int) -> dict[str, float]:
    """Returns the median of the pairs' relative costs, with a distribution-free 95 % interval.

    Arguments:
        measure: Returns the seconds with it, or without it.
        pairs: The pairs, each in random order; one more before them warms up.
    """
    order, ratios, plains = random.Random(0), [], []
    for number in range(pairs + 1):
        taken = {}
        for which in order.sample((False, True), 2):
            taken[which] = measure(which)
        if number:  # the first pair warms up
            ratios.append(taken[True] / taken[False] - 1)
            plains.append(taken[False])
    ratios.sort()
    reach = int(0.98 * pairs**0.5) + 1  # ranks about the median, by the binomial distribution
    middle = pairs // 2
    return {
        "overhead": statistics.median(ratios),
        "low": ratios[max(middle - reach, 0)],
        "high": ratios[min(middle + reach, pairs - 1)],
        "plain seconds": statistics.median(plains),
    }

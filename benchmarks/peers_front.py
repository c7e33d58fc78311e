"""Fronts of speed-up and error, and the bar: our best against the best of others at equal speed or error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["ERROR_RATIO", "SPEEDS", "SPEED_RATIO", "Comparison", "Point", "compare", "error_at", "front",
           "speed_at"]  # fmt: skip

SPEEDS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
"""The speed-ups at which fronts are compared."""

ERROR_RATIO, SPEED_RATIO = 0.5, 1.25
"""The bar: at most this part of the error at equal speed-up, this many times the speed-up at equal error."""


@dataclass(frozen=True)
class Point:
    """A method at one setting: its speed-up, above 0, its error, above 0, and its name."""

    speed: float
    error: float
    name: str


@dataclass(frozen=True)
class Comparison:
    """Our best against that of rivals at one speed-up.

    Arguments:
        speed: The speed-up.
        rival: The error of the rivals' front there.
        rival_name: The rival's point at that place or the next faster one.
        ours: The error of our front there; None where ours is not as fast.
        our_name: Ours, as ``rival_name``.
        our_speed: The speed-up of our front at the rivals' error; 1 where it is not as exact.
        bounded: Whether that is the end of our front, all of which is more exact.
    """

    speed: float
    rival: float
    rival_name: str
    ours: float | None
    our_name: str
    our_speed: float
    bounded: bool

    @property
    def error_ratio(self) -> float:
        """Our error over the rivals' at equal speed-up."""
        return math.inf if self.ours is None else self.ours / self.rival

    @property
    def speed_ratio(self) -> float:
        """Our speed-up over the rivals' at equal error; at least that where it is `bounded`."""
        return self.our_speed / self.speed

    @property
    def met(self) -> bool:
        """Whether both halves of the bar are met."""
        return self.error_ratio <= ERROR_RATIO and self.speed_ratio >= SPEED_RATIO


def front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other beats in both speed-up and error, from slow and exact to fast."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (-one.speed, one.error)):
        if not found or point.error < found[-1].error:
            found.append(point)
    return found[::-1]


def error_at(points: Sequence[Point], speed: float) -> tuple[float, Point] | None:
    """Returns the error of a front at a speed-up, and its point there or next faster.

    Between two points the logarithm of the error is linear in that of the speed-up; below the slowest point
    it is that point's, and above the fastest there is none.

    Arguments:
        points: A front.
        speed: The speed-up.
    """
    if not points or speed > points[-1].speed:
        return None
    if speed <= points[0].speed:
        return points[0].error, points[0]
    low, high = next((a, b) for a, b in pairwise(points) if a.speed <= speed <= b.speed)
    return _between(speed, (low.speed, low.error), (high.speed, high.error)), high


def speed_at(points: Sequence[Point], error: float) -> tuple[float, bool]:
    """Returns the speed-up of a front at an error, and whether that is its end, of a smaller error.

    It is 1, the plain run's, where no point is as exact.

    Arguments:
        points: A front.
        error: The error.
    """
    if not points or error < points[0].error:
        return 1.0, False
    if error >= points[-1].error:
        return points[-1].speed, error > points[-1].error
    low, high = next((a, b) for a, b in pairwise(points) if a.error <= error <= b.error)
    return _between(error, (low.error, low.speed), (high.error, high.speed)), False


def _between(x: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """Returns the value at x of the power law through two points of positive coordinates."""
    share = math.log(x / low[0]) / math.log(high[0] / low[0])
    return low[1] * (high[1] / low[1]) ** share


def compare(ours: Sequence[Point], rivals: Sequence[Point],
            speeds: Sequence[float] = SPEEDS) -> list[Comparison]:  # fmt: skip
    """Returns the comparisons at all speed-ups that a rival reaches.

    Arguments:
        ours: Our points.
        rivals: Those of others.
        speeds: The speed-ups.
    """
    mine, theirs, rows = front(ours), front(rivals), []
    for speed in speeds:
        there = error_at(theirs, speed)
        if there is None:
            continue
        here = error_at(mine, speed)
        reached, bounded = speed_at(mine, there[0])
        rows.append(Comparison(speed, there[0], there[1].name, None if here is None else here[0],
                               "" if here is None else here[1].name, reached, bounded))  # fmt: skip
    return rows

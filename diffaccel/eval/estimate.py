"""A measured number with its standard error."""

from dataclasses import dataclass

__all__ = ["Estimate"]


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Arguments:
        value: The number.
        se: Its standard error; None where it is not known.
        bias: The estimate of its bias, which ``value`` still contains; None where it is not known.
    """

    value: float
    se: float | None = None
    bias: float | None = None

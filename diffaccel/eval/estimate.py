"""A measured number with its standard error."""

from dataclasses import asdict, dataclass

__all__ = ["Estimate"]


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Arguments:
        value: The number.
        se: Its standard error; None where it is not known.
        bias: The estimate of its bias, which ``value`` still contains; None where it is not known.
        corrected: The number without the bias, where the estimate of the bias can be trusted.
    """

    value: float
    se: float | None = None
    bias: float | None = None
    corrected: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Returns what is known, as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

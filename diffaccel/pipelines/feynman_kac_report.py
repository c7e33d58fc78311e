"""What happened in one call of a Feynman-Kac corrected pipeline, as plain data."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FeynmanKacReport"]


@dataclass(frozen=True)
class FeynmanKacReport:
    """The account of one call.

    Arguments:
        exponents: The exponents of the experts.
        groups: The number G of groups.
        particles: The number K of particles in a group.
        settings: The rules: zeta, resampling, threshold, interval, data_std and the scale of a reward.
        log_snr: lambda = log(alpha / sigma) at each evaluation; None for pure noise.
        effective: The effective sizes of all groups at each evaluation, before resampling.
        events: The evaluations, counted from 0, and groups where particles took the place of others.
        log_normalizer: The estimate of each group: log Z at the last level with noise, over that at the first
            one; Z is the integral of the product of the densities over y = x / alpha.
        weights: The normalized final weights of the particles of each group.
        survivors: The number of initial particles of each group that the final ones descend from.
        evaluations: Evaluations of networks, counted by rows.
        seconds: The seconds of the call.
    """

    exponents: tuple[float, ...]
    groups: int
    particles: int
    settings: dict[str, Any]
    log_snr: tuple[float | None, ...]
    effective: tuple[tuple[float, ...], ...]
    events: tuple[tuple[int, int], ...]
    log_normalizer: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    survivors: tuple[int, ...]
    evaluations: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        least = min(min(sizes) for sizes in self.effective)
        times = len({step for step, _ in self.events})
        return (
            f"{self.groups} x {self.particles} particles, {self.evaluations} evaluations: effective size at "
            f"least {least:.3g}, resampled at {times} of {len(self.effective)} steps, "
            f"{min(self.survivors)} or more initial particles survive"
        )

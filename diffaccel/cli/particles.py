"""The part of the HTML report about particles: a table of the images, effective sizes and final weights."""

from collections.abc import Mapping
from typing import Any

from .figures import draw_particles
from .tables import Lines

__all__ = ["particle_lines", "particle_plots"]

_HEADER = [
    "image", "exponents", "particles", "least effective size", "resampled at", "survivors", "log normalizer",
    "evaluations",
]  # fmt: skip


def particle_lines(record: Mapping[str, Any]) -> Lines:
    """Returns a line for each image of a record of ``generate``."""
    rows = []
    for name, report in zip(record["images"], record["feynman_kac"], strict=True):
        steps = len({step for step, _ in report["events"]})
        rows.append(("accelerated", [
            name,
            ", ".join(f"{value:.4g}" for value in report["exponents"]),
            str(report["particles"]),
            f"{min(min(sizes) for sizes in report['effective']):.2f}",
            f"{steps} of {len(report['effective'])} steps",
            str(min(report["survivors"])),
            f"{report['log_normalizer'][0]:.4g}",
            str(report["evaluations"]),
        ]))  # fmt: skip
    return Lines("", _HEADER, rows, ())


def particle_plots(record: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Returns a name and a picture (PNG) of each report of a record."""
    pairs = zip(record["images"], record["feynman_kac"], strict=True)
    return [
        (f"effective sizes and weights of {name}", draw_particles(report, name)) for name, report in pairs
    ]

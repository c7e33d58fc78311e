"""The section of a report that shows a distillation run: losses, distance and health over the images."""

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import draw_curves
from .tables import Lines

__all__ = ["training_lines", "training_plots"]

_HEALTH = ("mean", "std", "saturation", "diversity")


def training_lines(record: Mapping[str, Any]) -> Lines:
    """Returns a table of the last validation, with one row a number of steps."""
    latest = next((row for row in reversed(record["log"]) if "validation" in row), None)
    names = {} if latest is None else latest["validation"]
    steps = sorted({int(name.partition("/")[2]) for name in names})
    keys = [key for key in ("fid", *_HEALTH) if any(f"{key}/{n}" in names for n in steps)]
    rows = [("plain", [str(n), *(f"{names[f'{key}/{n}']:.4g}" for key in keys)]) for n in steps]
    return Lines("validation", ["steps", *({"fid": "FD"}.get(key, key) for key in keys)], rows, ())


def training_plots(record: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Returns pictures of the losses and of the distances over the images, with their names."""
    log: Sequence[Mapping[str, Any]] = record["log"]
    losses = {name: [(row["images"], row[name]) for row in log if name in row]
              for name in sorted({name for row in log for name in row if "/" in name})}  # fmt: skip
    measured = [row for row in log if "validation" in row]
    names = sorted({name for row in measured for name in row["validation"] if name.startswith("fid/")})
    distances = {f"{name[4:]} steps": [(row["images"], row["validation"][name]) for row in measured]
                 for name in names}  # fmt: skip
    found = [("the losses and norms of gradients", losses, True), ("the Frechet distance", distances, False)]
    return [(title, draw_curves(curves, "images", title, log_scale))
            for title, curves, log_scale in found if any(curves.values())]  # fmt: skip

"""The rows of records as lines of text: for the terminal, for Markdown, for a page."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

__all__ = ["Lines", "bench_lines", "eval_lines", "markdown", "shown", "table"]

Row = Mapping[str, Any]
WIDE = 110
"""The terminal's columns from which on it is shown all columns of a table."""


@dataclass(frozen=True)
class Lines:
    """A table.

    Arguments:
        title: What it shows.
        header: The names of the columns.
        rows: For each line whether it is "reference", "accelerated" or "plain", and its cells.
        narrow: The columns that a narrow terminal is shown.
    """

    title: str
    header: list[str]
    rows: list[tuple[str, list[str]]]
    narrow: tuple[str, ...]


def bench_lines(rows: Sequence[Row]) -> Lines:
    """Returns the rows of a benchmark, as in ``bench.json``."""
    header = ["method", "evaluations", "calls", "GFLOP/image", "seconds", "speed-up", "of the ideal", "RMS",
              "PSNR", "relative", "SSIM"]  # fmt: skip
    narrow = ("method", "evaluations", "seconds", "speed-up", "RMS")
    return Lines("against the unaccelerated run on the same noise", header,
                 [(row["kind"], _bench_cells(row)) for row in rows], narrow)  # fmt: skip


def _bench_cells(row: Row) -> list[str]:
    reference = row["kind"] == "reference"
    speed, error = row["speedup"], row["fidelity"]
    low, high = speed["quartiles"]
    psnr, ssim = error["psnr"], error.get("ssim")
    return [
        label_of(row),
        f"{row['evaluated']:.4g} of {row['requested']}",
        str(row["calls"]),
        "-" if row["flops"] is None else f"{row['flops'] / 1e9:.3g}",
        f"{statistics.median(row['seconds']):.2f}",
        "1" if reference else f"{speed['median']:.2f} ({low:.2f}-{high:.2f})",
        "-" if reference else f"{100 * row['realized']['median']:.0f} %",
        "0" if reference else f"{error['rms']:.5f}",
        "-" if reference else f"{float(psnr):.1f} dB",
        "0" if reference else f"{error['relative']:.4f}",
        "-" if reference or not ssim else f"{ssim['value']:.4f}",
    ]


def label_of(row: Row) -> str:
    """Returns a row's name, with the steps where they are the point."""
    if "label" in row:
        return str(row["label"])
    return f"{row['name']}, {row['steps']} steps" if row["kind"] != "accelerated" else str(row["name"])


def eval_lines(rows: Sequence[Row]) -> Lines:
    """Returns the rows of an evaluation, as in ``eval.json``; columns that no row has are left out."""
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    header = ["method", "evaluations"]
    columns = [[label_of(row) for row in rows]]
    columns.append([f"{row['evaluated']:.4g} of {row['requested']:g}" for row in rows])
    for name in scores:
        header.append(next(row["scores"][name]["name"] for row in rows if name in row["scores"]))
        columns.append([shown(row["scores"].get(name)) for row in rows])
        if any(name in row.get("difference", {}) for row in rows):
            header.append(f"{header[-1]} - plain")
            columns.append([shown(row.get("difference", {}).get(name), sign=True) for row in rows])
    for group, name, title in EXTRA:
        if any(name in row.get(group, {}) for row in rows):
            header.append(title)
            columns.append([shown(row.get(group, {}).get(name), percent=group == "accuracy") for row in rows])
    kinds = ["reference" if n == 0 else "plain" if row["name"] == "plain" else "accelerated"
             for n, row in enumerate(rows)]  # fmt: skip
    cells = [list(line) for line in zip(*columns, strict=True)]
    return Lines("scores, ± standard error", header, list(zip(kinds, cells, strict=True)),
                 tuple(header[:4]))  # fmt: skip


EXTRA = (
    ("accuracy", "class_accuracy", "class right"),
    ("accuracy", "color_accuracy", "color right"),
    ("fidelity", "rms", "RMS to plain"),
    ("fidelity", "psnr_mean", "PSNR to plain"),
    ("fidelity", "ssim", "SSIM to plain"),
    ("fidelity", "lpips", "LPIPS to plain"),
    ("fidelity", "feature_distance", "feature distance"),
)
"""What is shown beside the scores: its group in a row, its name there, and its title."""


def shown(estimate: Mapping[str, Any] | None, sign: bool = False, percent: bool = False) -> str:
    """Returns a number with its standard error, to the error's two digits.

    Arguments:
        estimate: The value and, where it is known, its "se".
        sign: Whether to show a plus sign.
        percent: Whether to show it in percent.
    """
    if not estimate:
        return "-"
    factor, unit = (100, " %") if percent else (1, "")
    value, error = factor * float(estimate["value"]), factor * float(estimate.get("se") or 0)
    plus = "+" if sign else ""
    if not math.isfinite(value) or not error:
        return f"{value:{plus}.4g}{unit}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:{plus}.{digits}f} ± {error:.{digits}f}{unit}"


def table(lines: Lines, width: int = 120) -> Table:
    """Returns a table for the terminal; a narrow one is shown the most important columns only."""
    places = [n for n, name in enumerate(lines.header) if width >= WIDE or name in lines.narrow]
    result = Table(title=lines.title)
    for place in places:
        result.add_column(lines.header[place], justify="right" if place else "left", no_wrap=True)
    for kind, cells in lines.rows:
        result.add_row(*(cells[place] for place in places), style="bold" if kind == "accelerated" else None)
    return result


def markdown(lines: Lines) -> str:
    """Returns a table in Markdown."""
    cells = ([cell.replace("|", "\\|") for cell in row] for _, row in lines.rows)
    rows = [lines.header, ["---"] * len(lines.header), *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)

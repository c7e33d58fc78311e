"""The table, the picture and the HTML page of a benchmark."""

import base64
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib
from rich.table import Table
from torch import Tensor

if TYPE_CHECKING:
    from .bench import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw_grid", "markdown", "render", "table"]

HEADER = (
    "method",
    "evaluations",
    "calls",
    "GFLOP/image",
    "seconds",
    "speed-up",
    "of the ideal",
    "RMS",
    "PSNR",
    "relative",
)

NARROW = ("method", "evaluations", "seconds", "speed-up", "RMS")


def _cells(row: "Row") -> list[str]:
    speed, realized, error = row.speedup, row.realized, row.fidelity
    if speed is None or realized is None or error is None:
        raise ValueError(f"the row {row.label!r} has not been measured")
    low, high = speed.quartiles
    reference = row.kind == "reference"
    return [
        row.label,
        f"{row.evaluated:.4g} of {row.requested}",
        str(row.calls),
        "-" if row.flops is None else f"{row.flops / 1e9:.3g}",
        f"{statistics.median(row.seconds):.2f}",
        "1" if reference else f"{speed.median:.2f} ({low:.2f}-{high:.2f})",
        "-" if reference else f"{100 * realized.median:.0f} %",
        "0" if reference else f"{error.rms:.5f}",
        "-" if reference else f"{error.psnr:.1f} dB",
        "0" if reference else f"{error.relative:.4f}",
    ]


def table(rows: Sequence["Row"], width: int = 120) -> Table:
    """Returns the rows as a table for the terminal.

    Arguments:
        rows: The benchmark's rows.
        width: The terminal's columns; a narrow one is shown the most important numbers only.
    """
    shown = [HEADER.index(name) for name in HEADER if width >= 110 or name in NARROW]
    result = Table(title="against the unaccelerated run on the same noise")
    for position in shown:
        result.add_column(HEADER[position], justify="right" if position else "left", no_wrap=True)
    for row in rows:
        cells = _cells(row)
        style = "bold" if row.kind == "accelerated" else None
        result.add_row(*(cells[position] for position in shown), style=style)
    return result


def markdown(rows: Sequence["Row"]) -> str:
    """Returns the rows as a table in Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def draw_grid(images: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> bytes:
    """Draws one line of pictures a method.

    Arguments:
        images: Names and images (N, C, H, W) in [0, 1].
        captions: What the N pictures show.

    Returns:
        The picture as PNG.
    """
    columns = len(images[0][1])
    figure, axes = plt.subplots(len(images), columns, squeeze=False,
                                figsize=(1.0 * columns + 1.8, 1.05 * len(images) + 0.4))  # fmt: skip
    for line, (name, pictures) in zip(axes, images, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.movedim(0, -1).clamp(0, 1).cpu().float().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[0], captions, strict=False):
        axis.set_title(caption.removeprefix("a photo of ").replace(" ", "\n", 2), fontsize=7)
    return _png(figure)


def _plot(rows: Sequence["Row"]) -> bytes:
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for kind, style in (("plain", {"fmt": "s--", "color": "#888"}), ("accelerated", {"fmt": "o"})):
        chosen = sorted((row for row in rows if row.kind == kind), key=lambda row: row.evaluated)
        points = [(row.speedup.median, row.fidelity.rms, row) for row in chosen
                  if row.speedup and row.fidelity and row.fidelity.rms > 0]  # fmt: skip
        if not points:
            continue
        across, up = [x for x, _, _ in points], [y for _, y, _ in points]
        name = "plain, fewer steps" if kind == "plain" else "accelerated"
        axis.plot(across, up, style["fmt"], color=style.get("color", "#d2491a"), label=name)
        for x, y, row in points:
            low, high = row.speedup.quartiles if row.speedup else (x, x)
            axis.plot([low, high], [y, y], color=style.get("color", "#d2491a"), linewidth=1)
            axis.annotate(row.label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set_yscale("log")
    axis.set_xlabel("wall-clock speed-up (bar: quartiles of the rounds)")
    axis.set_ylabel("RMS error of pixels")
    axis.grid(alpha=0.25, which="both")
    if axis.has_data():
        axis.legend(frameon=False, fontsize=8)
    return _png(figure)


def render(rows: Sequence["Row"], record: dict[str, Any], grid: bytes) -> str:
    """Returns the HTML page, which needs no other file.

    Arguments:
        rows: The benchmark's rows.
        record: What ``bench.json`` holds.
        grid: The picture of `draw_grid`.
    """
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(template).render(
        header=HEADER,
        lines=[(row.kind, _cells(row)) for row in rows],
        record=record,
        grid=base64.b64encode(grid).decode(),
        plot=base64.b64encode(_plot(rows)).decode(),
    )

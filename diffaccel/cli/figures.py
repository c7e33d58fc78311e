"""Pictures: grids of samples, and plots of quality against cost."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["Point", "draw_curves", "draw_grid", "draw_particles", "draw_plot"]

COLORS = {"accelerated": "#d2491a", "plain": "#888888"}


@dataclass(frozen=True)
class Point:
    """A method in a plot.

    Arguments:
        label: Its name.
        kind: "accelerated" or "plain".
        x: Where it is across, with the ends of its bar.
        y: Where it is up, with the ends of its bar.
    """

    label: str
    kind: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def draw_grid(images: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> bytes:
    """Draws one line of pictures a method, as PNG.

    Arguments:
        images: Names and images (N, C, H, W) in [0, 1].
        captions: What the N pictures show.
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


def draw_plot(points: Sequence[Point], across: str, up: str, log: bool, less_is_better: bool = True) -> bytes:
    """Draws quality against cost, as PNG; a line joins the plain runs, and the best trade-offs are ringed.

    Arguments:
        points: The methods.
        across: The name of the cost, or of the speed.
        up: The name of the error or distance, of which less is better.
        log: Whether the error has a logarithmic axis.
        less_is_better: Whether less is better across as well.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for kind, color in COLORS.items():
        chosen = sorted((point for point in points if point.kind == kind), key=lambda point: point.x[0])
        if not chosen:
            continue
        name = "plain, fewer steps" if kind == "plain" else "accelerated"
        line = "s--" if kind == "plain" else "o"
        axis.plot([p.x[0] for p in chosen], [p.y[0] for p in chosen], line, color=color, label=name)
        for p in chosen:
            axis.plot(p.x[1:], [p.y[0]] * 2, color=color, linewidth=1)
            axis.plot([p.x[0]] * 2, p.y[1:], color=color, linewidth=1)
            axis.annotate(p.label, (p.x[0], p.y[0]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    best = pareto(points, less_is_better)
    axis.plot([p.x[0] for p in best], [p.y[0] for p in best], "o", markersize=11, fillstyle="none",
              color="#222222", markeredgewidth=0.8, label="no other is better in both")  # fmt: skip
    if log:
        axis.set_yscale("log")
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.25, which="both")
    if axis.has_data():
        axis.legend(frameon=False, fontsize=8)
    return _png(figure)


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, log: bool
) -> bytes:
    """Draws curves by name, as PNG.

    Arguments:
        curves: The points of each.
        across: The name of the first number of a point.
        up: The name of the second.
        log: Whether the second has a logarithmic axis.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for name, points in curves.items():
        axis.plot(
            *zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 30 else ""
        )
    if log:
        axis.set_yscale("log")
    axis.set(xlabel=across, ylabel=up)
    axis.grid(alpha=0.25, which="both")
    axis.legend(frameon=False, fontsize=8)
    return _png(figure)


def draw_particles(report: Mapping[str, Any], title: str) -> bytes:
    """Draws the effective sizes of groups of particles over the steps, and their final weights, as PNG.

    Arguments:
        report: `FeynmanKacReport.to_dict`.
        title: What the particles made.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained", width_ratios=(3, 2))
    count, effective = report["particles"], report["effective"]
    for group, sizes in enumerate(zip(*effective, strict=True)):
        left.plot(range(len(sizes)), sizes, color=COLORS["plain"], linewidth=1)
        steps = [step for step, other in report["events"] if other == group]
        left.plot(steps, [sizes[step] for step in steps], "o", color=COLORS["accelerated"], markersize=4)
    left.plot([], [], "o", color=COLORS["accelerated"], markersize=4, label="resampled")
    threshold = report["settings"]["ess_threshold"] * count
    left.axhline(threshold, color="#222222", linewidth=0.8, linestyle=":", label="threshold")
    left.set(xlabel="step", ylabel=f"effective size of {count}", ylim=(0, 1.05 * count), title=title)
    left.legend(frameon=False, fontsize=8)
    for group, weights in enumerate(report["weights"]):
        places = [particle + (group + 0.5) / len(report["weights"]) for particle in range(count)]
        right.bar(places, sorted(weights, reverse=True), width=0.8 / len(report["weights"]),
                  color=COLORS["accelerated"])  # fmt: skip
    right.axhline(1 / count, color="#222222", linewidth=0.8, linestyle=":")
    right.set(xlabel="particle, by weight", ylabel="final weight", xticks=[], ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return _png(figure)


def pareto(points: Sequence[Point], less_is_better: bool = True) -> list[Point]:
    """Returns the points that no other beats in both directions.

    Arguments:
        points: The points; less is better up.
        less_is_better: Whether less is better across.
    """
    sign = 1 if less_is_better else -1
    ordered = sorted(points, key=lambda point: (sign * point.x[0], point.y[0]))
    best: list[Point] = []
    for point in ordered:
        if not best or point.y[0] < best[-1].y[0]:
            best.append(point)
    return best

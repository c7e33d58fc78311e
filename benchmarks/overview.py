"""The picture of the README: samples of one noise, error against speed-up, students and their teacher.

``python benchmarks/overview.py`` writes ``docs/overview.png``. Figures are those of ``demo.json`` (``make
demo``) and ``students-tiny-fashion-dit.json``; the samples are made anew, from the seeds of the demo.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from diffaccel import accelerate, zoo
from diffaccel.cli.reading import set_scheduler
from diffaccel.cli.tables import label_of
from diffaccel.eval import Sampler
from diffaccel.files import whole
from diffaccel.zoo.folders import quiet

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
COLUMNS = 10
SHOWN = {"plain, 50 steps": (None, 50), "sada": ("sada", 50), "s3@5": ("s3", 5), "plain, 5 steps": (None, 5)}
"""The rows of samples: accelerators, and the steps of the call."""
STUDENTS = {"2rf": "2-RF++", "slimflow": "SlimFlow", "dmd2": "DMD2", "phased-dmd": "Phased DMD"}
PLACES = {"2rf": (3, -13), "dmd2": (5, 4), "teacher": (-88, 30)}
"""Where the labels of students are, beside their last point, in points."""
ORANGE, GREY = "#d2491a", "#888888"


def read(name: str) -> dict[str, Any]:
    """Returns a record of this folder."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def samples(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Returns images (N, 3, H, W) of each row, of the same prompts and noise as in the demo."""
    with quiet([]):
        pipe: Any = zoo.load(settings["model"])
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, settings["scheduler"])
    prompts = zoo.prompts(settings["n"])[:COLUMNS]
    found = {}
    for name, (accel, steps) in SHOWN.items():
        accelerate(pipe, accel)
        found[name] = Sampler(pipe, prompts, steps, settings["guidance"], settings["seed"])()
    return found


def draw_samples(figure: Any, images: dict[str, Tensor], rows: dict[str, dict[str, Any]]) -> None:
    """Draws one line of pictures a method, with its speed-up and error."""
    grid = figure.subplots(len(images), COLUMNS, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for line, (name, pictures) in zip(grid, images.items(), strict=True):
        speed, error = rows[name]["speedup"]["median"], rows[name]["fidelity"]["rms"]
        note = f"{name}\n" + (f"{speed:.1f}x, error {error:.4f}" if error else "the reference")
        line[0].set_ylabel(note, rotation=0, ha="right", va="center", fontsize=9)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.movedim(0, -1).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])


def draw_errors(axis: Any, rows: dict[str, dict[str, Any]]) -> None:
    """Draws error against speed-up, with a line through the plain runs."""
    for kind, color, style in (("plain", GREY, "s--"), ("accelerated", ORANGE, "o")):
        chosen = [row for row in rows.values() if row["kind"] == kind]
        points = sorted((row["speedup"]["median"], row["fidelity"]["rms"], label_of(row)) for row in chosen)
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], style, color=color, markersize=5)
        for x, y, name in points:
            if all(not 1 < other / x < 1.1 for other, _, _ in points) or kind == "accelerated":
                axis.annotate(name, (x, y), (7, -9), textcoords="offset points", fontsize=8, color=color)
    axis.set(xscale="log", yscale="log", xlabel="speed-up over 50 steps", ylabel="RMS error of pixels")
    axis.set_xticks([2, 3, 5, 10], ["2x", "3x", "5x", "10x"])
    axis.set_yticks([0.001, 0.003, 0.01, 0.03, 0.1], [".001", ".003", ".01", ".03", ".1"])
    axis.minorticks_off()
    axis.set(xlim=(1.8, 18), ylim=(0.0007, 0.1))
    axis.set_title("without training: accelerated, and plain fewer steps", fontsize=9)


def draw_students(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draws the distance to the test images against the time of an image."""
    for name, color, style in [("teacher", GREY, "s--"), *((student, ORANGE, "o-") for student in STUDENTS)]:
        own = [row for row in rows if row["name"] == name]
        points = sorted((1000 * row["seconds"], row["fd"]["value"], row["steps"]) for row in own)
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], style, color=color, markersize=5)
        x, y, _ = points[-1]
        many = ", ".join(str(n) for _, _, n in points)
        text = f"{STUDENTS.get(name, name)}: {many} step{'s' if many != '1' else ''}"
        axis.annotate(text, (x, y), PLACES.get(name, (7, -3)), textcoords="offset points", fontsize=8,
                      color=color)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="ms an image", ylabel="Frechet distance")
    axis.set_xticks([3, 10, 30, 100, 300, 1000], ["3", "10", "30", "100", "300", "1000"])
    axis.set_yticks([0.2, 0.5, 1, 2], [".2", ".5", "1", "2"])
    axis.minorticks_off()
    axis.set(xlim=(2.5, 1100), ylim=(0.15, 3.2))
    axis.set_title("with training: students, and their teacher", fontsize=9)


def main() -> None:
    """Writes the picture."""
    demo = read("demo")
    rows = {label_of(row): row for row in demo["rows"]}
    figure = plt.figure(figsize=(11, 6.4))
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    above.subplots_adjust(left=0.19, right=0.99, top=0.99, bottom=0.02)
    draw_samples(above, samples(demo["settings"]), rows)
    first, second = below.subplots(1, 2)
    below.subplots_adjust(left=0.07, right=0.99, top=0.9, bottom=0.17, wspace=0.2)
    draw_errors(first, rows)
    draw_students(second, read("students-tiny-fashion-dit")["rows"])
    with whole(DOCS / "overview.png") as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()

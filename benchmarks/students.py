"""Students against their teacher at each number of steps: fidelity, diversity, labels and time, on one noise.

``python benchmarks/students.py measure 2rf=FOLDER ...`` writes ``students-tiny-fashion-dit.json`` here, and
``... tables`` the table in ``docs/``. What is measured is kept in ``--work``, so that it goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import kept
from torch import Tensor

from diffaccel import zoo
from diffaccel.cli.tables import Lines, markdown, shown
from diffaccel.eval import Extractor, Sampler, collect, open_images, prdc, protocol
from diffaccel.eval.classifier import accuracy_of, predict
from diffaccel.eval.fidelity import as_bytes, mean_estimate
from diffaccel.eval.provenance import machine, versions
from diffaccel.eval.sampler import default_conditions
from diffaccel.files import whole
from diffaccel.zoo.fashion import LABELS
from diffaccel.zoo.folders import quiet

FOLDER, TEACHER, SEED = Path(__file__).parent, "tiny-fashion-dit", 600_000_000
DOCS = FOLDER.parent / "docs"
REFERENCE = ("teacher", 50)
"""What all rows are compared with, on the same noise and labels."""

PER_LABEL = 8
"""Images of one label in the measurement of diversity."""


class Runs:
    """The images of each row, and their scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.count, self.batch, self.device = arguments.n, arguments.batch, arguments.device
        self.work, self.guidance = arguments.work / f"{TEACHER}-{arguments.n}", arguments.guidance
        self.extractor = Extractor(protocol("fashion"), self.device)
        self.reference = collect(open_images(zoo.reference()[0]), self.extractor, ("features",))
        self.pipes: dict[str, Any] = {}
        teacher = self.pipe(TEACHER)
        self.labels = default_conditions(TEACHER, teacher, self.count)
        self.numbers = [LABELS.index(label) for label in self.labels]

    def pipe(self, model: str) -> Any:
        """Returns a loaded pipeline."""
        if model not in self.pipes:
            with quiet([]):
                self.pipes[model] = zoo.load_pipeline(model).to(self.device)
            self.pipes[model].set_progress_bar_config(disable=True)
        return self.pipes[model]

    def images(self, name: str, model: str, steps: int) -> dict[str, Any]:
        """Returns the images of a row, some more of few labels, and the seconds an image."""
        pipe = self.pipe(model)
        scale = self.guidance if model == TEACHER else None

        def make() -> dict[str, Any]:
            Sampler(pipe, self.labels[:2], steps, scale, SEED, 2)(steps)  # kernels are chosen
            began = time.monotonic()
            made = Sampler(pipe, self.labels, steps, scale, SEED, self.count)(steps, self.batch)
            seconds = (time.monotonic() - began) / self.count
            few = [label for label in LABELS for _ in range(PER_LABEL)]
            more = Sampler(pipe, few, steps, scale, SEED + self.count, len(few))(steps, self.batch)
            return {
                "pixels": as_bytes(made).numpy(),
                "more": as_bytes(more).numpy(),
                "seconds": np.array(seconds),
            }

        return kept(self.work / f"{name}-{steps}.npz", make)

    def row(self, name: str, model: str, steps: int) -> dict[str, Any]:
        """Returns a row; differences are paired with the teacher's `REFERENCE` steps."""
        found = self.images(name, model, steps)
        pixels = torch.from_numpy(found["pixels"])
        features, distance, influence = self._frechet(pixels)
        other = self.images(REFERENCE[0], TEACHER, REFERENCE[1])["pixels"]
        _, best, theirs = self._frechet(torch.from_numpy(other))
        prediction = predict(pixels / 255)
        right = accuracy_of(
            prediction.class_logits.argmax(1), prediction.color_logits.argmax(1), self.numbers
        )
        nearest = prdc(features, self.reference.features)
        return {
            "name": name, "steps": steps, "fd": {"value": distance, "se": mean_estimate(influence).se},
            "fd_minus_teacher": {"value": distance - best, "se": mean_estimate(influence - theirs).se},
            "influence": [round(float(value), 6) for value in influence],
            **{key: nearest[key].to_dict() for key in ("precision", "recall", "coverage")},
            "diversity": self._diversity(torch.from_numpy(found["more"])),
            "class": right.class_accuracy.to_dict(), "color": right.color_accuracy.to_dict(),
            "seconds": found["seconds"], "parameters": self._parameters(model),
        }  # fmt: skip

    def _parameters(self, model: str) -> int:
        return sum(parameter.numel() for parameter in self.pipe(model).transformer.parameters())

    def _frechet(self, pixels: Tensor) -> tuple[Any, float, Any]:
        found = collect(open_images(pixels), self.extractor, ("features",))
        frechet = found.frechet(self.reference.reference)
        features = found.features[:]  # the file of them lives as long as ``found``
        return features, frechet.distance, frechet.influence(features)

    def _diversity(self, pixels: Tensor) -> dict[str, Any]:
        """Returns the mean distance of features of two images of one label."""
        found = collect(open_images(pixels), self.extractor, ("features",))
        groups = torch.as_tensor(found.features[:]).double().view(len(LABELS), PER_LABEL, -1)
        means = [torch.pdist(group).mean().item() for group in groups]
        return mean_estimate(means).to_dict()


def measure(arguments: argparse.Namespace) -> None:
    """Measures, and writes the record after each row."""
    runs, file = Runs(arguments), FOLDER / f"students-{TEACHER}.json"
    wanted = [("teacher", TEACHER, steps) for steps in (1, 2, 4, 8, 50)]
    for pair in arguments.students:
        name, _, folder = pair.partition("=")
        folder, _, steps = folder.partition(":")
        wanted += [(name, folder, int(count)) for count in (steps or "1,2,4").split(",")]
    rows: list[dict[str, Any]] = []
    for name, model, steps in wanted:
        rows.append(runs.row(name, model, steps))
        numbers = {key: shown(value) for key, value in rows[-1].items() if isinstance(value, dict)}
        print(name, steps, numbers, flush=True)
        record = {
            "teacher": TEACHER, "guidance": runs.guidance, "n": runs.count, "seed": SEED, "rows": rows,
            "protocol": "fashion", "machine": machine(torch.device(runs.device)), "versions": versions(),
        }  # fmt: skip
        with whole(file) as temporary:
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")


def tables() -> None:
    """Writes ``docs/students-table.md`` from the record."""
    record = json.loads((FOLDER / f"students-{TEACHER}.json").read_text(encoding="utf-8"))
    head = ["model", "steps", "weights", "FD", "FD - teacher, 50 steps", "precision", "recall", "coverage",
            "diversity of a label", "class right", "color right", "ms an image"]  # fmt: skip
    keys = ["fd", "fd_minus_teacher", "precision", "recall", "coverage", "diversity", "class", "color"]
    cells = []
    for row in record["rows"]:
        numbers = [shown(row[key], key == "fd_minus_teacher") for key in keys]
        millions = f"{row['parameters'] / 1e6:.1f} M"
        cells.append([row["name"], str(row["steps"]), millions, *numbers, f"{1000 * row['seconds']:.2f}"])
    device = record["machine"]["device"]
    text = (
        f"{record['n']} images a row, protocol `{record['protocol']}`, teacher with guidance "
        f"{record['guidance']:g}; labels and noise are the same in all rows; times of {device}.\n\n"
    )
    text += markdown(Lines("students", head, [("plain", line) for line in cells], ()))
    (DOCS / "students-table.md").write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "tables"))
    parser.add_argument("students", nargs="*", help="NAME=FOLDER, or NAME=FOLDER:STEPS,STEPS")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/students"))
    arguments = parser.parse_args()
    if arguments.what == "tables":
        tables()
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

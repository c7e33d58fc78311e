"""Students against their teacher at each number of steps: fidelity, diversity, labels, time, on one noise.

``python benchmarks/students.py measure 2rf=FOLDER ...`` writes ``students-tiny-fashion-dit.json`` here, or
that of another ``--teacher``, and ``... tables`` the tables in ``docs/``. What is measured is kept in
``--work``, so that it goes on.
"""

import argparse
import functools
import inspect
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frechet import frechet_of
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
from diffaccel.pipelines.run import denoisers_of
from diffaccel.zoo.fashion import LABELS, TEMPLATES
from diffaccel.zoo.folders import quiet

FOLDER, SEED = Path(__file__).parent, 600_000_000
DOCS = FOLDER.parent / "docs"
REFERENCE = ("teacher", 50)
"""What all rows are compared with, on the same noise and labels."""

PER_LABEL = 8
"""Images of one label in the measurement of diversity."""

TIMED = 64
"""Images of a round of the measurement of time."""

PAIRS = (
    ("2rf", "2rf-uniform"), ("slimflow", "slimflow-constant"), ("phased-dmd", "dmd2"),
    ("phased-dmd-full", "dmd2"),
)  # fmt: skip
"""Students whose differences are a row of the second table."""


class Runs:
    """The images of each row, and their scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.count, self.batch, self.device = arguments.n, arguments.batch, arguments.device
        self.times = arguments.times
        self.teacher, self.guidance = arguments.teacher, arguments.guidance
        self.work = arguments.work / f"{self.teacher}-{arguments.n}"
        self.extractor = Extractor(protocol("fashion"), self.device)
        self.reference = collect(open_images(zoo.reference()[0]), self.extractor, ("features",))
        self.pipes: dict[str, Any] = {}
        self.conditions = default_conditions(self.teacher, self.pipe(self.teacher), self.count)
        self.numbers = zoo.labels(self.count)

    def pipe(self, model: str) -> Any:
        """Returns a loaded pipeline."""
        if model not in self.pipes:
            with quiet([]):
                self.pipes[model] = zoo.load_pipeline(model).to(self.device)
            self.pipes[model].set_progress_bar_config(disable=True)
        return self.pipes[model]

    def images(self, name: str, model: str, steps: int) -> dict[str, Any]:
        """Returns the images of a row, and some more of each label."""
        pipe = self.pipe(model)
        scale = self.guidance if model == self.teacher else None
        prompted = "prompt" in inspect.signature(pipe.__call__).parameters
        words = [TEMPLATES[-1].format(label) for label in LABELS] if prompted else LABELS

        def make() -> dict[str, Any]:
            made = Sampler(pipe, self.conditions, steps, scale, SEED, self.count)(steps, self.batch)
            few = [word for word in words for _ in range(PER_LABEL)]
            more = Sampler(pipe, few, steps, scale, SEED + self.count, len(few))(steps, self.batch)
            return {"pixels": as_bytes(made).numpy(), "more": as_bytes(more).numpy()}

        return kept(self.work / f"{name}-{steps}.npz", make)

    def seconds(self, name: str, model: str, steps: int) -> float | None:
        """Returns the time of an image, the median of three rounds, or None where it is not wanted."""
        file = self.work / f"{name}-{steps}-seconds-{self.device}.npz"
        scale = self.guidance if model == self.teacher else None

        def make() -> dict[str, Any]:
            count = min(TIMED, self.count)
            sampler, rounds = Sampler(self.pipe(model), self.conditions[:count], steps, scale, SEED), []
            sampler(steps, count, stop=2)  # kernels are chosen
            for _ in range(3):
                began = time.monotonic()
                sampler(steps, count)
                rounds.append((time.monotonic() - began) / count)
            return {"seconds": np.array(statistics.median(rounds))}

        return float(kept(file, make)["seconds"]) if self.times or file.exists() else None

    def row(self, name: str, model: str, steps: int) -> dict[str, Any]:
        """Returns a row; differences are paired with the teacher's `REFERENCE` steps."""
        found = self.images(name, model, steps)
        pixels = torch.from_numpy(found["pixels"])
        features, distance, influence = frechet_of(pixels, self.extractor, self.reference)
        best, theirs = self._best
        prediction = predict(pixels / 255)
        right = accuracy_of(
            prediction.class_logits.argmax(1), prediction.color_logits.argmax(1), self.numbers
        )
        spread = self._diversity(torch.from_numpy(found["more"]))
        nearest = prdc(features, self.reference.features)
        return {
            "name": name, "steps": steps, "fd": {"value": distance, "se": mean_estimate(influence).se},
            "fd_minus_teacher": {"value": distance - best, "se": mean_estimate(influence - theirs).se},
            "influence": [round(float(value), 6) for value in influence],
            **{key: nearest[key].to_dict() for key in ("precision", "recall", "coverage")},
            "diversity": mean_estimate(spread).to_dict(), "spread": spread,
            "class": right.class_accuracy.to_dict(), "color": right.color_accuracy.to_dict(),
            "seconds": self.seconds(name, model, steps), "parameters": self._parameters(model),
        }  # fmt: skip

    @functools.cached_property
    def _best(self) -> tuple[float, Any]:
        """The distance of `REFERENCE`, and the influence of its images."""
        name, steps = REFERENCE
        pixels = self.images(name, self.teacher, steps)["pixels"]
        return frechet_of(pixels, self.extractor, self.reference)[1:]

    def _parameters(self, model: str) -> int:
        parts = denoisers_of(self.pipe(model)).values()
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    def _diversity(self, pixels: Tensor) -> list[float]:
        """Returns the mean distance of the features of two images of a label, for each label."""
        found = collect(open_images(pixels), self.extractor, ("features",))
        groups = torch.tensor(found.features[:]).double().view(len(LABELS), PER_LABEL, -1)
        return [torch.pdist(group).mean().item() for group in groups]


def measure(arguments: argparse.Namespace) -> None:
    """Measures, and writes the record after each row."""
    runs, file = Runs(arguments), FOLDER / f"students-{arguments.teacher}.json"
    wanted = [("teacher", arguments.teacher, steps) for steps in (1, 2, 4, 50)]
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
            "teacher": arguments.teacher, "guidance": runs.guidance, "n": runs.count, "seed": SEED,
            "rows": rows, "protocol": "fashion", "machine": machine(torch.device(runs.device)),
            "versions": versions(),
        }  # fmt: skip
        with whole(file) as temporary:
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")


def tables() -> None:
    """Writes ``docs/students-table.md`` from the records."""
    texts = []
    for file in sorted(FOLDER.glob("students-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        texts += [_table(record), _differences(record["rows"])]
    (DOCS / "students-table.md").write_text("\n".join(filter(None, texts)), encoding="utf-8")


def _table(record: dict[str, Any]) -> str:
    head = ["model", "steps", "weights", "FD", "FD - teacher, 50 steps", "precision", "recall", "coverage",
            "diversity of a label", "class right", "color right", "ms an image"]  # fmt: skip
    keys = ["fd", "fd_minus_teacher", "precision", "recall", "coverage", "diversity", "class", "color"]
    cells = []
    for row in record["rows"]:
        numbers = [shown(row[key], key == "fd_minus_teacher") for key in keys]
        millions, seconds = f"{row['parameters'] / 1e6:.1f} M", row["seconds"]
        time_taken = "" if seconds is None else f"{1000 * seconds:.1f}"
        cells.append([row["name"], str(row["steps"]), millions, *numbers, time_taken])
    text = (
        f"{record['n']} images a row, protocol `{record['protocol']}`, teacher `{record['teacher']}` with "
        f"guidance {record['guidance']:g}; labels and noise are the same in all rows; times of {TIMED} "
        f"images a call, {record['machine']['device']}, {record['machine'].get('threads', 1)} threads.\n\n"
    )
    return text + markdown(Lines("students", head, [("plain", line) for line in cells], ())) + "\n"


def _differences(rows: list[dict[str, Any]]) -> str:
    """Returns a table of the paired differences of students."""
    found = {(row["name"], row["steps"]): row for row in rows}
    cells = []
    for ours, theirs in PAIRS:
        for steps in sorted(count for name, count in found if name == ours):
            if (theirs, steps) in found:
                one, other = found[ours, steps], found[theirs, steps]
                fd = one["fd"]["value"] - other["fd"]["value"]
                error = mean_estimate(np.subtract(one["influence"], other["influence"])).se
                spread = mean_estimate(np.subtract(one["spread"], other["spread"])).to_dict()
                numbers = [shown({"value": fd, "se": error}, True), shown(spread, True)]
                cells.append([f"{ours} - {theirs}", str(steps), *numbers])
    head = ["difference, paired", "steps", "FD", "diversity of a label"]
    return (
        markdown(Lines("differences", head, [("plain", line) for line in cells], ())) + "\n" if cells else ""
    )


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "tables"))
    parser.add_argument("students", nargs="*", help="NAME=FOLDER, or NAME=FOLDER:STEPS,STEPS")
    parser.add_argument("--teacher", choices=zoo.names(), default="tiny-fashion-dit")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", action="store_true", help="measure the time, too; on an idle machine")
    parser.add_argument("--work", type=Path, default=Path("out/students"))
    arguments = parser.parse_args()
    if arguments.what == "tables":
        tables()
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

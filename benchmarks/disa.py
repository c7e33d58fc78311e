"""DiSA on a MAR model: annealed head steps against as many constant ones, and against rising ones.

``python benchmarks/disa.py MODEL`` writes ``disa-NAME.json`` here, and ``... tables`` the table in ``docs/``.
It goes on where it was stopped: what is measured is kept in ``--work``.  All rows share labels and noise.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frechet import frechet_of
from kept import kept

from diffaccel import zoo
from diffaccel.cli.tables import Lines, markdown, shown
from diffaccel.eval import Extractor, collect, open_images, protocol
from diffaccel.eval.classifier import predict
from diffaccel.eval.fidelity import as_bytes, mean_estimate
from diffaccel.eval.provenance import machine, versions
from diffaccel.files import whole
from diffaccel.pipelines import attached
from diffaccel.pipelines.autoregressive import ARStep
from diffaccel.pipelines.disa import StepAnnealing
from diffaccel.zoo.fashion import CLASSES
from diffaccel.zoo.folders import quiet

FOLDER, SEED, HEAD_STEPS = Path(__file__).parent, 400_000_000, 100
DOCS = FOLDER.parent / "docs"


class Rising(StepAnnealing):
    """Annealing the wrong way round: as many head steps, the fewest first."""

    def steps(self, step: ARStep, error: Any = None) -> int:
        """Returns what the mirrored step would get."""
        return super().steps(replace(step, index=step.count - 1 - step.index), error)


def equal(steps: int) -> int:
    """Returns the constant number of head steps whose sum is the nearest to that of DiSA 50 to 5."""
    linear = StepAnnealing(50, 5)
    total = sum(linear.steps(ARStep(k, (1,) * steps)) for k in range(steps))
    return round(total / steps)


def methods(steps: int, tolerances: list[float]) -> dict[str, Any]:
    """Returns the rows of a number of autoregressive steps: names and accelerators."""
    constant = equal(steps)
    return {
        f"{HEAD_STEPS} head steps": None,
        "DiSA 50 to 5": StepAnnealing(50, 5),
        f"constant {constant}": StepAnnealing(constant, constant),
        "rising 5 to 50": Rising(50, 5),
        "cosine 50 to 5": StepAnnealing(50, 5, "cosine"),
        "two-stage 50, 5": StepAnnealing(50, 5, "two-stage"),
        **{f"auto {value:g}": StepAnnealing(50, 2, "auto", tolerance=value) for value in tolerances},
        "DiSA 50 to 5, trunk every 2nd step": [StepAnnealing(50, 5), "reuse"],
        "constant 10": StepAnnealing(10, 10), "constant 5": StepAnnealing(5, 5),
    }  # fmt: skip


class Runs:
    """The images of each row, and their scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model, count, self.batch = arguments.model, arguments.n, arguments.batch
        self.call = {"guidance_scale": arguments.guidance, "temperature": arguments.temperature}
        name = f"{Path(model).name}-{count}-{arguments.guidance:g}-{arguments.temperature:g}"
        self.work = arguments.work / name
        with quiet([]):
            self.pipe: Any = zoo.load_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.numbers = zoo.labels(count)
        self.extractor = Extractor(protocol("fashion"))
        self.reference = collect(open_images(zoo.reference()[0]), self.extractor)

    def images(self, steps: int, name: str, accel: Any) -> dict[str, Any]:
        """Returns the images of a row, as bytes, and the evaluations of its head an image."""

        def make() -> dict[str, Any]:
            parts, counts = [], []
            whole_head = StepAnnealing(HEAD_STEPS, HEAD_STEPS)
            with attached(self.pipe, accel if accel is not None else whole_head):
                for first in range(0, len(self.numbers), self.batch):
                    parts.append(self._sample(steps, first, min(first + self.batch, len(self.numbers))))
                    counts.append(self.pipe.accel.report.counts["head"].evaluated)
            return {"pixels": as_bytes(torch.cat(parts)).numpy(), "head": np.mean(counts)}

        return kept(self.work / f"{steps}-{name.replace(' ', '-')}.npz", make)

    def _sample(self, steps: int, first: int, stop: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(SEED + n) for n in range(first, stop)]
        images = self.pipe(self.numbers[first:stop], num_inference_steps=steps, generator=generators,
                           output_type="np", **self.call).images  # fmt: skip
        return torch.as_tensor(images).movedim(-1, 1)

    def row(self, steps: int, name: str, accel: Any, base: str) -> dict[str, Any]:
        """Returns a row of the table; the difference is paired with the first row of the same steps."""
        found = self.images(steps, name, accel)
        base_pixels = self.images(steps, base, None)["pixels"]
        _, value, influence = frechet_of(found["pixels"], self.extractor, self.reference)
        _, plain, other = frechet_of(base_pixels, self.extractor, self.reference)
        prediction = predict(torch.from_numpy(found["pixels"]) / 255)
        right = prediction.class_logits.argmax(1) == torch.tensor(self.numbers) % len(CLASSES)
        return {
            "steps": steps, "method": name, "head": found["head"],
            "fd": {"value": value, "se": mean_estimate(influence).se},
            "fd_minus_plain": {"value": value - plain, "se": mean_estimate(influence - other).se},
            "class": mean_estimate(right.double().tolist()).to_dict(),
        }  # fmt: skip

    def speed(self, steps: int, rows: dict[str, Any], rounds: int) -> dict[str, float]:
        """Returns seconds an image of some rows: medians of interleaved rounds of one batch of 16."""
        taken: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(rounds):
            for name, accel in rows.items():
                with attached(self.pipe, accel):
                    begin = time.perf_counter()
                    self._sample(steps, 0, 16)
                    taken[name].append((time.perf_counter() - begin) / 16)
        return {name: statistics.median(values) for name, values in taken.items()}


def measure(arguments: argparse.Namespace) -> None:
    """Measures, and writes the record after each row."""
    runs = Runs(arguments)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, dict[str, float]] = {}
    for steps in arguments.steps:
        chosen = methods(steps, arguments.tolerances)
        base = next(iter(chosen))
        for name, accel in chosen.items():
            rows.append(runs.row(steps, name, accel, base))
            print(steps, name, rows[-1]["head"], *(shown(rows[-1][key]) for key in ("fd", "class")),
                  shown(rows[-1]["fd_minus_plain"], True), flush=True)  # fmt: skip
        if arguments.rounds:
            timed = {name: chosen[name] for name in (*list(chosen)[:3], "auto 0.2", list(chosen)[-3])}
            seconds[str(steps)] = runs.speed(steps, timed, arguments.rounds)
            print(seconds[str(steps)], flush=True)
        record = {
            "model": Path(arguments.model).name, "n": arguments.n, "seed": SEED, "protocol": "fashion",
            "call": runs.call, "rows": rows, "seconds": seconds,
            "machine": machine(torch.device("cpu")), "versions": versions(),
        }  # fmt: skip
        with whole(_record(arguments.model)) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def tables(model: str) -> None:
    """Writes ``docs/disa-table.md`` from the record."""
    record = json.loads(_record(model).read_text(encoding="utf-8"))
    cells = [[str(row["steps"]), row["method"], f"{row['head']:.0f}", shown(row["fd"]),
              shown(row["fd_minus_plain"], True), shown(row["class"])] for row in record["rows"]]  # fmt: skip
    head = ["AR steps", "method", "head evaluations", "FD", "FD - plain", "class"]
    text = markdown(Lines("disa", head, [("plain", line) for line in cells], ()))
    (DOCS / "disa-table.md").write_text(f"{text}\n", encoding="utf-8")


def _record(model: str) -> Path:
    return FOLDER / f"disa-{Path(model).name}.json"


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny-fashion-mar")
    parser.add_argument("what", nargs="?", default="measure", choices=("measure", "tables"))
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--tolerances", type=float, nargs="*", default=[0.4, 0.2, 0.1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("out/disa"))
    arguments = parser.parse_args()
    if arguments.what == "tables":
        tables(arguments.model)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

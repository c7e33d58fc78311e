"""LCSC on the raw checkpoints of a distillation, against known averages and against more training.

``python benchmarks/combination.py measure out/students/dit-lcsc`` writes the record here, row by row, and
``... tables`` the table in ``docs/``. The run is that of recipes/students/dit-lcsc.yaml.
What is measured is kept in ``--work``, searches too, so that it goes on.

Searches see one half of the reference and noise of their own; all figures of the table are of fresh noise
against the other half. Differences are paired: the same noise and labels in all rows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import kept

from diffaccel.cli.tables import Lines, markdown, shown
from diffaccel.distill import averages
from diffaccel.distill.checkpoint_files import expand, open_checkpoint
from diffaccel.distill.checkpoint_matrix import CheckpointMatrix
from diffaccel.distill.combination import Combination
from diffaccel.distill.combine import Plan, host_of_run, judge_of
from diffaccel.distill.deployment import Deployment, images_needed
from diffaccel.distill.runs import resume
from diffaccel.distill.validation import conditions_of, student_pipe
from diffaccel.eval import Frechet, Gaussian, collect, kid, kid_difference, open_images, prdc
from diffaccel.eval.fidelity import mean_estimate
from diffaccel.eval.provenance import machine, plain, versions
from diffaccel.files import whole

FOLDER = Path(__file__).parent
FILE, DOCS = FOLDER / "combination-tiny-fashion-dit.json", FOLDER.parent / "docs" / "combination-table.md"
BASE = ("full", "best EMA")
"""The row that the others are compared with."""


class Bench:
    """The student of a run, and what its combinations score."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        self.run = resume(arguments.run, training=False)
        self.host = host_of_run(self.run, self.device)
        self.plan = Plan(images=arguments.images, protocol="fashion", batch=arguments.batch)
        self.judge = judge_of(self.plan, None, self.device)
        self.work = arguments.work / f"{self.run.store.digest[:8]}-{arguments.images}"
        self.count = images_needed(arguments.images)
        self.rows: list[dict[str, Any]] = []
        self.features: dict[tuple[str, str], np.ndarray] = {}

    def deployment(self, pipe: Any, steps: int, write: Any = lambda rows: None) -> Deployment:
        """Returns the score of a pipeline, on the noise and labels of all rows."""
        labels = conditions_of(self.run, self.count)
        return Deployment(pipe, write, self.judge, steps, images=self.arguments.images, conditions=labels,
                          guidance=self.host.guidance, batch=self.arguments.batch)  # fmt: skip

    def add(self, window: str, name: str, deployment: Deployment, coefficients: Any = None,
            **more: Any) -> None:  # fmt: skip
        """Adds a row: what held-out images score, and the paired difference from `BASE`."""

        def make() -> dict[str, Any]:
            if coefficients is not None:
                deployment.write(coefficients)
            found = collect(open_images(deployment.images(2)), self.judge.extractor, ("features",))
            assert found.features is not None
            return {"features": found.features[0 : found.features.shape[0]]}

        file = self.work / window / f"{name.replace(' ', '-')}.npz"
        self.features[window, name] = np.asarray(kept(file, make)["features"])
        if coefficients is not None:
            more["coefficients"] = np.asarray(coefficients)[0].tolist()
        self.rows.append(self.figures({"window": window, "name": name, **more}))
        self.write()

    def figures(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns a row with its figures."""
        held_out, own = self.judge.reference[1], self.features[row["window"], row["name"]]
        distance, influence = self._frechet(own)
        nearest = prdc(own, held_out.features, 5)
        found = {"fd": {"value": distance, "se": mean_estimate(influence).se},
                 "kid": kid(own, held_out.features).to_dict(),
                 **{name: nearest[name].to_dict() for name in ("precision", "recall")}}  # fmt: skip
        if (other := self.features.get(BASE)) is not None:
            best, theirs = self._frechet(other)
            found["fd_minus"] = {"value": distance - best, "se": mean_estimate(influence - theirs).se}
            found["kid_minus"] = kid_difference(other, own, held_out.features).to_dict()
        return {**row, **found}

    def _frechet(self, features: np.ndarray) -> tuple[float, np.ndarray]:
        frechet = Frechet(Gaussian.of(features), self.judge.reference[1].reference)
        return frechet.distance, frechet.influence(features)

    def write(self) -> None:
        """Writes the record."""
        record = plain({
            "run": self.run.config.method, "images": self.run.trainer.images, "base": list(BASE),
            "search_images": self.arguments.images,
            "held_out_images": len(next(iter(self.features.values()))),
            "rows": self.rows, "protocol": "fashion",
            "machine": machine(torch.device(self.device)), "versions": versions(),
        })  # fmt: skip
        with whole(self.arguments.record) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def window(self, window: str, files: list[Path], budgets: list[int]) -> None:
        """Adds the rows of some checkpoints."""
        matrix = CheckpointMatrix([open_checkpoint(file) for file in files], device=self.device)
        targets, count = matrix.targets(self.host.network), matrix.count
        deployment = self.deployment(self.host.pipe, 1, lambda rows: matrix.write(rows, targets))

        def searched(method: str, budget: int) -> Combination:
            file = self.work / window / f"search-{method}.json"
            found = Combination(count, deployment, method, budget=budget, file=file,
                                facts={"checkpoints": matrix.digest})  # fmt: skip
            found.search(lambda done: print(window, method, f"{found.done} of {budget}", flush=True))
            return found

        ema, weighted = searched("ema", self.arguments.rates), searched("mwa", count + 5)
        kinds = {**ema.averages(), **weighted.averages()}
        scores = {entry.candidate: entry.score for entry in weighted.engine.scored}
        metrics = [scores[weighted.space.legal(averages.one_hot(count, n))] for n in range(count)]
        rows, score = kinds["ema"]
        self.add(window, "best EMA", deployment, rows, search=score, evaluations=ema.done, checkpoints=count)
        for name, kind, spent in (("last", "last", 0), ("best single", "checkpoint", count),
                                  ("uniform", "uniform", 0), ("MWA", "mwa", count + 5)):  # fmt: skip
            rows, score = kinds[kind]
            self.add(window, name, deployment, rows, search=score, evaluations=spent, checkpoints=count)
        if count >= 3:
            rows = averages.swad(metrics)[None]
            self.add(window, "SWAD", deployment, rows, evaluations=count, checkpoints=count)
        for method in self.arguments.methods:
            for budget in budgets:
                more = self.winner(window, method, budget, searched)
                rows = more.pop("coefficients")
                name = f"{method.upper()} {budget}"
                self.add(window, name, deployment, rows, evaluations=budget, checkpoints=count, **more)

    def winner(self, window: str, method: str, budget: int, searched: Any) -> dict[str, Any]:
        """Returns what a search has found, its scores on the noise of the search and on fresh noise."""

        def make() -> dict[str, Any]:
            found = searched(method, budget).winner(budget)
            return {"coefficients": found.coefficients, "search": found.search, "fresh": found.fresh}

        return dict(kept(self.work / window / f"winner-{method}-{budget}.npz", make))

    def students(self) -> None:
        """Adds the plain student, the run's own moving average, in one step and in two."""
        role = self.run.trainer.roles["student"]
        with role.averaged() as network:
            for steps in (1, 2):
                pipe = student_pipe(self.run.pipe, self.host.component, network, self.run.method, [1, 2])
                pipe.to(self.device)
                self.add("full", f"plain student {steps} steps", self.deployment(pipe, steps), steps=steps)


def measure(arguments: argparse.Namespace) -> None:
    """Measures the last checkpoints of a run, and those that half of its training would have had."""
    bench = Bench(arguments)
    images, files = bench.run.trainer.images, expand([arguments.run])
    done = {file: int(file.stem.partition("-")[2]) for file in files}
    start = max((0, *bench.run.method.boundaries))  # of the last phase, whose checkpoints are of one kind
    for window, stop, budgets in (("full", images, arguments.budgets),
                                  ("half", images / 2, arguments.half_budgets)):  # fmt: skip
        chosen = [file for file in files if start < done[file] <= stop][-arguments.last :]
        bench.window(window, chosen, budgets)
        if window == "full":
            bench.students()


def tables() -> None:
    """Writes ``docs/combination-table.md`` from the record."""
    record = json.loads(FILE.read_text(encoding="utf-8"))
    head = ["training", "weights", "steps", "evaluations", "FD in the search", "FD", "FD - best EMA", "KID",
            "KID - best EMA", "precision", "recall"]  # fmt: skip
    cells = []
    for row in record["rows"]:
        search = f"{row['search']:.4g}" if "search" in row else ""
        numbers = [shown(row.get(key), key.endswith("minus"))
                   for key in ("fd", "fd_minus", "kid", "kid_minus", "precision", "recall")]  # fmt: skip
        cells.append([row["window"], row["name"], str(row.get("steps", 1)), str(row.get("evaluations", "")),
                      search, *numbers])  # fmt: skip
    text = (
        f"Searches: {record['search_images']} images, one half of the reference; all else: "
        f"{record['held_out_images']} images of fresh noise against the other half, protocol "
        f"`{record['protocol']}`, paired standard errors. `full`: the last checkpoints of {record['images']} "
        f"images of training; `half`: the last ones of half of it. {record['machine']['device']}.\n\n"
    )
    text += markdown(Lines("combination", head, [("plain", line) for line in cells], ()))
    DOCS.write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "tables"))
    parser.add_argument("run", nargs="?", type=Path, help="the folder of the run")
    parser.add_argument("--images", type=int, default=1000, help="of an evaluation; 5 times as many held out")
    parser.add_argument("--budgets", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--half-budgets", type=int, nargs="+", default=[300], help="of half the training")
    parser.add_argument("--methods", nargs="+", default=["lcsc", "lcsc-ga"])
    parser.add_argument("--rates", type=int, default=60, help="of moving averages")
    parser.add_argument("--last", type=int, default=40, help="checkpoints of a window")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/combination"))
    parser.add_argument("--record", type=Path, default=FILE)
    arguments = parser.parse_args()
    if arguments.what == "tables":
        tables()
    elif arguments.run is None:
        parser.error("measure needs the folder of a run")
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

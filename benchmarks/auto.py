"""Plans on prompts and noise that they were not tuned on: does accel="auto" keep its budgets?

``python benchmarks/auto.py tiny-fashion-sd`` tunes for each budget with half of the model's 90 labels,
applies the plan to the other half, and writes ``auto-tiny-fashion-sd.json`` here; ``tables`` as a second
argument writes ``docs/auto-table.md`` from all such records. It goes on where it was stopped: what is
measured is kept in ``--work``. A tuning that went on is marked: its seconds are not those of a whole one.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import kept
from scipy.stats import binomtest

from diffaccel import zoo
from diffaccel.cli.generate import load
from diffaccel.cli.tables import Lines, markdown
from diffaccel.cli.tune import NoPlan, Settings, tune
from diffaccel.eval import Sampler, Timing, interleave, timed
from diffaccel.eval.budget import SPEED, Budget, Judge
from diffaccel.eval.provenance import machine, settings_digest, versions
from diffaccel.files import whole
from diffaccel.pipelines import attached
from diffaccel.zoo.fashion import TEMPLATES
from diffaccel.zoo.folders import quiet

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
SEED = 900_000_000  # far from the seeds of the tuning
BUDGETS = ("psnr>=40", "relative<=0.05", "ssim>=0.98", "speedup>=2")


def halves(model: str) -> tuple[list[str], list[str]]:
    """Returns the conditions of the tuning and others: each label is in one half, with all its wordings."""
    names = random.Random(0).sample(zoo.LABELS, len(zoo.LABELS))
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    if model == "tiny-fashion-dit":
        return parts
    tuned, held_out = ([form.format(name) for form in TEMPLATES for name in part] for part in parts)
    return tuned, held_out


class HeldOut:
    """Images of other labels and noise, by the plain pipeline and by plans."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        with quiet([]):
            self.pipe = load(arguments.model, arguments.scheduler, arguments.device, "float32")
        rng = random.Random(1)
        conditions = [rng.choice(halves(arguments.model)[1]) for _ in range(arguments.n)]
        self.sampler = Sampler(self.pipe, conditions, arguments.steps, arguments.guidance, SEED, arguments.n)

    def images(self, plan: Path | None) -> dict[str, np.ndarray]:
        """Returns the images, and the evaluations of each."""
        text = "" if plan is None else plan.read_text(encoding="utf-8")
        name = f"images-{self.arguments.n}-{settings_digest({'plan': text})[:12]}"

        def make() -> dict[str, Any]:
            with attached(self.pipe, [] if plan is None else str(plan)):
                made = self.sampler(None, self.arguments.batch).clamp(0, 1)
            run = sum(size * report.evaluated for size, report in self.sampler.reports) / len(made)
            return {"images": made.numpy(), "evaluated": run}

        return kept(self.work / f"{name}.npz", make)

    def speedup(self, plan: Path) -> Timing:
        """Returns the speed-up of one batch, in interleaved rounds."""
        taken: tuple[list[float], list[float]] = ([], [])
        batch, device = self.arguments.batch, torch.device(self.arguments.device)

        def task(accel: str | None) -> float:
            with attached(self.pipe, accel):
                return timed(lambda: self.sampler(None, batch, 0, batch), device)[1]

        tasks = [lambda: task(None), lambda: task(str(plan))]
        interleave(tasks, self.arguments.rounds, lambda turn, place, seconds: taken[place].append(seconds))
        return Timing(tuple(a / b for a, b in zip(*taken, strict=True)))

    def row(self, budget: Budget, plan: Path) -> dict[str, Any]:
        """Returns how a plan keeps its budget on these images."""
        plain, ours = self.images(None), self.images(plan)
        judge = Judge(budget.quality, self.arguments.device)
        losses = budget.losses(judge(*(torch.from_numpy(part["images"]) for part in (ours, plain))))
        speedup = self.speedup(plan)
        content = json.loads(plan.read_text(encoding="utf-8"))
        limit = (
            budget.largest if budget.metric != SPEED else budget.loss_of(float(content["promise"]["bound"]))
        )
        met = int(np.sum(losses <= limit))
        low, high = binomtest(met, len(losses)).proportion_ci(0.95)
        return {
            "budget": str(budget), "label": content["label"], "promise": content["promise"],
            "cost": content["cost"], "images": len(losses), "met": met, "interval": [low, high],
            "metric": budget.quality, "worst": budget.value_of(float(losses.max())),
            "evaluated": float(ours["evaluated"]), "evaluated_plain": float(plain["evaluated"]),
            "speedup": speedup.median, "speedups": speedup.values,
        }  # fmt: skip


def tuned(arguments: argparse.Namespace, text: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the plan for a budget, and the seconds of its tuning; made now if it was not."""
    folder = work / text.replace("<", "").replace(">", "").replace("=", "-")
    prompts, file = folder / "prompts.txt", folder / "tuned.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        prompts.write_text("\n".join(halves(arguments.model)[0]), encoding="utf-8")
        cold = not (folder / "measured").exists()
        settings = Settings(
            arguments.model, text, arguments.steps, arguments.guidance, arguments.scheduler, prompts,
            arguments.images, arguments.batch, arguments.candidates, arguments.rounds, arguments.coverage,
            device=arguments.device,
        )  # fmt: skip
        record = tune(settings, folder)
        facts = {"seconds": record["seconds"], "cold": cold, "tests": record["tests"]}
        with whole(file) as temporary:
            temporary.write_text(json.dumps(facts), encoding="utf-8")
    return folder / "plan.json", json.loads(file.read_text(encoding="utf-8"))


def measure(arguments: argparse.Namespace) -> None:
    """Tunes and measures, and writes the record after each budget."""
    settings = {
        key: value for key, value in vars(arguments).items() if key not in ("work", "what", "budgets")
    }
    work = arguments.work / f"{arguments.model}-{settings_digest(settings)[:8]}"
    held_out, rows = HeldOut(arguments, work), []
    for text in arguments.budgets:
        try:
            plan, facts = tuned(arguments, text, work)
            rows.append({**held_out.row(Budget.read(text), plan), "tuning": facts})
        except NoPlan as error:
            rows.append({"budget": text, "failure": str(error)})
        print(json.dumps({key: value for key, value in rows[-1].items() if key not in ("promise", "cost")}),
              flush=True)  # fmt: skip
        record = {**settings, "rows": rows, "machine": machine(torch.device(arguments.device)),
                  "versions": versions()}  # fmt: skip
        with whole(FOLDER / f"auto-{arguments.model}.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def tables() -> None:
    """Writes ``docs/auto-table.md`` from all records."""
    head = ["model", "budget", "plan", "evaluations", "speed-up", "held out: images within", "worst",
            "tuning"]  # fmt: skip
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("auto-*.json"))]
    lines = [_cells(record, row) for record in records for row in record["rows"]]
    text = markdown(Lines("auto", head, [("plain", cells) for cells in lines], ()))
    (DOCS / "auto-table.md").write_text(text, encoding="utf-8")


def _cells(record: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Returns a row of the table."""
    if "failure" in row:
        return [record["model"], row["budget"], row["failure"], *["-"] * 5]
    low, high = row["interval"]
    bound = float(row["promise"]["bound"])
    within = "" if row["metric"] in row["budget"] else f" {row['metric']} of {bound:.3g}"
    seconds = f"{row['tuning']['seconds']:.0f} s" + ("" if row["tuning"]["cold"] else ", went on")
    return [
        record["model"], row["budget"], f"`{row['label']}`",
        f"{row['evaluated']:.3g} of {row['evaluated_plain']:.3g}", f"{row['speedup']:.2f}",
        f"{row['met']} of {row['images']} ({100 * low:.1f} to {100 * high:.1f} %){within}",
        f"{row['worst']:.3g}", seconds,
    ]  # fmt: skip


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("tiny-fashion-sd", "tiny-fashion-dit"))
    parser.add_argument("what", nargs="?", default="measure", choices=("measure", "tables"))
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--scheduler", default=None)
    parser.add_argument("--images", type=int, default=64, help="of the final test of the tuning")
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--coverage", type=float, default=0.95)
    parser.add_argument("--n", type=int, default=200, help="images that are held out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/auto"))
    arguments = parser.parse_args()
    if arguments.what == "tables":
        tables()
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

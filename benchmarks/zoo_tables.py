"""The zoo's own tables: a model at several step counts, and every scheduler of diffusers that runs on it.

``python benchmarks/zoo_tables.py measure tiny-fashion-dit`` writes ``benchmarks/zoo-tiny-fashion-dit.json``,
and goes on where an earlier run was stopped; ``... tables`` writes the tables of all such files to
``docs/zoo.md``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers

from diffaccel.cli.evaluate import Settings, evaluate
from diffaccel.cli.tables import Lines, eval_lines, markdown
from diffaccel.errors import DiffaccelError

FOLDER = Path(__file__).parent
GUIDANCE = {"tiny-fashion-sd": 2.5, "tiny-fashion-dit": 2.5}
TEACHER = {"tiny-fashion-sd": "dpm++", "tiny-fashion-dit": None}
NOT_SAMPLERS = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "SchedulerMixin")


def schedulers() -> list[str]:
    """Returns the names of diffusers' schedulers that sample."""
    found = [name for name in dir(diffusers) if name.endswith("Scheduler") and name not in NOT_SAMPLERS]
    return [name for name in found if _is_scheduler(getattr(diffusers, name, None))]


def _is_scheduler(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)


def measure(model: str, count: int, few: int, work: Path, seed: int, device: str) -> dict[str, Any]:
    """Measures a model, and returns the record.

    Arguments:
        model: A model of the zoo.
        count: Images at each step count.
        few: Images of each scheduler.
        work: The folder of the parts.
        seed: The seed of the first image.
        device: Where it runs.
    """
    common = {"guidance": GUIDANCE[model], "protocol": "fashion", "seed": seed,
              "batch": 50 if device == "cpu" else 500, "device": device}  # fmt: skip
    settings = Settings(
        model, steps=50, plain_steps=(10, 20, 100), scheduler=TEACHER[model], n=count, **common
    )
    steps = evaluate(settings, work / model / "steps", save_images=True)
    rows, refused = [], {}
    for name in schedulers():
        try:
            settings = Settings(model, steps=20, scheduler=name, n=few, **common)
            record = evaluate(settings, work / model / name)
            rows.append({**record["rows"][0], "label": name.removesuffix("Scheduler")})
        except DiffaccelError as error:
            refused[name] = str(error)
        except (RuntimeError, IndexError, KeyError, TypeError) as error:  # diffusers' own
            refused[name] = f"{type(error).__name__}: {error}"
    return {
        "model": model,
        "guidance": GUIDANCE[model],
        "teacher": steps,
        "few": few,
        "schedulers": rows,
        "refused": refused,
    }


def tables() -> str:
    """Returns the tables of all records as Markdown."""
    text = ["# The zoo's models, measured\n\nWritten by `make tables`.\n"]
    for file in sorted(FOLDER.glob("zoo-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        teacher = record["teacher"]
        rows = sorted(record["schedulers"], key=lambda row: row["scores"]["fid"]["value"])
        settings = teacher["settings"]
        text.append(
            f"## {record['model']}\n\n{record.get('remark', '')}Guidance {record['guidance']}, "
            f"protocol `{teacher['protocol']}`, {teacher['n']} images against {teacher['m']} test images; "
            f"{settings['scheduler_class']}; "
            f"± is the standard error, differences are paired with the 50-step run of the same noise.\n\n"
            + markdown(_short(eval_lines(teacher["rows"])))
            + f"\nEvery scheduler of diffusers that runs, 20 steps, {record['few']} images:\n\n"
            + markdown(_short(eval_lines(rows)))
        )
    return "\n".join(text)


def _short(lines: Lines) -> Lines:
    """Leaves out what is the same in all rows or of little interest here."""
    dropped = ("feature distance", "SSIM to plain")
    kept = [n for n, name in enumerate(lines.header) if name not in dropped]
    rows = [(kind, [cells[n] for n in kept]) for kind, cells in lines.rows]
    return Lines(lines.title, [lines.header[n] for n in kept], rows, lines.narrow)


def main() -> None:
    """Measures a model, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "tables"))
    parser.add_argument("model", nargs="?", choices=sorted(GUIDANCE))
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--few", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/zoo"))
    arguments = parser.parse_args()
    if arguments.what == "tables":
        (FOLDER.parent / "docs" / "zoo.md").write_text(tables(), encoding="utf-8")
        return
    record = measure(arguments.model, arguments.n, arguments.few, arguments.work, arguments.seed,
                     arguments.device)  # fmt: skip
    file = FOLDER / f"zoo-{arguments.model}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

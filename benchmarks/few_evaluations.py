"""S3 against diffusers' schedulers at few evaluations, on noise that the search has not seen.

``python benchmarks/few_evaluations.py tiny-fashion-sd --nfe 5 6`` writes ``s3-tiny-fashion-sd.json`` here:
the distance of the images to the fine solution, and the Fréchet distance to the zoo's reference images with
the paired difference to S3.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffaccel import accelerate, zoo
from diffaccel.cli.reading import set_scheduler
from diffaccel.cli.tables import shown
from diffaccel.errors import DiffaccelError
from diffaccel.eval import Extractor, Sampler, Statistics, collect, open_images, protocol
from diffaccel.eval.fidelity import mean_estimate
from diffaccel.eval.provenance import machine, versions
from diffaccel.eval.sampler import default_conditions
from diffaccel.samplers.family import solver_of
from diffaccel.samplers.objective import fine_schedule
from diffaccel.zoo.folders import quiet

FOLDER = Path(__file__).parent
SEED = 900_000_000  # far from the seeds of the search
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {"timestep_spacing": "trailing"}),
    ("EulerDiscrete", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistep", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"timestep_spacing": "trailing", "solver_order": 3}),
    ("DPMSolverSinglestep", {}),
    ("UniPCMultistep", {"timestep_spacing": "trailing"}),
    ("UniPCMultistep", {"timestep_spacing": "trailing", "solver_order": 3}),
    ("DEISMultistep", {"timestep_spacing": "trailing"}),
    ("PNDM", {"timestep_spacing": "trailing", "skip_prk_steps": True}),
    ("LMSDiscrete", {"timestep_spacing": "trailing"}),
]
"""diffusers' deterministic schedulers with one evaluation a step, on the grid that serves them best."""


class Runs:
    """Images of one model by several schedulers, and their scores."""

    def __init__(self, model: str, guidance: float, count: int, batch: int) -> None:
        self.model, self.batch, self.count = model, batch, count
        with quiet([]):
            self.pipe: Any = zoo.load(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.plain = self.pipe.scheduler
        conditions = default_conditions(model, self.pipe, count)
        self.sampler = Sampler(self.pipe, conditions, 10, guidance, SEED, count)
        self.extractor = Extractor(protocol("fashion"))
        images, _ = zoo.reference()
        self.reference = self.statistics(images).reference
        self.pipe.scheduler = solver_of(self.plain, schedules=[fine_schedule(self.pipe, 100).to_dict()])
        self.fine = self.sampler(100, batch)
        self.pipe.scheduler = self.plain

    def statistics(self, images: torch.Tensor) -> Statistics:
        """Returns the statistics of images, the features among them."""
        return collect(open_images(images), self.extractor, ("features",))

    def score(self, images: torch.Tensor) -> dict[str, Any]:
        """Returns the distance to the fine solution, and what the Fréchet distance needs."""
        square = (images - self.fine).double().square().flatten(1).mean(1)
        found = self.statistics(images.clamp(0, 1))
        influence = found.frechet(self.reference).influence(found.features)
        return {"rms": float(square.mean().sqrt()), "fd": found.frechet(self.reference).distance,
                "influence": influence}  # fmt: skip

    def s3(self, steps: int, file: str) -> dict[str, Any]:
        """Returns the scores of the searched schedule."""
        accelerate(self.pipe, f"s3:{file}" if file else "s3")
        try:
            return self.score(self.sampler(steps, self.batch))
        finally:
            accelerate(self.pipe, None)

    def known(self, name: str, options: dict[str, Any], steps: int) -> dict[str, Any]:
        """Returns the scores of one of diffusers' schedulers."""
        try:
            set_scheduler(self.pipe, f"{name}Scheduler")
            cls = getattr(diffusers, f"{name}Scheduler")
            with quiet([]):
                self.pipe.scheduler = cls.from_config(self.pipe.scheduler.config, **options)
            return self.score(self.sampler(steps, self.batch))
        finally:
            self.pipe.scheduler = self.plain


def compare(runs: Runs, steps: int, file: str) -> list[dict[str, Any]]:
    """Returns the rows of one number of evaluations, S3 first."""
    ours = runs.s3(steps, file)
    rows = [row_of("S3", steps, ours, ours)]
    for name, options in SCHEDULERS:
        label = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
        try:
            rows.append(row_of(label, steps, runs.known(name, options, steps), ours))
        except (DiffaccelError, ValueError, RuntimeError, IndexError) as error:
            print(f"{label}: {' '.join(str(error).split())[:100]}")
    return rows


def row_of(label: str, steps: int, found: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Returns a row as plain data; the difference is this one minus S3, paired."""
    h, difference = found["influence"], found["influence"] - ours["influence"]
    row = {
        "label": label, "evaluations": steps, "rms": found["rms"],
        "fd": {"value": found["fd"], "se": mean_estimate(h).se},
        "fd_minus_s3": {"value": found["fd"] - ours["fd"], "se": mean_estimate(difference).se},
    }  # fmt: skip
    distances = f"FD {shown(row['fd'])}  - S3 {shown(row['fd_minus_s3'], True)}"
    print(f"{steps} {label:60} rms {row['rms']:.4f}  {distances}", flush=True)
    return row


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=zoo.names())
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--file", default="", help="schedules; those that ship by default")
    arguments = parser.parse_args()
    runs = Runs(arguments.model, arguments.guidance, arguments.n, arguments.batch)
    rows = [row for steps in arguments.nfe for row in compare(runs, steps, arguments.file)]
    record = {
        "model": arguments.model, "guidance": arguments.guidance, "n": arguments.n, "seed": SEED,
        "rows": rows, "protocol": "fashion", "machine": machine(torch.device("cpu")), "versions": versions(),
    }  # fmt: skip
    (FOLDER / f"s3-{arguments.model}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

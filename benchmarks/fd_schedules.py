"""Schedules of S3 that are polished, with a compiled denoiser in bfloat16.

``python benchmarks/fd_schedules.py MODEL --nfe 5 --file FITTED --out out/fd`` does what ``diffaccel search
polish MODEL --protocol fashion --reference HALF`` does, faster on a CPU, HALF being one half of the zoo's
reference images; ``--distance`` is its ``--objective distance``.  It goes on when stopped.  The schedules
that ship began with ``fitted-schedules-dit.json`` and ``fitted-schedules-sd.json`` of this folder.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from few_evaluations import prepared

from diffaccel import zoo
from diffaccel.cli.writing import counting
from diffaccel.eval import Extractor, collect, open_images, protocol
from diffaccel.eval.provenance import plain, versions
from diffaccel.eval.sampler import default_conditions
from diffaccel.files import whole
from diffaccel.samplers.objective import FrechetScore
from diffaccel.samplers.polishing import Polish
from diffaccel.samplers.s3 import Search
from diffaccel.samplers.searched import fitting

HALF = 5000
"""The reference images of the search, the first ones."""


def score_of(device: str) -> FrechetScore:
    """Returns the distance to one half of the reference."""
    extractor = Extractor(protocol("fashion"), device)
    return FrechetScore(extractor, collect(open_images(zoo.reference()[0][:HALF]), extractor))


def write_found(searches: Iterable[Polish | Search], out: Path, told: Sequence[str], **facts: Any) -> None:
    """Runs searches one after another, and writes what they have found until then to ``schedules.json``.

    Arguments:
        searches: The searches.
        out: The folder of the file.
        told: The facts that are printed.
        facts: Further facts of all schedules.
    """
    found = []
    for search in searches:
        with counting(str(search.file), search.budget) as advance:
            schedule = search.run(advance)
        schedule = replace(schedule, facts=plain({**schedule.facts, **facts, "versions": versions()}))
        print(schedule.evaluations, json.dumps({name: schedule.facts[name] for name in told}), flush=True)
        found.append(schedule.to_dict())
        with whole(out / "schedules.json") as temporary:
            temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    """Polishes and writes ``schedules.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=zoo.names())
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--file", default="", help="schedules; those that ship by default")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--images", type=int, default=1024, help="a multiple of 32, which are one batch")
    parser.add_argument("--distance", action="store_true", help="for the distance to the fine solution")
    parser.add_argument("--bound", type=float, default=1.15)
    parser.add_argument("--near", type=int, default=96, help="images of the bound")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--budget", type=int, default=240)
    parser.add_argument("--part", type=float, default=1.0, help="how much of the change is made")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pipe = prepared(arguments.model, arguments.device, "bfloat16", True)
    objective = None if arguments.distance else score_of(arguments.device)
    conditions = default_conditions(arguments.model, pipe, 5 * arguments.images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    fitted = fitting(pipe, arguments.file, arguments.guidance)
    known = {schedule.evaluations: schedule for schedule in fitted}

    def polish(count: int) -> Polish:
        return Polish(pipe, known[count], conditions, objective, arguments.guidance, arguments.images,
                      arguments.bound, arguments.near, arguments.depth, arguments.budget,
                      part=arguments.part, file=arguments.out / f"search-{count}.json")  # fmt: skip

    write_found(map(polish, arguments.nfe), arguments.out, ["polished"])


if __name__ == "__main__":
    main()

"""S3's schedules for one guidance scale, with a compiled denoiser.

``python benchmarks/guided_schedules.py tiny-fashion-sd --guidance 5 --nfe 4 5 6 --out out/guided`` does what
``diffaccel search s3`` does, twice as fast on a CPU: the denoiser is compiled and runs, if told so, in
bfloat16.  It goes on when stopped.  Those that it found are in the package's tables beside those for 2.5.
"""

import argparse
from pathlib import Path

from fd_schedules import write_found
from few_evaluations import prepared

from diffaccel import zoo
from diffaccel.eval.provenance import plain
from diffaccel.eval.sampler import default_conditions
from diffaccel.samplers.objective import Objective
from diffaccel.samplers.s3 import Search


def main() -> None:
    """Searches, and writes ``schedules.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=zoo.names())
    parser.add_argument("--nfe", type=int, nargs="+", required=True)
    parser.add_argument("--guidance", type=float, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pipe = prepared(arguments.model, arguments.device, arguments.dtype, True)
    conditions = default_conditions(arguments.model, pipe, 5 * arguments.images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = plain({key: value for key, value in vars(arguments).items() if key != "out"})
    objectives: dict[int, Objective] = {}

    def search(count: int) -> Search:
        return Search(pipe, count, conditions, arguments.guidance, arguments.images, arguments.budget,
                      arguments.seed, file=arguments.out / f"search-{count}.json",
                      objectives=objectives)  # fmt: skip

    told = ["held_out", "held_out_of_known_solvers"]
    write_found(map(search, arguments.nfe), arguments.out, told, settings=settings)


if __name__ == "__main__":
    main()

"""The toys of rectified flow and SlimFlow at full length: 8 modes on a ring, against the exact map.

``python benchmarks/flow_toys.py --seeds 0 1 2`` prints three tables: reflows, their loss against t, and slim
students. A seed takes about two minutes on one core. tests/ring.py is the toy; the tests train it shorter.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ring

from diffaccel.distill.densities import LogitNormal, Uniform, UShaped
from diffaccel.distill.premetrics import L2, PseudoHuber

RUNS: dict[str, Any] = {
    "2-RF, uniform": (Uniform(), L2()),
    "2-RF, u-shaped": (UShaped(), L2()),
    "2-RF, u-shaped, Huber c=0.042": (UShaped(), PseudoHuber(0.042)),
    "2-RF, u-shaped, random first weights": (UShaped(), L2()),
    "2-RF, logit-normal": (LogitNormal(), L2()),
}
SLIM = ("reflow from scratch", "annealed", "1-RF, then reflow", "annealed + one step",
        "annealed + two steps, practice", "annealed + two steps, paper")  # fmt: skip
COLUMNS = ("1000 ED", "1 step", "S", "4 steps", "4 anchored", "8 steps", "8 anchored")

Figures = dict[str, list[float]]


def reflows(seed: int, iterations: int) -> tuple[Figures, Figures]:
    """Returns the figures of a 1-RF and its reflows, and their losses at ``ring.TIMES``."""
    coupled, test, real = (
        ring.pairs(49152, seed + 100),
        ring.pairs(4096, seed + 200),
        ring.data(4096, seed + 300),
    )
    first = ring.first_flow(seed, iterations)
    start = first.beside(first, first, ring.Networks(seed + 50), first)
    flows = ring.reflows(start, coupled, *zip(*RUNS.values(), strict=True), iterations, seed)
    independent: tuple[Tensor, Tensor] = (test[0], real)
    networks = [first, *map(flows.part, range(len(RUNS)))]
    losses = [ring.losses(first, independent), *(ring.losses(flow, test) for flow in networks[1:])]
    names = ("1-RF, uniform", *RUNS)
    found = [list(ring.figures(network, test, real).values()) for network in networks]
    return dict(zip(names, found, strict=True)), dict(zip(names, losses, strict=True))


def slim(seed: int) -> Figures:
    """Returns the figures of small flows and of the one-step students of the annealed one."""
    coupled, test, real = (
        ring.pairs(4000, seed + 100),
        ring.pairs(4096, seed + 200),
        ring.data(4096, seed + 300),
    )
    flows = ring.slim_flows(seed, coupled, 4000)
    students = ring.slim_students(flows.part(1), seed, coupled, 2000)
    networks = [found.part(place) for found in (flows, students) for place in range(3)]
    return {name: list(ring.figures(network, test, real).values())[:2]
            for name, network in zip(SLIM, networks, strict=True)}  # fmt: skip


def show(title: str, columns: tuple[Any, ...], seeds: list[Figures]) -> None:
    """Prints a table whose cells have a figure for each seed."""
    print(f"\n| {title} | {' | '.join(map(str, columns))} |\n|{'---|' * (len(columns) + 1)}")
    for name in seeds[0]:
        cells = [" / ".join(f"{found[name][place]:.4f}" for found in seeds) for place in range(len(columns))]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Runs the toys and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=8000, help="of each rectified flow")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, flows, small = time.monotonic(), [], []
    for seed in options.seeds:
        flows.append(reflows(seed, options.iterations))
        small.append(slim(seed))
    show("model", COLUMNS, [found for found, _ in flows])
    show("loss at t", ring.TIMES, [losses for _, losses in flows])
    show("small model", COLUMNS[:2], small)
    print(f"\nseeds {options.seeds}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()

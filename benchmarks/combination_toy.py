"""The toy of LCSC at full length: 40 checkpoints of a consistency distillation on a ring, three seeds.

``python benchmarks/combination_toy.py`` prints, and writes to ``combination-toy.json``, the held-out Frechet
distance and energy distance, a metric that is never searched for. A seed takes about two minutes on one core.
tests/toy_combination.py is the toy; the tests train it shorter.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import toy_combination as toy

from diffaccel.distill.checkpoint_files import open_checkpoint
from diffaccel.distill.checkpoint_matrix import CheckpointMatrix
from diffaccel.distill.combination import Combination
from diffaccel.files import whole

FILE = Path(__file__).parent / "combination-toy.json"
RATES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """Returns for each method its score in the search, and the two scores on fresh noise and data."""
    files, means = toy.distill(seed, folder, averages=RATES)
    network = toy.network(0).requires_grad_(False)
    matrix = CheckpointMatrix([open_checkpoint(file) for file in files])
    targets = matrix.targets(network)
    scores = toy.Score(100, 10_000), toy.Score(200, 50_000)

    def score(rows: np.ndarray, part: int) -> float:
        matrix.write(rows, targets)
        return scores[part](network)

    def held_out() -> list[float]:
        return [scores[1](network), scores[1].energy(network, 10_000)]

    def of(rows: np.ndarray) -> list[float]:
        return [score(rows, 0), *held_out()]

    true = []
    for mean in means.values():
        for parameter, value in zip(network.parameters(), mean, strict=True):
            parameter.copy_(value)
        true.append([scores[0](network), *held_out()])
    found = {"best true EMA": min(true)}
    siblings = {"ema": 62, "mwa": matrix.count + 5, "swad": matrix.count + 1}
    for method, budget in siblings.items():
        search = _searched(matrix.count, score, method, budget)
        kinds = search.averages()
        names = {"ema": ["last", "uniform", "ema"], "mwa": ["checkpoint", "mwa"], "swad": ["swad"]}[method]
        found |= {name: of(kinds[name][0]) for name in names if name in kinds}
    searches = {"GA": ("lcsc-ga", 0.0, 1000), "GA, none negative": ("lcsc-ga", 1.0, 300),
                "CMA-ES": ("lcsc", 0.0, 1000)}  # fmt: skip
    for name, (method, cap, most) in searches.items():
        search = _searched(matrix.count, score, method, most, cap)
        for budget in (100, 300, 1000):
            if budget <= most and (budget == most or not cap):
                found[f"{name} {budget}"] = of(search.winner(budget).coefficients)
    return found


def _searched(count: int, score: Callable[[np.ndarray, int], float], method: str, budget: int,
              cap: float = 0.0) -> Combination:  # fmt: skip
    search = Combination(count, score, method, budget=budget, cap=cap)
    search.search()
    return search


def main() -> None:
    """Measures the seeds, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results[str(seed)] = measure(seed, Path(folder))
        with whole(FILE) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{'':24}{'FD of the search':>22}{'held out':>22}{'of the true EMA':>22}{'energy distance':>22}")
    for name in next(iter(results.values())):
        rows = [(found[name], found["best true EMA"]) for found in results.values() if name in found]
        cells = [(f"{own[0]:.0f}", f"{own[1]:.0f}", f"{own[1] / ema[1]:.2f}", f"{own[2]:.1f}")
                 for own, ema in rows]  # fmt: skip
        columns = zip(*cells, strict=True)
        print(f"{name:24}" + "".join(f"{', '.join(column):>22}" for column in columns))


if __name__ == "__main__":
    main()

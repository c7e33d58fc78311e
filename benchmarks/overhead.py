"""What the gates cost: a call with an accelerator that has nothing to skip, against a plain one.

``python benchmarks/overhead.py`` writes ``overhead.json`` here.  Plain and accelerated calls of one pipeline
alternate, each pair in random order, on one thread; a row has the median of the pairs' ratios of processor
time, with a distribution-free 95 % interval.  A control compares plain calls with plain ones.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from paired import paired

from diffaccel import zoo
from diffaccel.eval.provenance import machine, versions
from diffaccel.files import whole
from diffaccel.pipelines import attached
from diffaccel.zoo.folders import quiet

FOLDER = Path(__file__).parent
PASSIVE: dict[str, Any] = {
    "none (control)": None,
    "reuse, every=1": {"reuse": {"every": 1}},
    "sada, max_skips=0": {"sada": {"max_skips": 0}},
    "sada, nothing predictable": {"sada": {"tolerance": 1e-12}},
    "apg, plain": {"apg": {"eta": 1.0}},
    "inherit, all steps full": {"inherit": {"warmup": 1000}},
}
"""Accelerators that change nothing, by the name of their row."""

sys.path.insert(0, str(FOLDER.parent / "tests"))


def setting(name: str, batch: int) -> tuple[Any, dict[str, Any]]:
    """Returns a pipeline and the arguments of its call: a model of the zoo, or a tiny one of the tests."""
    if name not in zoo.names():
        from tiny_pipelines import TINY

        return TINY[name].build(), dict(TINY[name].call)
    with quiet([]):
        pipe: Any = zoo.load(name)
    pipe.set_progress_bar_config(disable=True)
    given = (
        zoo.labels(batch)
        if name.endswith("dit")
        else [f"a red {n}" for n in ("boot", "dress")] * (batch // 2)
    )
    first = "class_labels" if name.endswith("dit") else "prompt"
    return pipe, {first: given, "guidance_scale": 2.5, "output_type": "np"}


def seconds(pipe: Any, call: dict[str, Any], accel: Any, steps: int) -> float:
    """Returns the processor time of one call; attaching and detaching are not part of it."""
    generator = torch.Generator().manual_seed(0)
    with attached(pipe, accel), torch.no_grad():
        begin = time.process_time()
        pipe(num_inference_steps=steps, generator=generator, **call)
        return time.process_time() - begin


def compare(pipe: Any, call: dict[str, Any], accel: Any, steps: int, pairs: int) -> dict[str, float]:
    """Returns the relative cost of an accelerator, the median over pairs, and its interval."""
    return paired(lambda attached: seconds(pipe, call, accel if attached else None, steps), pairs)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["tiny-fashion-sd", "tiny-fashion-dit"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--out", type=Path, default=FOLDER / "overhead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model in arguments.models:
        pipe, call = setting(model, arguments.batch)
        for name, accel in PASSIVE.items():
            found = compare(pipe, call, accel, arguments.steps, arguments.pairs)
            rows.append({"model": model, "accelerator": name, **found})
            print(f"{model:18} {name:26} {100 * found['overhead']:+.2f} % "
                  f"[{100 * found['low']:+.2f}, {100 * found['high']:+.2f}]  "
                  f"{1000 * found['plain seconds']:.0f} ms", flush=True)  # fmt: skip
    record = {
        "steps": arguments.steps, "batch": arguments.batch, "pairs": arguments.pairs, "rows": rows,
        "machine": machine(torch.device("cpu")), "versions": versions(),
    }  # fmt: skip
    with whole(arguments.out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

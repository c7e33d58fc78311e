"""Feynman-Kac corrected sampling against the same SDE without weights, judged by the zoo's classifier.

``python benchmarks/feynman_kac.py`` writes ``feynman-kac-tiny-fashion-sd.json`` here: guidance at equal
scales, and products of two prompts. It goes on where it was stopped: what is measured is kept in ``--work``.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import kept
from torch import Tensor

from diffaccel import FeynmanKacPipeline, zoo
from diffaccel.cli.tables import shown
from diffaccel.eval.classifier import color_targets, labels_of_prompts, predict
from diffaccel.eval.fidelity import as_bytes, mean_estimate
from diffaccel.eval.provenance import machine, versions
from diffaccel.files import whole
from diffaccel.zoo.fashion import CLASSES, LABELS, TEMPLATES
from diffaccel.zoo.folders import quiet

FOLDER, MODEL, SEED, STEPS = Path(__file__).parent, "tiny-fashion-sd", 300_000_000, 25
RULES: dict[str, dict[str, Any]] = {
    "no weights": {"num_particles": 1, "resampling": "none"},
    "K=4": {"num_particles": 4},
    "K=8": {"num_particles": 8},
    "K=8, zeta=1.5": {"num_particles": 8, "zeta": 1.5},
    "K=8, zeta=2": {"num_particles": 8, "zeta": 2.0},
    "K=16": {"num_particles": 16},
    "K=64": {"num_particles": 64},
}
PAIRS = [(TEMPLATES[-1].format(LABELS[a]), TEMPLATES[-1].format(LABELS[10 * color + b]))
         for a, b, color in ((7, 8, 2), (1, 3, 5), (8, 9, 4), (2, 1, 7), (5, 7, 3), (9, 8, 6))]  # fmt: skip
"""A class without a color, and another class with one: both agree on the first class in that color."""


class Runs:
    """Images of each rule, and what the classifier says of them."""

    def __init__(self, count: int, work: Path, device: str) -> None:
        self.count, self.work = count, work / f"{MODEL}-{count}"
        with quiet([]):
            pipe: Any = zoo.load(MODEL).to(device)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = FeynmanKacPipeline.from_pipe(pipe)

    def guided(self, rule: str, scale: float) -> tuple[Tensor, Tensor]:
        """Returns whether class and color are right, for each of the prompts (N)."""

        def make() -> dict[str, Any]:
            prompts = zoo.prompts(self.count, seed=7)
            return {"pixels": np.concatenate([
                self._images(prompt, SEED + n, 1, {**RULES[rule], "guidance_scale": scale})
                for n, prompt in enumerate(prompts)])}  # fmt: skip

        found = kept(self.work / f"guided-{scale:g}-{list(RULES).index(rule)}.npz", make)
        classes, colors = _predicted(found["pixels"])
        numbers = torch.tensor(labels_of_prompts(zoo.prompts(self.count, seed=7)))
        return classes == numbers % len(CLASSES), colors == color_targets(numbers // len(CLASSES))

    def product(self, rule: str) -> Tensor:
        """Returns whether class is that of one prompt and color that of the other (pairs times N)."""
        right = []
        for place, pair in enumerate(PAIRS):

            def make(pair: tuple[str, str] = pair, place: int = place) -> dict[str, Any]:
                seed, count = SEED + 10_000 * (place + 1), math.ceil(self.count / len(PAIRS))
                return {"pixels": self._images(list(pair), seed, count, RULES[rule])}

            found = kept(self.work / f"product-{place}-{list(RULES).index(rule)}.npz", make)
            classes, colors = _predicted(found["pixels"])
            (first, second) = (labels_of_prompts([prompt])[0] for prompt in pair)
            color = color_targets(torch.tensor(second // len(CLASSES)))
            right.append((classes == first % len(CLASSES)) & (colors == color))
        return torch.cat(right)

    def _images(self, conditions: Any, seed: int, groups: int, options: dict[str, Any]) -> np.ndarray:
        call = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed), **options}
        found = self.pipe(conditions, num_images_per_prompt=groups, output_type="np", **call)
        return as_bytes(torch.as_tensor(found.images).movedim(-1, 1)).numpy()


def _predicted(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    prediction = predict(torch.from_numpy(pixels) / 255)
    return prediction.class_logits.argmax(1), prediction.color_logits.argmax(1)


def _share(right: Tensor, plain: Tensor) -> dict[str, Any]:
    """Returns a share with its error, and the paired difference to the runs without weights."""
    difference = (right.double() - plain.double()).tolist()
    return {"right": mean_estimate(right.double().tolist()).to_dict(),
            "minus_plain": mean_estimate(difference).to_dict()}  # fmt: skip


def main() -> None:
    """Measures and writes, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=120)
    parser.add_argument("--scales", type=float, nargs="+", default=[3.0, 1.5])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/feynman-kac"))
    arguments = parser.parse_args()
    runs = Runs(arguments.n, arguments.work, arguments.device)
    rows: list[dict[str, Any]] = []
    for rule in arguments.rules:
        found: list[dict[str, Any]] = [{"task": "product", "rule": rule,
                  "both": _share(runs.product(rule), runs.product("no weights"))}]  # fmt: skip
        for scale in arguments.scales:
            (classes, colors), (plain, other) = runs.guided(rule, scale), runs.guided("no weights", scale)
            found.append({
                "task": f"guidance {scale:g}", "rule": rule, "class": _share(classes, plain),
                "color": _share(colors, other), "both": _share(classes & colors, plain & other),
            })  # fmt: skip
        for row in found:
            parts = [(key, row[key]) for key in ("class", "color", "both") if key in row]
            told = [
                f"{key} {shown(part['right'])} ({shown(part['minus_plain'], True)})" for key, part in parts
            ]
            print(row["task"], row["rule"], *told, flush=True)
        rows += found
        record = {
            "model": MODEL, "n": arguments.n, "seed": SEED, "steps": STEPS, "rows": rows, "pairs": PAIRS,
            "machine": machine(torch.device(arguments.device)), "versions": versions(),
        }  # fmt: skip
        with whole(FOLDER / f"feynman-kac-{MODEL}.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

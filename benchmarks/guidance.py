"""Plain guidance, diffusers' formula of APG and APG itself at rising scales, on the same noise.

``python benchmarks/guidance.py`` writes ``guidance-tiny-fashion-sd.json`` here, and ``... tables`` the table
and the plot in ``docs/``. It goes on where it was stopped: what is measured is kept in ``--work``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from frechet import frechet_of
from kept import kept
from torch import Tensor

from diffaccel import APG, zoo
from diffaccel.cli.reading import set_scheduler
from diffaccel.cli.tables import Lines, markdown, shown
from diffaccel.eval import Extractor, Sampler, collect, open_images, prdc, protocol
from diffaccel.eval.classifier import accuracy_of, labels_of_prompts, predict
from diffaccel.eval.fidelity import as_bytes, mean_estimate
from diffaccel.eval.provenance import machine, versions
from diffaccel.files import whole
from diffaccel.pipelines import attached
from diffaccel.zoo.folders import quiet

FOLDER, MODEL, SEED, STEPS = Path(__file__).parent, "tiny-fashion-sd", 500_000_000, 20
DOCS = FOLDER.parent / "docs"
SCALES = (3.0, 12.0, 20.0, 8.0, 5.0)
RADIUS = 0.2
"""The norm threshold, by element; SDXL's 0.0586 and momentum ruin this model's pictures at scale 12."""


class DiffusersForm(APG):
    """What diffusers' AdaptiveProjectedGuidance does by default, on raw outputs: u + w Dapg."""

    def start(self, run: Any) -> None:
        """Begins a loop."""
        super().start(run)
        self.scale = float(run.arguments["guidance_scale"])

    def step(self, level: Any, cond: Tensor, uncond: Tensor, sample: Tensor, *rest: Any) -> Tensor:
        """Returns what makes the pipeline's combination that of diffusers' formula."""
        radius = RADIUS * cond[0].numel() ** 0.5
        guided = normalized_guidance(cond, uncond, self.scale, None, 0.0, radius)
        return (guided - cond) / (self.scale - 1)


METHODS: dict[str, Any] = {
    "CFG": None,
    "APG, eta 0": APG(),
    "APG, origin mean, clip": APG(rescale=RADIUS, origin="mean"),
    "diffusers' formula, eta 0, clip": DiffusersForm(rescale=RADIUS),
    "APG, origin mean": APG(origin="mean"),
}


class Runs:
    """The images of each method and scale, and their scores."""

    def __init__(self, count: int, batch: int, work: Path, device: str) -> None:
        self.count, self.batch, self.work = count, batch, work / f"{MODEL}-{count}"
        with quiet([]):
            self.pipe: Any = zoo.load(MODEL).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        set_scheduler(self.pipe, "dpm++(timestep_spacing=trailing)")
        self.prompts = zoo.prompts(count, seed=5)
        self.extractor = Extractor(protocol("fashion"), device)
        self.reference = collect(open_images(zoo.reference()[0]), self.extractor, ("features",))

    def images(self, method: str, scale: float) -> Tensor:
        """Returns the images of a method at a scale, as bytes (N, 3, H, W)."""

        def make() -> dict[str, Any]:
            with attached(self.pipe, METHODS[method]):
                sampler = Sampler(self.pipe, self.prompts, STEPS, scale, SEED, self.count)
                return {"pixels": as_bytes(sampler(STEPS, self.batch)).numpy()}

        file = self.work / f"{list(METHODS).index(method)}-{scale:g}.npz"
        return torch.from_numpy(kept(file, make)["pixels"])

    def row(self, method: str, scale: float) -> dict[str, Any]:
        """Returns a row of the table; differences are paired with plain guidance of the same scale."""
        pixels = self.images(method, scale)
        features, distance, influence = frechet_of(pixels, self.extractor, self.reference)
        _, plain, other = frechet_of(self.images("CFG", scale), self.extractor, self.reference)
        prediction, rgb = predict(pixels / 255), pixels.double() / 255
        classes, colors = prediction.class_logits.argmax(1), prediction.color_logits.argmax(1)
        accuracy = accuracy_of(classes, colors, labels_of_prompts(self.prompts))
        nearest = prdc(features, self.reference.features)
        return {
            "method": method, "scale": scale,
            "fd": {"value": distance, "se": mean_estimate(influence).se},
            "fd_minus_cfg": {"value": distance - plain, "se": mean_estimate(influence - other).se},
            "precision": nearest["precision"].to_dict(), "recall": nearest["recall"].to_dict(),
            "chroma": mean_estimate((rgb.amax(1) - rgb.amin(1)).flatten(1).mean(1).tolist()).to_dict(),
            "clipped": mean_estimate((pixels == 255).any(1).flatten(1).double().mean(1).tolist()).to_dict(),
            "class": accuracy.class_accuracy.to_dict(), "color": accuracy.color_accuracy.to_dict(),
        }  # fmt: skip


def measure(arguments: argparse.Namespace) -> None:
    """Measures, and writes the record after each scale."""
    runs = Runs(arguments.n, arguments.batch, arguments.work, arguments.device)
    rows: list[dict[str, Any]] = []
    for scale in arguments.scales:
        for method in METHODS:
            rows.append(runs.row(method, scale))
            print(
                scale, method, {k: shown(v) for k, v in rows[-1].items() if isinstance(v, dict)}, flush=True
            )
        record = {
            "model": MODEL, "n": arguments.n, "seed": SEED, "steps": STEPS, "rows": rows,
            "protocol": "fashion", "machine": machine(torch.device(arguments.device)), "versions": versions(),
        }  # fmt: skip
        with whole(FOLDER / f"guidance-{MODEL}.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def tables() -> None:
    """Writes ``docs/guidance-table.md`` and ``docs/guidance.png`` from the record."""
    record = json.loads((FOLDER / f"guidance-{MODEL}.json").read_text(encoding="utf-8"))
    rows = sorted(record["rows"], key=lambda row: row["scale"])
    head = ["scale", "method", "FD", "FD - CFG", "precision", "recall", "chroma", "clipped", "class", "color"]
    keys = ["fd", "fd_minus_cfg", "precision", "recall", "chroma", "clipped", "class", "color"]
    cells = [[f"{row['scale']:g}", row["method"], *(shown(row[key], key == "fd_minus_cfg") for key in keys)]
             for row in rows]  # fmt: skip
    text = markdown(Lines("guidance", head, [("plain", line) for line in cells], ()))
    (DOCS / "guidance-table.md").write_text(f"{text}\n", encoding="utf-8")
    _plot(rows)


def _plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2))
    for axis, (key, title) in zip(axes, [("fd", "FD"), ("chroma", "mean chroma"), ("class", "class right")],
                                  strict=True):  # fmt: skip
        for method in METHODS:
            own = [row for row in rows if row["method"] == method]
            axis.errorbar([row["scale"] for row in own], [row[key]["value"] for row in own],
                          [row[key]["se"] for row in own], label=method, marker="o", ms=3)  # fmt: skip
        axis.set(title=title, xlabel="guidance scale")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(DOCS / "guidance.png", dpi=110)


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="measure", choices=("measure", "tables"))
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/guidance"))
    arguments = parser.parse_args()
    if arguments.what == "tables":
        tables()
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

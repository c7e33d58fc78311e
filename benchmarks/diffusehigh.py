"""DiffuseHigh on the zoo, 32 to 64 pixels: against enlarging, and against sampling at 64 pixels directly.

``python benchmarks/diffusehigh.py --n 48`` writes ``diffusehigh-tiny-fashion-sd.json`` here and
``docs/diffusehigh.png``. It goes on where it was stopped: what is made is kept in ``--work``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from kept import kept
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import make_grid

from diffaccel import DiffuseHighPipeline, zoo
from diffaccel.cli.reading import set_scheduler
from diffaccel.eval.classifier import label_accuracy, labels_of_prompts
from diffaccel.eval.fidelity import mean_estimate
from diffaccel.eval.provenance import machine, versions
from diffaccel.files import whole
from diffaccel.pipelines import attached
from diffaccel.pipelines.diffusehigh_checks import parameters_of_call
from diffaccel.pipelines.structure_guidance import sharpened, upsampled
from diffaccel.pipelines.wavelets import dwt
from diffaccel.zoo.folders import quiet

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
SEED, STEPS, LARGE = 700_000_000, 50, (64, 64)

METHODS: dict[str, dict[str, Any]] = {
    "DiffuseHigh": {},
    "DiffuseHigh, scale 5": {"diffusehigh_guidance_scale": 5.0},
    "DiffuseHigh, scale 5, no sharpening": {"diffusehigh_guidance_scale": 5.0, "sharpening_alpha": 0.0},
    "DiffuseHigh, scale 5, no structure guidance": {"diffusehigh_guidance_scale": 5.0, "dwt_steps": 0},
    "DiffuseHigh, scale 5, sada": {"diffusehigh_guidance_scale": 5.0, "accel": "sada"},
}
SHOWN = ("32 pixels, enlarged", "64 pixels directly", "DiffuseHigh", "DiffuseHigh, scale 5")


class Runs:
    """The images of each method, for the same prompts and noise."""

    def __init__(self, model: str, count: int, batch: int, work: Path) -> None:
        self.batch, self.work = batch, work / f"diffusehigh-{model}-{count}"
        with quiet([]):
            self.pipe: Any = zoo.load(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.kind = "class_labels" if "class_labels" in parameters_of_call(self.pipe) else "prompt"
        if self.kind == "prompt":
            set_scheduler(self.pipe, "euler")  # as the published code; the other model has a flow's DPM++
        prompts = zoo.prompts(count, seed=7)
        self.labels = labels_of_prompts(prompts)
        self.conditions = self.labels if self.kind == "class_labels" else prompts

    def batches(self) -> Any:
        """Yields the arguments of each call."""
        for start in range(0, len(self.conditions), self.batch):
            part = self.conditions[start : start + self.batch]
            generators = [torch.Generator().manual_seed(SEED + start + n) for n in range(len(part))]
            yield {
                self.kind: part,
                "generator": generators,
                "num_inference_steps": STEPS,
                "output_type": "pt",
            }

    def climbed(self, options: dict[str, Any]) -> dict[str, Any]:
        """Returns both stages of DiffuseHigh."""
        rest, stages, work = {k: v for k, v in options.items() if k != "accel"}, [], []
        with attached(self.pipe, options.get("accel")):
            high = DiffuseHighPipeline.from_pipe(self.pipe)
            for call in self.batches():
                result = high(**call, target_sizes=LARGE[0], **rest)
                stages.append(result.stages)
                work.append([report.evaluated for report in result.reports])
        small, large = (torch.cat(parts) for parts in zip(*stages, strict=True))
        return {
            "small": small.numpy(),
            "large": large.numpy(),
            "evaluated": torch.tensor(work).double().mean(0),
        }

    def direct(self) -> dict[str, Any]:
        """Returns what the model makes at 64 pixels when simply asked to."""
        size = {"height": LARGE[0], "width": LARGE[1]}
        images = [self.pipe(**call, **size, guidance_scale=5.0)[0] for call in self.batches()]
        return {"large": torch.cat(images).numpy()}

    def images(self) -> dict[str, Tensor]:
        """Returns the images of all methods, (N, 3, 64, 64)."""
        found, self.work_done = {}, {}
        for name, options in METHODS.items():
            one = kept(self.work / f"{name}.npz", lambda options=options: self.climbed(options))  # type: ignore[misc]
            found[name] = torch.from_numpy(one["large"])
            self.work_done[name] = one["evaluated"].tolist()
            self.small = torch.from_numpy(one["small"]) if name == "DiffuseHigh" else self.small
        enlarged = upsampled(self.small, LARGE).clamp(0, 1)
        sharp = sharpened(upsampled(self.small, LARGE), 1.0, torch.full((len(self.small),), 1.05))
        first = {SHOWN[0]: enlarged, "32 pixels, enlarged and sharpened": sharp.clamp(0, 1)}
        if self.kind == "prompt":
            first[SHOWN[1]] = torch.from_numpy(kept(self.work / "direct.npz", self.direct)["large"])
        return {**first, **found}

    def scores(self, images: Tensor) -> dict[str, Any]:
        """Returns what is measured of images of 64 pixels."""
        low = avg_pool2d(images, 2)
        right = label_accuracy(low.clamp(0, 1), self.labels)
        base = avg_pool2d(upsampled(self.small, LARGE), 2)
        gap = (low - base).square().mean((1, 2, 3)).sqrt()
        fine = dwt(images).high.square().sum(2).mean((1, 2, 3)).sqrt()
        return {
            "class and color": right.joint.to_dict(),
            "fine detail": mean_estimate(fine.tolist()).to_dict(),
            "distance to the first stage": mean_estimate(gap.tolist()).to_dict(),
        }


def figure(images: dict[str, Tensor], small: Tensor, count: int) -> None:
    """Writes the picture: a column a prompt, a row a method."""
    rows = [resize(images[name][:count], [128, 128], antialias=False) for name in SHOWN if name in images]
    sheet = make_grid(torch.cat(rows).clamp(0, 1), nrow=count, padding=4, pad_value=1.0)
    with whole(DOCS / "diffusehigh.png") as temporary:
        to_pil_image(sheet).save(temporary, format="PNG")


def main() -> None:
    """Makes images, scores them, and writes the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-fashion-sd")
    parser.add_argument("--n", type=int, default=48)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    options = parser.parse_args()
    runs = Runs(options.model, options.n, options.batch, options.work)
    images = runs.images()
    scores = {name: runs.scores(found) for name, found in images.items()}
    record = {
        "model": options.model, "images": options.n, "steps": STEPS,
        "scheduler": type(runs.pipe.scheduler).__name__, "scores": scores, "evaluated": runs.work_done,
        "versions": versions(), "machine": machine(torch.device("cpu")),
    }  # fmt: skip
    with whole(FOLDER / f"diffusehigh-{options.model}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    if options.model == "tiny-fashion-sd":
        figure(images, runs.small, 8)
    for name, found in scores.items():
        print(f"{name:45}", {key: f"{value['value']:.4f}" for key, value in found.items()})
    print(runs.work_done)


if __name__ == "__main__":
    main()

"""Our evaluation against clean-fid and torch-fidelity on one machine: times of the distance and of the loop.

Run on an idle machine: ``python benchmarks/eval_speed.py --out benchmarks/eval-speed.json``.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanfid import fid as cleanfid
from PIL import Image
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchvision.models import inception_v3

from diffaccel.eval.frechet import Reference, frechet_distance
from diffaccel.eval.images import open_images
from diffaccel.eval.moments import Gaussian
from diffaccel.eval.protocols import Extractor, Protocol
from diffaccel.eval.provenance import machine, versions
from diffaccel.eval.statistics import collect


def best(task: Callable[[], Any], rounds: int) -> float:
    """Returns the shortest of some times in seconds."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def distances(dim: int = 2048, count: int = 10_000) -> dict[str, Any]:
    """Times the distance of two sets of stored features."""
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(np.arange(1, dim + 1))
    x, y = (((rng.standard_normal((count, dim)) + 0.1 * n) * scale).astype(np.float32) for n in range(2))
    a, b = Gaussian.of(x), Gaussian.of(y)
    stored = [{"mu": s.mean, "sigma": s.covariance} for s in (a, b)]
    reference = Reference(b)
    values = {
        "ours": reference.distance(a),
        "clean-fid": cleanfid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance),
        "torch-fidelity": fid_statistics_to_metric(*stored, False)["frechet_inception_distance"],
    }
    seconds = {
        "ours, reference factored": best(lambda: reference.distance(a), 5),
        "ours": best(lambda: frechet_distance(a, b), 5),
        "clean-fid": best(lambda: cleanfid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance), 2),
        "torch-fidelity": best(lambda: fid_statistics_to_metric(*stored, False), 3),
    }
    whole = {
        "ours": best(lambda: frechet_distance(x, y), 3),
        "clean-fid": best(lambda: cleanfid.fid_from_feats(x, y), 2),
        "torch-fidelity": best(
            lambda: fid_statistics_to_metric(
                *(fid_features_to_statistics(torch.from_numpy(part)) for part in (x, y)), False
            ),
            2,
        ),
    }
    return {"dim": dim, "count": count, "values": values, "from statistics": seconds, "from features": whole}


class Pooled(nn.Module):
    """Random-weight Inception up to its pooled features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
        self.network.fc = nn.Identity()
        self.network.AuxLogits = None
        self.network.aux_logits = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (B, 2048)."""
        return self.network(images)


def loops(count: int, side: int, batch: int) -> dict[str, Any]:
    """Times the extraction of features from a folder of PNG files with the same network."""
    network = Pooled()
    extractor = Extractor(Protocol("shared", "", 299, "clean", "tf"), network=network)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for n in range(count):
            low = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            low.resize((side, side), Image.Resampling.BICUBIC).save(Path(folder) / f"{n:05d}.png")

        def peer() -> np.ndarray:
            with torch.no_grad():
                return cleanfid.get_folder_features(
                    folder, lambda x: network((x - 128) / 128), num_workers=2, batch_size=batch,
                    device=torch.device("cpu"), verbose=False,
                )  # fmt: skip

        def ours() -> Any:
            return collect(open_images(folder), extractor, ("features",), batch=batch)

        theirs, mine = peer(), ours()
        error = np.abs(mine.features[0:count] - theirs).max() / np.abs(theirs).max()
        pairs = [(best(peer, 1), best(ours, 1)) for _ in range(3)]
    return {"images": count, "side": side, "batch": batch, "feature error": float(error),
            "clean-fid, images/s": [count / a for a, _ in pairs],
            "ours, images/s": [count / b for _, b in pairs],
            "ratio": sorted(a / b for a, b in pairs)[1]}  # fmt: skip


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    record = {
        "distances": distances(),
        "loops": [loops(arguments.images, 96, batch) for batch in (16, 128)],  # 128 is clean-fid's default
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    text = json.dumps(record, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

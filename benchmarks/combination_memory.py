"""Memory and time of a combination of 40 checkpoints of a 1 GB model, from files of random numbers.

``python benchmarks/combination_memory.py --work FOLDER`` needs 40 GB there, and removes them at the end. It
prints the peak of the process, and the seconds of opening and of one combination; less with ``--gigabytes``
and ``--count``. ``--device cuda`` keeps the matrix on the device instead, if it fits.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diffaccel.distill import averages
from diffaccel.distill.checkpoint_files import open_checkpoint
from diffaccel.distill.checkpoint_matrix import CheckpointMatrix
from diffaccel.eval.provenance import machine

LAYERS = 32


def write(folder: Path, count: int, size: int) -> list[Path]:
    """Writes checkpoints of ``size`` float32 weights in layers, one at a time, or finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    source, paths = torch.Generator().manual_seed(0), []
    for place in range(count):
        paths.append(folder / f"student-{place:03d}.safetensors")
        if paths[-1].exists() and paths[-1].stat().st_size > 4 * size:
            continue  # of a run that was stopped
        state = {f"layers.{n}": torch.randn(size // LAYERS, generator=source) for n in range(LAYERS)}
        save_file(state, paths[-1])
    return paths


class Network(nn.Module):
    """A network of that many weights."""

    def __init__(self, size: int, device: str) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.zeros(size // LAYERS, device=device) for _ in range(LAYERS))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what opening, and one combination, take."""
    size = int(arguments.gigabytes * 1e9 / 4)
    paths = write(arguments.work, arguments.count, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size: Linux only
    before, began = _peak(), time.monotonic()
    resident = 0 if arguments.device == "cpu" else 1 << 60
    checkpoints = [open_checkpoint(path) for path in paths]
    matrix = CheckpointMatrix(checkpoints, device=arguments.device, resident=resident)
    opened = time.monotonic() - began
    targets = matrix.targets(Network(size, arguments.device))
    matrix.write(averages.ema(matrix.count, 0.9), targets)  # kernels are chosen
    began = time.monotonic()
    matrix.write(averages.uniform(matrix.count), targets)
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    return {
        "checkpoints": arguments.count, "model_bytes": 4 * matrix.size, "device": arguments.device,
        "peak_gb": _peak(), "peak_before_gb": before, "open_s": opened, "combine_s": time.monotonic() - began,
        "machine": machine(torch.device(arguments.device)),
    }  # fmt: skip


def _peak() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024e-9 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measures, and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of a checkpoint, in float32")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("out/combination-memory"))
    arguments = parser.parse_args()
    try:
        print(json.dumps(measure(arguments), indent=1))
    finally:
        shutil.rmtree(arguments.work, ignore_errors=True)


if __name__ == "__main__":
    main()

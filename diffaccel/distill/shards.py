"""Pairs of noise and sample on disk: shards that are whole or absent, and random access to all of them.

| file                           | content                                                                  |
|--------------------------------|--------------------------------------------------------------------------|
| ``pairs.json``                 | the settings, how they were made, the checksum of every shard            |
| ``conditions.json``            | K conditions; pair n has the condition n mod K                           |
| ``packing.safetensors``        | ``order``, for pipelines that pack their noise, see `pair_noise`         |
| ``shard-000000.safetensors``   | ``x0`` (S, *) of the first S pairs; ``noise`` (S, *) if it has no seed   |

A shard carries the digest of the settings, its number and the checksum of its tensors, so that each can be
verified by itself, whoever made it, and before all are there.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DiffaccelError
from ..eval.provenance import plain, settings_digest
from ..files import read_object, whole
from .pair_noise import DTYPES

__all__ = ["AGAIN", "INDEX", "Condition", "DamagedShard", "PairsError", "Shards", "read_settings", "sha256"]

Condition = str | int | None
"""A prompt, the number of a class, or None."""

INDEX = "pairs.json"
"""The name of the record."""

AGAIN = "run its command again"
"""What mends most that can be wrong."""

_CONDITIONS, _PACKING = "conditions.json", "packing.safetensors"
_ABOUT = "pairs"  # the entry in a shard's header


class PairsError(DiffaccelError, ValueError):
    """A store of pairs that is missing, unfinished, damaged, or one of other pairs."""


class DamagedShard(PairsError):
    """A shard that is missing or damaged, and can be made again."""


class Shards:
    """The files of a store.

    Arguments:
        folder: Their folder.
        settings: What the pairs depend on, plain data; with ``count``, ``shard_size``, ``shape``, ``stored``
            (the type on disk) and ``noise`` (None if it is stored, too).
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, plain(settings)
        self.digest = settings_digest(self.settings)
        count, size = int(self.settings["count"]), int(self.settings["shard_size"])
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
        """The pairs of each shard."""
        self._made: Any = {}
        self._names = ("x0",) if self.settings["noise"] else ("noise", "x0")

    def path(self, number: int) -> Path:
        """Returns the file of a shard."""
        return self.folder / f"shard-{number:06d}.safetensors"

    def open(
        self, made: Mapping[str, Any], conditions: Sequence[Condition], order: Tensor | None = None
    ) -> None:
        """Makes the folder, or goes on in it.

        Arguments:
            made: What is to be known of how the pairs were made, and may differ when it goes on.
            conditions: The conditions; pair n has the condition n mod K.
            order: How the noise is packed.

        Raises:
            PairsError: If it holds pairs of other settings, or cannot be written.
        """
        self._made = plain(made)
        if (self.folder / INDEX).exists():
            self._compare()
            self._made = plain(read_object(self.folder / INDEX, PairsError).get("made", made))
        else:  # before anything is written, so that shards of other settings keep their chance
            for number in range(len(self.ranges)):
                if self.path(number).exists():
                    self._try(number, check=False)
        self._write(_CONDITIONS, json.dumps(list(conditions)).encode())
        if order is not None:
            self._write(_PACKING, save({"order": order}))
        if not (self.folder / INDEX).exists():
            self._index([])

    def clean(self) -> None:
        """Removes what killed processes have left; none may be writing shards."""
        for file in self.folder.glob(".shard-*.tmp"):
            file.unlink(missing_ok=True)

    def missing(self, rank: int, world: int, advance: Callable[[int], None]) -> list[int]:
        """Returns the shards that one of several processes has to make: those missing or damaged.

        Arguments:
            rank: The number of the process.
            world: The number of processes.
            advance: What is told how many pairs are there.

        Raises:
            PairsError: If a shard is an intact one of other pairs, which is not overwritten.
        """
        found = []
        for number in range(rank, len(self.ranges), world):
            if self.path(number).exists() and self._try(number, check=True):
                advance(len(self.ranges[number]))
            else:
                found.append(number)
        return found

    def _try(self, number: int, check: bool) -> bool:
        try:
            self.read(number, check)
        except DamagedShard:
            return False
        return True

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a shard: whole or not at all.

        Raises:
            PairsError: If it cannot be written.
        """
        parts = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {"settings": self.digest, "shard": number, "sha256": sha256(parts)}
        # one entry only: safetensors writes several in an order that changes from run to run
        self._write(self.path(number).name, save(parts, {_ABOUT: json.dumps(about)}))

    def read(self, number: int, check: bool = True) -> tuple[dict[str, Tensor], str]:
        """Returns the tensors of a shard, mapped from the file, and their checksum.

        Arguments:
            number: The shard.
            check: Whether to compute the checksum, for which all of it is read.

        Raises:
            DamagedShard: If it is missing, truncated or changed.
            PairsError: If it is one of other pairs.
        """
        path = self.path(number)
        try:
            with safe_open(path, framework="pt") as file:
                about = dict(json.loads((file.metadata() or {}).get(_ABOUT, "{}")))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
            raise DamagedShard(f"cannot read {str(path)!r}: {reason}; {AGAIN}") from None
        if about.get("settings") != self.digest or about.get("shard") != number:
            raise PairsError(f"{str(path)!r} is a shard of other pairs; remove it, and {AGAIN}")
        size, shape = len(self.ranges[number]), self.settings["shape"]
        expected = [(name, [size, *shape], DTYPES[self.settings["stored"]]) for name in self._names]
        intact = [(name, list(x.shape), x.dtype) for name, x in sorted(tensors.items())] == expected
        if not intact or (check and sha256(tensors) != about.get("sha256")):
            raise DamagedShard(f"{str(path)!r} is damaged: its content is not what was written; {AGAIN}")
        return tensors, str(about.get("sha256"))

    def order(self) -> Tensor | None:
        """Returns how the noise is packed, or None.

        Raises:
            PairsError: If the file is missing or damaged.
        """
        path, digest = self.folder / _PACKING, self.settings["noise"]["packing"]
        if digest is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                order: Tensor = file.get_tensor("order")
        except (OSError, SafetensorError) as error:
            raise PairsError(f"cannot read {str(path)!r}: {error}; {AGAIN}") from None
        if sha256({"order": order}) != digest:
            raise PairsError(f"{str(path)!r} is damaged; {AGAIN}")
        return order

    def conditions(self) -> list[Condition]:
        """Returns the K conditions.

        Raises:
            PairsError: If the file is missing or damaged.
        """
        path = self.folder / _CONDITIONS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PairsError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}; {AGAIN}") from None
        if settings_digest({"conditions": found}) != self.settings["conditions"]:
            raise PairsError(f"{str(path)!r} has other conditions than the pairs; {AGAIN}")
        return list(found)

    def finish(self) -> None:
        """Enters all shards into ``pairs.json``, which makes the store complete.

        Raises:
            PairsError: If one is missing.
        """
        listed = []
        for number, numbers in enumerate(self.ranges):
            path, (_, digest) = self.path(number), self.read(number, check=False)
            listed.append({"file": path.name, "pairs": len(numbers), "bytes": path.stat().st_size,
                           "sha256": digest})  # fmt: skip
        self._index(listed)

    def _index(self, shards: list[dict[str, Any]]) -> None:
        record = {"settings": self.settings, "made": self._made, "shards": shards}
        self._write(INDEX, json.dumps(record, indent=1).encode())

    def _write(self, name: str, content: bytes) -> None:
        try:
            with whole(self.folder / name) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise PairsError(
                f"cannot write {str(self.folder / name)!r}: {error.strerror or error}; what is done "
                f"stays done: when that is mended, {AGAIN}"
            ) from None

    def _compare(self) -> None:
        before = read_settings(self.folder)
        different = [key for key in sorted({*before, *self.settings})
                     if before.get(key) != self.settings.get(key)]  # fmt: skip
        if different:
            told = "; ".join(f"{key}: {_short(before.get(key))}, now {_short(self.settings.get(key))}"
                             for key in different[:3])  # fmt: skip
            raise PairsError(f"{str(self.folder / INDEX)!r} has other settings ({told}); use another folder")


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns what the pairs in a folder depend on.

    Raises:
        PairsError: If there are none, or the record is damaged.
    """
    remedy = f"remove {INDEX} and {AGAIN}: shards that are whole are kept" if folder.is_dir() else (
        "expected a folder of diffaccel distill pairs")  # fmt: skip
    found = read_object(folder / INDEX, PairsError, remedy).get("settings")
    if not isinstance(found, dict):
        raise PairsError(f"{str(folder / INDEX)!r} is no record of pairs; {remedy}")
    return found


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Returns the checksum of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

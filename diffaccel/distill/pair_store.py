"""Pairs of noise and sample for training: random access to all of them, and their order without end."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffaccelError
from ..eval.provenance import settings_digest
from ..files import read_object
from .draws import seed_of
from .pair_noise import DTYPES, NoiseSource
from .shards import AGAIN, INDEX, Condition, DamagedShard, PairsError, Shards, read_settings

__all__ = ["PairStore"]

_ORDERS = 7
"""The orders that are kept beside a new one; a batch may lie in two epochs, and parts differ in size."""


class PairStore:
    """Pairs of noise and sample that ``diffaccel distill pairs`` has made; they are mapped, not loaded.

    Arguments:
        folder: The folder.
        check: Whether the checksum of a shard is computed when its first pair is read; sizes always are.

    Raises:
        PairsError: If there are none, they are not complete, or a file is not what it should be.
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        self.folder, self._check = Path(folder), check
        file = self.folder / INDEX
        try:
            self.settings = read_settings(self.folder)
            """What the pairs depend on."""
            record = read_object(file, PairsError)
            self._shards, self._listed = Shards(self.folder, self.settings), list(record["shards"])
            self.shape: tuple[int, ...] = tuple(self.settings["shape"])
            """The shape of a sample, without the batch."""
            self.kind = str(self.settings["kind"])
            """What they are: "teacher" (noise and its sample), or "real" (data and their noise)."""
            self.guidance: float | None = self.settings["guidance"]
            """The guidance scale that the samples have; a student has no guidance of its own then."""
            self._check_sizes()
            self._source = self._noise_source(record["made"])
            self.conditions = self._shards.conditions()
            """The K conditions; pair n has the condition n mod K."""
        except DiffaccelError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PairsError(f"{str(file)!r} is no record of pairs ({error!r}); {AGAIN}") from None
        self._open: dict[int, dict[str, Tensor]] = {}
        self._orders: dict[tuple[int, int, int], Tensor] = {}

    def __len__(self) -> int:
        return int(self.settings["count"])

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of the teacher's calls, as height and width."""
        return dict(self.settings.get("options") or {})

    @property
    def digest(self) -> str:
        """The SHA-256 of settings and checksums: it tells these pairs from any others."""
        sums = [entry["sha256"] for entry in self._listed]
        return settings_digest({"settings": self.settings, "shards": sums})

    def rows(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, list[Condition]]:
        """Returns some pairs: x0 (B, *), noise (B, *), both in float32 on the CPU, and the B conditions.

        Arguments:
            numbers: The B pairs, each in [0, len(self)).

        Raises:
            PairsError: If there is no such pair, or its shard is damaged.
        """
        for n in numbers:
            if not 0 <= n < len(self):
                raise PairsError(f"no pair {n} in {str(self.folder)!r}, which has {len(self)}")
        size = int(self.settings["shard_size"])
        places = [(self._shard(n // size), n % size) for n in numbers]
        x0 = torch.stack([shard["x0"][row] for shard, row in places])
        if self._source is not None:
            noise = self._source.rows(numbers)
        else:
            noise = torch.stack([shard["noise"][row] for shard, row in places])
        return x0.float(), noise.float(), [self.conditions[n % len(self.conditions)] for n in numbers]

    def order(self, seed: int, number: int, among: Sequence[int] | None = None) -> int:
        """Returns the pair of a sample of a training run; every pair comes once an epoch.

        It depends on nothing else, so that neither the size of batches nor a resume changes it.

        Arguments:
            seed: The seed of the run.
            number: The number of the sample, counted from 0 over all epochs.
            among: The pairs that are trained on; None for all.
        """
        size = len(self) if among is None else len(among)
        epoch, place = divmod(number, size)
        key = (seed, epoch, size)
        if key not in self._orders:
            generator = torch.Generator().manual_seed(seed_of(seed, epoch, "pairs"))
            last = list(self._orders.items())[-_ORDERS:]
            self._orders = {**dict(last), key: torch.randperm(size, generator=generator)}
        found = int(self._orders[key][place])
        return found if among is None else among[found]

    def verify(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Reads all, and compares the checksums.

        Arguments:
            advance: What is told how many more pairs are read.

        Raises:
            PairsError: Naming the damaged shards.
        """
        bad = []
        for number, numbers in enumerate(self._shards.ranges):
            try:
                self._read(number, check=True)
            except PairsError as error:
                bad.append(error)
            advance(len(numbers))
        if bad:
            more = f" (and {len(bad) - 1} more shards)" if len(bad) > 1 else ""
            raise PairsError(f"{bad[0]}{more}")

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            self._open[number] = self._read(number, self._check)
        return self._open[number]

    def _read(self, number: int, check: bool) -> dict[str, Tensor]:
        tensors, digest = self._shards.read(number, check)
        if digest != self._listed[number]["sha256"]:
            path = str(self._shards.path(number))
            raise DamagedShard(f"{path!r} is not the shard that {INDEX} lists; {AGAIN}")
        return tensors

    def _check_sizes(self) -> None:
        count = len(self._shards.ranges)
        if len(self._listed) != count:
            there = sum(self._shards.path(n).exists() for n in range(count))
            raise PairsError(f"{str(self.folder)!r} is not finished: {there} of {count} shards; {AGAIN}")
        for number, entry in enumerate(self._listed):
            path = self._shards.path(number)
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                what = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
                raise DamagedShard(f"{str(path)!r} {what}; {AGAIN}")

    def _noise_source(self, made: Mapping[str, Any]) -> NoiseSource | None:
        noise = self.settings["noise"]
        if noise is None:
            return None
        source = NoiseSource(self.settings["seed"], self.shape, DTYPES[noise["dtype"]], self._shards.order())
        known = torch.tensor(made["first_noise"])
        drawn = source.rows([0]).float().flatten()[: len(known)]
        if not torch.allclose(drawn, known, rtol=0.0, atol=1e-2):
            raise PairsError(
                f"PyTorch {torch.__version__} draws other noise than {made['versions']['torch']}, by which "
                f"{str(self.folder)!r} was made; make the pairs anew, in another folder"
            )
        return source

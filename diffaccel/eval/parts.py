"""A long run in parts on disk: what is done stays done after a kill, and processes share the work.

Every part is a safetensors file with the results of some consecutive images, written under a temporary name
and renamed. Parts are the same whoever makes them, and are read in their order, so that a run that was
interrupted or shared ends with the same numbers as one that was not.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import DiffaccelError, OptionError
from ..files import read_object, whole
from .provenance import plain

__all__ = ["Parts", "PartsError"]

SETTINGS = "settings.json"


class PartsError(DiffaccelError, ValueError):
    """Parts of another run, or a damaged part."""


class Parts:
    """The parts of a run.

    Arguments:
        folder: Their folder.
        settings: Everything that the results depend on, plain data; parts of other settings are refused.
        count: The number of images.
        size: Images in a part.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], count: int, size: int) -> None:
        self.folder, self.settings = folder, plain(settings)
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def open(self) -> None:
        """Makes the folder, or goes on in it.

        Raises:
            PartsError: If it holds parts of a run with other settings.
            OptionError: If it cannot be written.
        """
        file = self.folder / SETTINGS
        # looked for before the settings, which whoever makes a part writes first
        stray = next(self.folder.glob("part-*.safetensors"), None)
        if file.exists():
            self._compare(file)
            return
        if stray is not None:
            raise PartsError(f"no {str(file)!r} beside {stray.name}; expected the settings of the parts: "
                             "give another --out, or --restart")  # fmt: skip
        try:
            with whole(file) as temporary:
                temporary.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot write to {str(self.folder)!r}: {error.strerror or error}") from None

    def _compare(self, file: Path) -> None:
        before = read_object(file, PartsError, "remove the folder to begin anew")
        different = [key for key in sorted({*before, *self.settings})
                     if before.get(key) != self.settings.get(key)]  # fmt: skip
        if different:
            told = "; ".join(f"{key}: {_short(before.get(key))}, now {_short(self.settings.get(key))}"
                             for key in different[:3])  # fmt: skip
            raise PartsError(
                f"{str(self.folder)!r} holds parts of a run with other settings ({told}); "
                "give another --out, or --restart"
            )

    def path(self, number: int) -> Path:
        """Returns the file of a part."""
        return self.folder / f"part-{number:06d}.safetensors"

    def missing(self, rank: int = 0, world: int = 1,
                written: Callable[[range], bool] = lambda numbers: True) -> list[int]:  # fmt: skip
        """Returns the parts that are still to be made by one of several processes.

        Arguments:
            rank: The number of the process.
            world: The number of processes.
            written: Whether what else is to be made of some images is there.
        """
        return [n for n, numbers in enumerate(self.ranges)
                if n % world == rank and not (self.path(n).exists() and written(numbers))]  # fmt: skip

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a part."""
        path = self.path(number)
        try:
            with whole(path) as temporary:
                temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        except OSError as error:
            raise OptionError(f"cannot write {str(path)!r}: {error.strerror or error}") from None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields the parts in their order.

        Raises:
            PartsError: If one is missing or damaged.
        """
        for number in range(len(self.ranges)):
            path = self.path(number)
            try:
                yield load_file(path)
            except (OSError, SafetensorError) as error:
                raise PartsError(f"cannot read {str(path)!r}: {error}; remove it and run again") from None

    def clear(self) -> None:
        """Removes the parts, and what a killed process has left behind."""
        for file in [
            *self.folder.glob("part-*.safetensors"),
            *self.folder.glob(".*.tmp"),
            self.folder / SETTINGS,
        ]:
            file.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

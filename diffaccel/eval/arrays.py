"""Arrays in ``.npy`` and ``.npz`` files, read row by row and never unpickled."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ..errors import DiffaccelError

__all__ = ["ArrayError", "ArrayFile", "members"]


class ArrayError(DiffaccelError, ValueError):
    """An array file that is damaged or not what was expected."""


def members(path: Path) -> list[str]:
    """Returns the names of the arrays in an ``.npz`` file.

    Raises:
        ArrayError: If it is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise ArrayError(f"cannot read {str(path)!r}: {error}; expected an .npz file") from None


class ArrayFile:
    """An array in a file, of which slices are read in rising order without ever holding it all.

    Arguments:
        path: A ``.npy`` file, or an ``.npz`` file, compressed or not.
        member: The array's name in an ``.npz`` file.

    Raises:
        ArrayError: If the file is damaged, has no such array, or one of Python objects.
    """

    def __init__(self, path: Path, member: str = "arr_0") -> None:
        self.path, self.member = path, member
        if path.suffix.lower() == ".npz" and member not in members(path):
            raise ArrayError(f"{str(path)!r} has the arrays {', '.join(members(path))}; expected {member!r}")
        with self._open() as file:
            self.shape, self.dtype = self._header(file)
        self._stream: Any = None
        self._next = 0

    def _open(self) -> IO[bytes]:
        try:
            if self.path.suffix.lower() == ".npy":
                return self.path.open("rb")
            return zipfile.ZipFile(self.path).open(f"{self.member}.npy")  # the member keeps the archive open
        except (OSError, zipfile.BadZipFile, KeyError, RuntimeError) as error:  # RuntimeError: encrypted
            raise ArrayError(f"cannot read {str(self.path)!r}: {error}") from None

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
        try:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ArrayError(f"{str(self.path)!r} holds no array {self.member!r}: {error}") from None
        if dtype.hasobject or fortran or not shape:
            raise ArrayError(f"{str(self.path)!r}: {self.member!r} is no plain array of rows")
        return shape, dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Returns rows [start, stop) as an array.

        Raises:
            ArrayError: If the file ends before them.
        """
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ArrayError("array files are read with step 1")
        if self._stream is None or start < self._next:
            self._stream, self._next = self._open(), 0
            self._header(self._stream)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        while self._next < start:
            skipped = min(start - self._next, 64)
            self._read(skipped * size)
            self._next += skipped
        content = self._read((stop - start) * size)
        self._next = stop
        return np.frombuffer(bytearray(content), self.dtype).reshape(stop - start, *self.shape[1:])

    def _read(self, size: int) -> bytes:
        try:
            content = self._stream.read(size)
        except (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            raise ArrayError(f"cannot read {str(self.path)!r}: {error}") from None
        if len(content) != size:
            raise ArrayError(f"{str(self.path)!r} ends within {self.member!r}")
        return content

"""Feature vectors of a set of images: in memory, or in a file that is mapped block by block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import OptionError

__all__ = ["FeatureFile", "Rows", "blocks", "check_rows", "placed"]

ROWS = 2048
"""Rows that are read at once: 16 MB of 2048 float32 features."""


class Rows(Protocol):
    """Feature vectors (N, d); a numpy array is one, and so is a `FeatureFile`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of vectors, and their length."""
        ...

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Returns the vectors of a slice."""
        ...


def blocks(features: Rows, size: int | None = None) -> Iterator[np.ndarray]:
    """Yields the rows as float64 arrays (B, d) of at most ``size`` rows, ``ROWS`` by default."""
    for _, block in placed(features, size=size):
        yield block


def placed(features: Rows, first: int = 0, size: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the float64 blocks (B, d) of `blocks` with their places, for work on pairs of blocks.

    Arguments:
        features: The features, with shape (N, d).
        first: The row to begin with.
        size: The largest number of rows of a block, ``ROWS`` by default.
    """
    size = size or ROWS
    for start in range(first, features.shape[0], size):
        block = np.asarray(features[start : start + size], dtype=np.float64)
        yield slice(start, start + len(block)), block


def check_rows(features: Rows, name: str, least: int, dim: int | None = None) -> tuple[int, int]:
    """Checks a set of features, all of whose blocks are read once.

    Arguments:
        features: The features, with shape (N, d).
        name: What to call them in an error.
        least: The smallest N.
        dim: The required d; None for any.

    Returns:
        N and d.

    Raises:
        OptionError: If it is no matrix, too short, of another length, or holds NaN or infinity.
    """
    if len(features.shape) != 2 or features.shape[1] < 1:
        raise OptionError(f"{name} has shape {tuple(features.shape)}; expected (N, d)")
    count, length = features.shape
    if dim is not None and length != dim:
        raise OptionError(f"{name} has features of length {length}, the other set of length {dim}")
    if count < least:
        raise OptionError(f"{name} has {count} rows; at least {least} are needed")
    for index, block in enumerate(blocks(features)):
        bad = np.flatnonzero(~np.isfinite(block).all(1))
        if len(bad):
            raise OptionError(f"{name} holds NaN or infinity, first in row {index * ROWS + bad[0]}")
    return count, length


class FeatureFile:
    """Float32 feature vectors in a raw file, which grows by `append`; no more than a block is in memory.

    Arguments:
        path: The file; what it holds already is kept.
        dim: The length of a vector.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path, self.dim = path, dim
        self.count = path.stat().st_size // (4 * dim) if path.exists() else 0

    @property
    def shape(self) -> tuple[int, int]:
        """The number of vectors, and their length."""
        return self.count, self.dim

    def append(self, rows: np.ndarray) -> None:
        """Adds vectors (B, d) at the end, over a vector that was written by half.

        Raises:
            OptionError: If they have another length.
        """
        if rows.shape[1:] != (self.dim,):
            raise OptionError(
                f"rows of shape {rows.shape[1:]}; {str(self.path)!r} holds vectors of {self.dim}"
            )
        with self.path.open("r+b" if self.count else "wb") as file:
            file.seek(4 * self.dim * self.count)
            file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        self.count += len(rows)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Returns the vectors of a slice; the mapping lives as long as the array."""
        start, stop, step = rows.indices(self.count)
        if stop <= start:
            return np.empty((0, self.dim), np.float32)
        mapped = np.memmap(self.path, "<f4", "r", offset=4 * self.dim * start, shape=(stop - start, self.dim))
        return mapped[::step]

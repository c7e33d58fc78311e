"""Measurements that are kept in files, so that a benchmark goes on where it was stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffaccel.kept import kept_arrays

__all__ = ["kept"]


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers and arrays in an .npz file, which are made and written if there is none."""
    return {key: value if value.ndim else float(value) for key, value in kept_arrays(file, make).items()}

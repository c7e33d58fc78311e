"""Measurements that are kept in files, so that a benchmark goes on where it was stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffaccel.files import whole

__all__ = ["kept"]


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers and arrays in an .npz file, which are made and written if there is none."""
    if not file.exists():
        with whole(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **make())
    with np.load(file) as found:
        return {key: found[key] if found[key].ndim else float(found[key]) for key in found.files}

"""Measurements that are kept in files, so that what takes long goes on where it was stopped."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import whole

__all__ = ["kept_arrays"]


def kept_arrays(file: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the arrays in an .npz file, which are made and written if there is none.

    Arguments:
        file: The file.
        make: Returns numbers, texts and arrays by name.
    """
    if not file.exists():
        with whole(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **make())
    with np.load(file) as found:
        return {key: found[key] for key in found.files}

"""An error of somebody's code in one line."""

import traceback
from pathlib import Path

from diffaccel.errors import DiffaccelError

__all__ = ["described"]


def described(error: Exception) -> str:
    """Returns an error in one line: what, and where; of one that ours reports, what it was caused by."""
    if isinstance(error, DiffaccelError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]} ({Path(frame.filename).name}:{frame.lineno})"

"""Files that are complete or absent whenever a process ends, and JSON objects that are what was expected."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DiffaccelError

__all__ = ["read_object", "whole", "whole_folder"]


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a name beside ``path``, which what is written there gets if the block ends without an error.

    Arguments:
        path: The file to make or replace; its folder is made.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``, which takes that name if the block ends without an error.

    Arguments:
        path: The folder to make or replace.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_name(f"{temporary.name}-old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_object(file: Path, error: type[DiffaccelError], remedy: str = "expected JSON") -> dict[str, Any]:
    """Returns the JSON object in a file.

    Arguments:
        file: The file.
        error: What to raise if it cannot be read, or holds something else.
        remedy: What the error says to do if it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        reason = " ".join(str(cause).split())
        raise error(f"cannot read {str(file)!r}: {reason}; {remedy}") from cause
    if not isinstance(content, dict):
        raise error(f"{str(file)!r} holds a {type(content).__name__}; expected a JSON object")
    return content

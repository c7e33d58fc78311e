"""Files that are complete or absent, whenever the process may end."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from diffaccel.errors import ModelError
from diffaccel.files import whole

__all__ = ["find", "read", "replace_text", "set_aside", "write"]

KEEP = 2  # the newest, and the last good one should it be damaged


def find(run: Path) -> list[Path]:
    """Returns the checkpoints of a run, newest first."""
    return sorted(run.glob("checkpoint-*.pt"), reverse=True)


def write(state: dict[str, Any], run: Path, images: int) -> Path:
    """Writes the state after ``images`` images, then removes all but the two newest checkpoints."""
    file = run / f"checkpoint-{images:010d}.pt"
    with whole(file) as temporary, temporary.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    for old in find(run)[KEEP:]:
        old.unlink()
    return file


def read(source: Path) -> dict[str, Any]:
    """Reads a checkpoint, or the newest of a run folder that can be read.

    Raises:
        ModelError: If there is none.
    """
    candidates = find(source) if source.is_dir() else [source] if source.is_file() else []
    if not candidates:
        raise ModelError(
            f"no checkpoint at {str(source)!r}; expected a run folder with checkpoint-*.pt, or one"
        )
    for file in candidates:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises nearly every kind of error for a damaged file
            reason = " ".join(str(error).split())[:200]
            logging.getLogger(__name__).warning("damaged checkpoint %s: %s", file, reason)
    raise ModelError(f"cannot read {', '.join(map(str, candidates))}: {reason}")


def set_aside(run: Path, images: int) -> None:
    """Renames the checkpoints of later images, damaged or of another continuation, so that none is found."""
    for file in find(run):
        if int(file.stem.partition("-")[2]) > images:
            file.rename(file.with_suffix(".later"))


def replace_text(file: Path, text: str) -> None:
    """Writes a text file as a whole."""
    with whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")

"""The state of a run on disk: written aside and renamed, so that the last good one can always be read."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import DiffaccelError
from ..files import read_object, whole

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["CheckpointError", "find", "load", "save"]

FOLDER, STATE = "checkpoints", "trainer.json"
ELSEWHERE = ("precision", "processes")
"""What may be otherwise where a student is only exported."""

_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, EOFError, UnpicklingError)
"""What PyTorch and accelerate raise for files that are not what they were."""


class CheckpointError(DiffaccelError, ValueError):
    """A checkpoint that cannot be written or read, or that belongs to another run."""


def find(run: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, newest first."""
    return sorted((file.parent for file in (run / FOLDER).glob(f"images-*/{STATE}")), reverse=True)


def save(trainer: "Trainer", keep: int) -> Path:
    """Writes the state of all processes, then removes all but the newest ``keep`` checkpoints.

    Raises:
        CheckpointError: If it cannot be written; what there was before is left as it was.
    """
    accelerator, images = trainer.accelerator, trainer.images
    final = trainer.run / FOLDER / f"images-{images:010d}"
    temporary = final.with_name(f".{final.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            for name, tensors in trainer.tensors().items():
                save_file(tensors, temporary / f"{name}.safetensors")
            (temporary / STATE).write_text(json.dumps(trainer.state_dict(), indent=1), encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        before = find(trainer.run)
        last = f"the last good one is {before[0]}" if before else "there is none before it"
        raise CheckpointError(f"cannot write the checkpoint {str(final)!r}: {error}; {last}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = final.with_name(f".{final.name}.old")
        shutil.rmtree(older, ignore_errors=True)
        if final.exists():
            os.replace(final, older)
        os.replace(temporary, final)
        shutil.rmtree(older, ignore_errors=True)
        for old in find(trainer.run)[keep:]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load(trainer: "Trainer", folder: Path, training: bool = True) -> None:
    """Returns to a saved state.

    Arguments:
        trainer: The trainer.
        folder: The checkpoint.
        training: Whether it is to be trained on; if not, `ELSEWHERE` may differ.

    Raises:
        CheckpointError: If it is not there or damaged, or of other settings or another number of processes.
    """
    if not (folder / STATE).is_file():
        raise CheckpointError(f"no checkpoint {str(folder)!r}; expected a folder with a {STATE}")
    state = read_object(folder / STATE, CheckpointError)
    _compare(trainer.facts, state.get("facts"), folder, () if training else ELSEWHERE)
    if not (folder / f"random_states_{trainer.accelerator.process_index}.pkl").is_file():
        raise CheckpointError(f"{str(folder)!r} lacks the random state of a process")
    try:
        trainer.load_state_dict(state)
        trainer.accelerator.load_state(str(folder), strict=not trainer.partial)
        trainer.load_tensors({file.stem: load_file(file) for file in folder.glob("*.safetensors")
                              if not file.name.startswith("model")})  # fmt: skip
    except (*_DAMAGED, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"damaged checkpoint {str(folder)!r}: {type(error).__name__}: {reason}"
        ) from error


def _compare(own: Mapping[str, Any], saved: Any, folder: Path, ignored: Sequence[str]) -> None:
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{str(folder)!r} does not say what run it is of")
    for key in sorted({*own, *saved} - {*ignored}):
        if own.get(key) != saved.get(key):
            raise CheckpointError(
                f"{str(folder)!r} is a checkpoint of another run: {key} is {saved.get(key)!r} there and "
                f"{own.get(key)!r} here"
            )


def keep_raw(trainer: "Trainer", interval: int, keep: int = 0) -> None:
    """Keeps a copy of the student's raw weights, if the last one is ``interval`` images ago.

    Arguments:
        trainer: The trainer.
        interval: The images between two copies; 0 keeps none.
        keep: How many of the newest copies stay; 0 for all.

    Raises:
        CheckpointError: If it cannot be written.
    """
    folder = trainer.run / "raw"
    file = folder / f"student-{trainer.images:010d}.safetensors"
    if not interval or not trainer.accelerator.is_main_process:
        return
    newest = max(
        (int(found.stem.partition("-")[2]) for found in folder.glob("student-*.safetensors")), default=0
    )
    if trainer.images - newest >= interval:
        role = trainer.roles["student"]
        tensors = {key: value.detach().to("cpu", torch.float32).contiguous()
                   for key, value in zip(role.keys, role.parameters, strict=True)}  # fmt: skip
        try:
            with whole(file) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {str(file)!r}: {error}") from error
        for old in sorted(folder.glob("student-*.safetensors"))[: -keep or 0]:
            old.unlink()

"""What runs and what refuses: each peer and each of our accelerators tried on a model, and what they cost.

A trial is a short call as shipped, by the public interface alone, and one with the help of `peer_methods`.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from described import described
from paired import paired
from peer_methods import PEERS, NothingToDo, Subject
from torch import Tensor

from diffaccel.eval import count_flops
from diffaccel.pipelines import attached

__all__ = ["costs", "trials"]

STEPS = 10
"""The steps of a trial; there are searched schedules for as many."""

TRIED: dict[str, tuple[Any, Any]] = {
    "sada": ({"sada": {"tolerance": 0.03}}, {"sada": {"tolerance": 1e-12}}),
    "inherit": ({"inherit": {"order": 1}}, {"inherit": {"every": 1}}),
    "reuse": ({"reuse": {}}, {"reuse": {"every": 1}}),
    "s3": ("s3", None),
}
"""Our accelerators by name: as they are tried, and with options with which they save nothing."""

Attach = Callable[[], AbstractContextManager[None]]


def trials(subject: Subject, call: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Returns what happened to a model under each peer and each of ours, as plain data.

    Arguments:
        subject: The model.
        call: Runs a call of `STEPS` steps, and returns its output.
    """
    box: list[Tensor] = []
    work = count_flops(lambda: box.append(call()))
    tried, rows = partial(_outcome, call=call, plain=box.pop(), work=work), []
    for peer in PEERS:
        options = peer.typical(subject.kind, STEPS)
        row: dict[str, Any] = {"name": peer.name, "group": "peer", "options": options}
        for key, helped in (("shipped", False), ("helped", True)):
            row[key] = tried(partial(peer.attach, subject, STEPS, helped, **options))
        print(peer.name, row["shipped"], row["helped"], flush=True)
        rows.append(row)
    for name, (spec, _) in TRIED.items():
        found = tried(partial(attached, subject.pipe, spec))
        print(name, found, flush=True)
        rows.append({"name": name, "group": "ours", "options": spec, "shipped": found, "helped": found})
    return rows


def _outcome(attach: Attach, call: Callable[[], Tensor], plain: Tensor, work: int) -> dict[str, Any]:
    """Returns the part of the operations that were left and the relative error, or why it failed."""
    box: list[Tensor] = []
    try:
        with attach():
            flops = count_flops(lambda: box.append(call()))
    except NothingToDo:
        return {"status": "unhooked"}
    except Exception as error:
        return {"status": "fails", "message": described(error)}
    difference = float((box[0] - plain).norm() / plain.norm())
    return {"status": "runs" if difference else "idle", "flops": flops / work, "error": difference}


def costs(subject: Subject, call: Callable[[], Tensor], rows: list[dict[str, Any]], pairs: int) -> None:
    """Adds to rows of `trials` what those that run cost in processor time, against plain calls in pairs.

    Arguments:
        subject: The model.
        call: Runs a call, and returns its output.
        rows: The rows; "cost" is that of the setting that was tried, "overhead" that of saving nothing.
        pairs: Pairs of calls.
    """
    for row in rows:
        if row["helped"]["status"] not in ("runs", "idle"):
            continue
        for key, attach in _attachments(subject, row).items():
            try:
                row[key] = paired(partial(_seconds, attach, call), pairs)
            except Exception as error:
                row[key] = {"message": described(error)}
            print(row["name"], key, row[key], flush=True)


def _attachments(subject: Subject, row: dict[str, Any]) -> dict[str, Attach]:
    """Returns what attaches a row's method as it was tried, and so that it saves nothing."""
    peer = next((peer for peer in PEERS if peer.name == row["name"]), None)
    if peer is not None:
        settings = {"cost": row["options"], "overhead": peer.passive}
        return {key: partial(peer.attach, subject, STEPS, True, **options)
                for key, options in settings.items()}  # fmt: skip
    specs = dict(zip(("cost", "overhead"), TRIED[row["name"]], strict=True))
    return {key: partial(attached, subject.pipe, spec) for key, spec in specs.items() if spec is not None}


def _seconds(attach: Attach, call: Callable[[], Tensor], with_it: bool) -> float:
    """Returns the processor time of a call; attaching is no part of it."""
    with attach() if with_it else nullcontext():
        begin = time.process_time()
        with torch.no_grad():
            call()
        return time.process_time() - begin

"""Processes for runs that are killed, and for runs on several processes; one server imports for all of them.

They are not forked from the tests' own process: PyTorch does not train in the forks of one that has.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

__all__ = ["begun", "together"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["diffaccel.cli", "diffaccel.distill"])


def begun(work: Callable[..., object], *arguments: Any, **environment: str) -> BaseProcess:
    """Starts a process that calls a function of a module with arguments, both of which can be pickled."""
    process = _CONTEXT.Process(target=_call, args=({**os.environ, **environment}, work, arguments))
    process.start()
    return process


def together(work: Callable[..., object], *arguments: Any, count: int = 2) -> None:
    """Runs the same in some processes, as ``accelerate launch`` does, and asserts that all end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count),
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    processes = [begun(work, *arguments, **shared, RANK=str(n), LOCAL_RANK=str(n)) for n in range(count)]
    for process in processes:
        process.join(timeout=200)
    assert [process.exitcode for process in processes] == [0] * count


def _call(environment: dict[str, str], work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*arguments)

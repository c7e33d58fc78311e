"""Processes that share this one's imports: for runs that are killed, and for runs on several processes."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkProcess

__all__ = ["forked", "together"]


def forked(work: Callable[[], object], environment: dict[str, str] | None = None) -> ForkProcess:
    """Starts a process in which accelerate knows of no other one yet."""

    def target() -> None:
        from accelerate.state import AcceleratorState

        os.environ.update(environment or {})
        AcceleratorState._reset_state(True)
        work()

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def together(work: Callable[[], object], count: int = 2) -> None:
    """Runs the same in some processes, as ``accelerate launch`` does, and asserts that all end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count),
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    processes = [forked(work, {**shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(count)]
    for process in processes:
        process.join(timeout=200)
    assert [process.exitcode for process in processes] == [0] * count

"""``diffaccel distill METHOD | resume``: a run with its progress, its log and its report."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..distill.config import read
from ..distill.runs import Run, export_run, resume, start
from ..distill.trainer import Trainer
from ..distill.validation import Validation
from ..zoo.folders import quiet as silence
from .combine import at_end, check_run
from .figures import draw_grid
from .reading import check_options
from .report import page
from .writing import write_files

__all__ = ["begin", "go_on", "interruptible", "leave"]

RECORD, REPORT, GRID = "distill.json", "report.html", "samples.png"


def begin(
    method: str, file: Path | None, overrides: Sequence[str], minutes: float | None, quiet: bool
) -> str:
    """Begins a run of a method, and trains.

    Arguments:
        method: The method's name.
        file: The YAML file of settings, or None.
        overrides: Settings as ``key=value``.
        minutes: A limit of time.
        quiet: Whether to show no progress.

    Returns:
        A line on how it ended, and some on the combination of its checkpoints if there was one.
    """
    return _train(start(read(file, overrides, method=method)), minutes, quiet)


def go_on(folder: Path, overrides: Sequence[str], minutes: float | None, quiet: bool) -> str:
    """Goes on with the run in a folder, as `begin` does."""
    return _train(resume(folder, tuple(overrides)), minutes, quiet)


def leave(folder: Path, out: Path, dtype: str, lora: bool, overwrite: bool) -> str:
    """Writes the student of a run as a pipeline folder, and returns one line on it."""
    check_options("cpu", dtype, None, None)
    with silence([]):
        made = export_run(resume(folder, training=False), out, getattr(torch, dtype), lora, overwrite)
    size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    return f"{made}: {size / 2**20:.1f} MiB"


def _train(run: Run, minutes: float | None, quiet: bool) -> str:
    trainer, config = run.trainer, run.config
    main = trainer.accelerator.is_main_process
    check_run(run)
    with silence([]):
        validation = Validation(run) if config.eval_count else None
    until = None if minutes is None else time.monotonic() + 60 * minutes

    def validate() -> dict[str, Any]:
        assert validation is not None
        with silence([]):
            record = validation()
        if main:
            _write(run, validation, record)
        return record

    with interruptible() as interrupted, _progress(run, quiet or not main) as show:
        outcome = trainer.fit(
            halt=lambda: bool(interrupted) or (until is not None and time.monotonic() > until),
            validate=None if validation is None else validate, show=show,
        )  # fmt: skip
    trainer.accelerator.end_training()
    ended = f"{outcome} after {trainer.images} images: {run.folder}"
    if config.combine_budget and outcome == "complete" and main:
        return "\n".join([ended, *at_end(run)])
    return ended


def _write(run: Run, validation: Validation, latest: dict[str, Any]) -> None:
    """Writes the grid of samples, the record and the report; ``latest`` is not in the log yet."""
    log = run.folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    rows = [*map(json.loads, lines), {"images": run.trainer.images, **latest}]
    settings = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    record = {"kind": "distill", "settings": settings, "log": rows}
    grid = draw_grid(list(validation.shown.items()), validation.conditions[:10])
    write_files(run.folder, {
        GRID: grid, RECORD: json.dumps(record, indent=1), REPORT: page([record], [grid]),
    })  # fmt: skip


@contextlib.contextmanager
def _progress(run: Run, quiet: bool) -> Iterator[Callable[[Trainer], None]]:
    columns = ("{task.description}", BarColumn(), "{task.completed:,.0f}/{task.total:,.0f} images")
    speed = TextColumn("{task.fields[speed]:.0f} img/s ETA")
    console = Console(stderr=True)
    with Progress(*columns, speed, TimeRemainingColumn(), console=console,
                  disable=quiet or not console.is_terminal) as progress:  # fmt: skip
        task = progress.add_task(run.config.method, total=run.config.images, completed=run.trainer.images,
                                 speed=0.0)  # fmt: skip
        first, since = run.trainer.images, time.monotonic()

        def show(trainer: Trainer) -> None:
            speed = (trainer.images - first) / (time.monotonic() - since)
            progress.update(task, completed=trainer.images, speed=speed)

        yield show


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields a list that fills at the first Ctrl-C; the second one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)

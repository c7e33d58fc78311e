"""``diffaccel bench``: accelerators against the plain pipeline and against plain fewer steps, interleaved."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ..eval import Fidelity, Timing, count_flops, fidelity, interleave
from ..pipelines import accelerate, resolve
from .generate import load
from .options import Sampler, default_conditions, device_of, open_output, read_accel, versions, write
from .report import draw_grid, markdown, render

__all__ = ["Row", "Settings", "bench"]


@dataclass(frozen=True)
class Settings:
    """The options of a benchmark, as the command names them."""

    model: str
    accel: tuple[str, ...]
    steps: int = 50
    guidance: float | None = None
    prompts: Path | None = None
    n: int = 64
    batch: int = 64
    seed: int = 0
    scheduler: str | None = None
    rounds: int = 3
    plain_steps: tuple[int, ...] = ()
    flops: bool = True
    device: str = "cpu"
    dtype: str = "float32"


@dataclass
class Row:
    """One line of the table.

    Arguments:
        name: The accelerator, or "plain".
        steps: The inference steps.
        kind: ``"reference"``, ``"accelerated"`` or ``"plain"`` (fewer steps).
        requested: Evaluations of the denoisers that the pipeline asked for.
        evaluated: Those that were run, per image.
        fidelity: The distance to the reference.
        flops: Floating-point operations an image.
        seconds: Wall-clock seconds of each round.
        outside: Of these, the seconds in VAE and text encoder.
        speedup: The reference's seconds over this row's, round by round.
        realized: The part of the ideal speed-up that was reached, VAE and text encoder left out.
    """

    name: str
    steps: int
    kind: str
    requested: int = 0
    evaluated: float = 0.0
    fidelity: Fidelity | None = None
    flops: float | None = None
    seconds: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    speedup: Timing | None = None
    realized: Timing | None = None

    @property
    def label(self) -> str:
        """The name, and the steps where they are the point."""
        return f"{self.name}, {self.steps} steps" if self.kind != "accelerated" else self.name


class Bench:
    """The rows of a benchmark and how they are run."""

    def __init__(self, settings: Settings, pipe: Any, sampler: Sampler) -> None:
        self.settings, self.pipe, self.sampler = settings, pipe, sampler
        self.specs = {name: read_accel(name) for name in settings.accel}
        self.images: dict[int, Tensor] = {}
        self.rows = [Row("plain", settings.steps, "reference")]
        self.rows += [Row(name, settings.steps, "accelerated") for name in settings.accel]

    def run(self, row: Row) -> tuple[Tensor, float]:
        """Makes the images of a row; plain ones too pass the gates, for the counts and clocks."""
        spec: Any = self.specs[row.name] if row.kind == "accelerated" else []
        accelerate(self.pipe, spec)
        device = device_of(self.pipe)
        begin = time.perf_counter()
        images = self.sampler(row.steps, self.settings.batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        accelerate(self.pipe, None)
        return images, seconds

    def warm_up(self, advance: Callable[[], None]) -> None:
        """Runs every accelerator once, which tells the fewer steps to compare with; then those."""
        for row in list(self.rows):
            self._first(row)
            advance()
        counts = {round(row.evaluated * row.steps / row.requested) for row in self.rows[1:]}
        for steps in sorted({*counts, *self.settings.plain_steps} - {self.settings.steps, 0}, reverse=True):
            self.rows.append(row := Row("plain", steps, "plain"))
            self._first(row)
            advance()

    def _first(self, row: Row) -> None:
        images, _ = self.run(row)
        self.images[id(row)] = images
        reports = self.sampler.reports
        row.requested = reports[0][1].requested
        row.evaluated = sum(size * report.evaluated for size, report in reports) / len(images)
        row.fidelity = fidelity(images, self.images[id(self.rows[0])])
        if self.settings.flops:
            row.flops = count_flops(lambda: self.run(row)) / self.sampler.count

    def measure(self, advance: Callable[[], None]) -> None:
        """Times all rows in interleaved rounds."""

        def after(turn: int, position: int, result: tuple[Tensor, float]) -> None:
            row = self.rows[position]
            row.seconds.append(result[1])
            parts = [report.seconds.get(part, 0.0) for _, report in self.sampler.reports
                     for part in ("vae", "text_encoder")]  # fmt: skip
            row.outside.append(sum(parts))
            advance()

        tasks = [lambda row=row: self.run(row) for row in self.rows]
        interleave(tasks, self.settings.rounds, after)
        reference = self.rows[0]
        for row in self.rows:
            pairs = list(zip(reference.seconds, row.seconds, strict=True))
            row.speedup = Timing(tuple(a / b for a, b in pairs))
            ideal = reference.evaluated / row.evaluated
            inside = zip(pairs, reference.outside, row.outside, strict=True)
            row.realized = Timing(tuple((a - v) / (b - w) / ideal for (a, b), v, w in inside))


def bench(settings: Settings, out: Path) -> list[Row]:
    """Runs a benchmark and writes ``bench.json``, ``table.md``, ``grid.png`` and ``report.html``.

    Raises:
        DiffaccelError: For any mistake in the settings, before anything is written.
    """
    for name in settings.accel:
        resolve(read_accel(name))
    pipe = load(settings.model, settings.scheduler, settings.device, settings.dtype)
    for name in settings.accel:
        accelerate(accelerate(pipe, read_accel(name)), None)
    conditions = _conditions(settings, pipe)
    sampler = Sampler(pipe, conditions, settings.steps, settings.guidance, settings.seed, settings.n)
    work = Bench(settings, pipe, sampler)
    with open_output(out):
        with Progress(transient=True) as progress:
            task = progress.add_task("warm-up", total=None)
            work.warm_up(lambda: progress.advance(task))
            progress.remove_task(task)
            total = len(work.rows) * settings.rounds
            task = progress.add_task(f"{settings.rounds} interleaved rounds", total=total)
            work.measure(lambda: progress.advance(task))
        _save(work, out)
    return work.rows


def _conditions(settings: Settings, pipe: Any) -> list[str]:
    if settings.prompts is None:
        return default_conditions(settings.model, pipe, settings.n)
    lines = settings.prompts.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _save(work: Bench, out: Path) -> None:
    settings = {key: value for key, value in asdict(work.settings).items() if value is not None}
    record: dict[str, Any] = {
        "settings": {**settings, "prompts": str(settings.get("prompts", "zoo"))},
        "images": work.sampler.count,
        "scheduler": type(work.pipe.scheduler).__name__,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(),
                    "device": str(device_of(work.pipe))},
        "versions": versions(),
        "rows": [asdict(row) for row in work.rows],
    }  # fmt: skip
    images = [(row.label, work.images[id(row)][:12]) for row in work.rows]
    captions = work.sampler.conditions[:12] or [str(n) for n in range(12)]
    grid = draw_grid(images, captions)
    table = markdown(work.rows)
    write(out / "bench.json", json.dumps(record, indent=1))
    write(out / "table.md", table)
    write(out / "grid.png", grid)
    write(out / "report.html", render(work.rows, record, grid))

"""``diffaccel bench``: accelerators against the plain pipeline and against plain fewer steps, interleaved."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..eval import (
    Fidelity,
    Memory,
    Timing,
    clock_outside,
    count_flops,
    fidelity,
    interleave,
    peak_memory,
    timed,
)
from ..eval.provenance import machine, plain, versions
from ..eval.sampler import Sampler, default_conditions, device_of
from ..pipelines import attached
from ..zoo.folders import quiet
from .figures import draw_grid
from .generate import load
from .reading import check_options, check_stacks, read_accel, read_prompts, read_steps
from .report import page
from .tables import bench_lines, markdown
from .writing import check_output, progress_bar, write_files

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
    rounds: int = 5
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
        calls: Calls of the denoisers in the whole run; a call for a part of the batch is one, too.
        fidelity: The distance to the reference.
        flops: Floating-point operations an image.
        memory: The most memory that the first run took, in bytes; None where it is not known.
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
    calls: int = 0
    fidelity: Fidelity | None = None
    flops: float | None = None
    memory: Memory | None = None
    seconds: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    speedup: Timing | None = None
    realized: Timing | None = None

    @property
    def label(self) -> str:
        """The name, and the steps where they are the point."""
        return f"{self.name}, {self.steps} steps" if self.kind != "accelerated" else self.name

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as plain data, medians and quartiles included."""
        record = asdict(self)
        for name in ("speedup", "realized"):
            timing: Timing | None = getattr(self, name)
            if timing is not None:
                record[name] = {**asdict(timing), "median": timing.median, "quartiles": timing.quartiles,
                                "interval": timing.interval}  # fmt: skip
        record["seconds_median"] = Timing(tuple(self.seconds)).median if self.seconds else None
        return record


class Bench:
    """The rows of a benchmark and how they are run."""

    def __init__(self, settings: Settings, pipe: Any, sampler: Sampler) -> None:
        self.settings, self.pipe, self.sampler = settings, pipe, sampler
        self.device = device_of(pipe)
        stacks = {name: read_steps(name, settings.steps) for name in settings.accel}
        self.specs = {name: read_accel(stack) for name, (stack, _) in stacks.items()}
        self.images: dict[int, Tensor] = {}
        self.rows = [Row("plain", settings.steps, "reference")]
        self.rows += [Row(name, steps, "accelerated") for name, (_, steps) in stacks.items()]

    def run(self, row: Row, plainly: Any = None) -> Tensor:
        """Makes the images of a row.

        Arguments:
            row: The row.
            plainly: The stack of a plain row: None, or an empty one for its report.
        """
        with attached(self.pipe, self.specs[row.name] if row.kind == "accelerated" else plainly):
            return self.sampler(row.steps, self.settings.batch)

    def warm_up(self, advance: Callable[[], None]) -> None:
        """Runs every accelerator once, which tells the fewer steps to compare with; then those."""
        for row in list(self.rows):
            self._first(row)
            advance()
        full, asked = self.settings.steps, self.rows[0].requested
        counts = {round(row.evaluated * full / asked) for row in self.rows[1:]}
        counts = {*counts, *self.settings.plain_steps} - {0, full} or {max(1, full // 2)} - {full}
        for steps in sorted(counts, reverse=True):
            self.rows.append(row := Row("plain", steps, "plain"))
            self._first(row)
            advance()

    def _first(self, row: Row) -> None:
        if self.device.type in ("cpu", "cuda"):
            images, row.memory = peak_memory(lambda: self.run(row, plainly=[]), self.device)
        else:  # that of other devices is not known
            images = self.run(row, plainly=[])
        self.images[id(row)] = images
        reports = self.sampler.reports
        row.requested = reports[0][1].requested
        row.evaluated = sum(size * report.evaluated for size, report in reports) / len(images)
        row.calls = sum(_calls(report) for _, report in reports)
        row.fidelity = fidelity(images, self.images[id(self.rows[0])])
        if self.settings.flops:
            row.flops = count_flops(lambda: self.run(row)) / self.sampler.count

    def measure(self, advance: Callable[[], None]) -> None:
        """Times all rows in interleaved rounds; the plain ones without any gate."""

        def measured(row: Row) -> tuple[float, float]:
            with clock_outside(self.pipe, self.device) as outside:
                _, seconds = timed(lambda: self.run(row), self.device)
            return seconds, sum(outside)

        def after(turn: int, position: int, result: tuple[float, float]) -> None:
            self.rows[position].seconds.append(result[0])
            self.rows[position].outside.append(result[1])
            advance()

        tasks = [functools.partial(measured, row) for row in self.rows]
        interleave(tasks, self.settings.rounds, after)
        reference = self.rows[0]
        for row in self.rows:
            pairs = list(zip(reference.seconds, row.seconds, strict=True))
            row.speedup = Timing(tuple(a / b for a, b in pairs))
            ideal = reference.evaluated / row.evaluated
            inside = zip(pairs, reference.outside, row.outside, strict=True)
            row.realized = Timing(tuple((a - v) / (b - w) / ideal for (a, b), v, w in inside))


def _calls(report: Any) -> int:
    """Returns the calls of the denoisers: those asked for, but for those that all samples skipped."""
    skipped = [action for action in report.actions
               if action.what == "skip" and action.network not in report.auxiliary
               and len(action.samples) >= report.batch]  # fmt: skip
    return report.requested - len(skipped)


def bench(settings: Settings, out: Path) -> dict[str, Any]:
    """Runs a benchmark and writes ``bench.json``, ``table.md``, ``grid.png`` and ``report.html``.

    Returns:
        The record that ``bench.json`` holds.

    Raises:
        DiffaccelError: For any mistake in the settings; nothing is written then.
    """
    check_options(settings.device, settings.dtype, settings.guidance, settings.scheduler)
    check_stacks(settings.accel)
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    check_output(out)
    with quiet([]):
        pipe = load(settings.model, settings.scheduler, settings.device, settings.dtype)
        check_stacks(settings.accel, pipe)
        if prompts is None:
            prompts = default_conditions(settings.model, pipe, settings.n)
        sampler = Sampler(pipe, prompts, settings.steps, settings.guidance, settings.seed, settings.n)
        work = Bench(settings, pipe, sampler)
        with progress_bar() as progress:
            task = progress.add_task("warm-up and counts", total=None)
            work.warm_up(lambda: progress.advance(task))
            progress.remove_task(task)
            total = len(work.rows) * settings.rounds
            task = progress.add_task(f"{settings.rounds} interleaved rounds", total=total)
            work.measure(lambda: progress.advance(task))
    record = _record(work)
    write_files(out, _files(work, record))
    return record


def _record(work: Bench) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(work.settings).items() if value is not None}
    scheduler = work.pipe.scheduler
    return plain({
        "kind": "bench",
        "settings": {**settings, "prompts": str(settings.get("prompts", "built in")),
                     "guidance": work.sampler.guidance},
        "images": work.sampler.count,
        "conditions": work.sampler.conditions,
        "pipeline": type(work.pipe).__name__,
        "scheduler": type(scheduler).__name__,
        "scheduler_config": dict(scheduler.config),
        "machine": machine(work.device),
        "versions": versions(),
        "rows": [row.to_dict() for row in work.rows],
    })  # fmt: skip


def _files(work: Bench, record: dict[str, Any]) -> dict[str, str | bytes]:
    images = [(row.label, work.images[id(row)][:12]) for row in work.rows]
    captions = work.sampler.conditions[:12] or [f"image {n}" for n in range(12)]
    grid = draw_grid(images, captions)
    return {
        "bench.json": json.dumps(record, indent=1, allow_nan=False),
        "table.md": markdown(bench_lines(record["rows"])),
        "grid.png": grid,
        "report.html": page([record], [grid]),
    }

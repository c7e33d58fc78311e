"""``diffaccel eval``: generates with every method, scores, and compares; in parts that survive a kill."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import zoo
from ..errors import MissingReference
from ..eval.evaluation import Evaluation, Method, labels_of
from ..eval.metrics import check_metrics
from ..eval.parts import Parts
from ..eval.protocols import Extractor, protocol
from ..eval.provenance import machine, model_digest, plain, settings_digest, versions
from ..eval.reference import zoo_statistics
from ..eval.sampler import Sampler, default_conditions
from ..eval.scoring import reference_of
from ..eval.statistics import Statistics
from ..eval.summary import MethodResult, read_results, summarize
from ..zoo.folders import quiet
from .figures import draw_grid
from .generate import load
from .processes import own_device, processes
from .reading import check_options, check_stacks, read_accel, read_prompts, read_steps
from .report import page
from .tables import eval_lines, markdown
from .writing import check_output, counting, write_files

__all__ = ["Settings", "evaluate"]


@dataclass(frozen=True)
class Settings:
    """The options of an evaluation, as the command names them."""

    model: str
    accel: tuple[str, ...] = ()
    steps: int = 50
    plain_steps: tuple[int, ...] = ()
    guidance: float | None = None
    scheduler: str | None = None
    prompts: Path | None = None
    n: int = 5000
    batch: int = 64
    seed: int = 0
    protocol: str = "offline"
    metrics: tuple[str, ...] = ()
    reference: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def methods(self) -> list[Method]:
        """The plain pipeline first, then the accelerated ones, and the plain one with other steps."""
        stacks = {name: read_steps(name, self.steps) for name in self.accel}
        accelerated = [Method(name, steps, read_accel(stack)) for name, (stack, steps) in stacks.items()]
        others = [Method("plain", steps) for steps in dict.fromkeys(self.plain_steps) if steps != self.steps]
        return [Method("plain", self.steps), *accelerated, *others]


def evaluate(
    settings: Settings, out: Path, restart: bool = False, save_images: bool = False
) -> dict[str, Any]:
    """Runs or continues an evaluation; writes ``eval.json``, ``table.md``, ``grid.png`` and ``report.html``.

    Under ``accelerate launch`` the processes share the parts, and the first one writes.

    Arguments:
        settings: The settings.
        out: The folder; its ``parts`` are what a later call goes on from.
        restart: Whether to throw away what has been done.
        save_images: Whether to write all images as PNG files.

    Returns:
        The record; an empty one in the other processes.

    Raises:
        DiffaccelError: For any mistake in the settings; no part is lost by one.
    """
    check_options(settings.device, settings.dtype, settings.guidance, settings.scheduler)
    names = check_metrics(settings.metrics or protocol(settings.protocol).metrics)
    check_stacks(settings.accel)
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    check_output(out)
    rank, world, wait = processes(settings.device)
    with quiet([]):
        work = _work(settings, prompts, own_device(settings.device, world),
                     out / "images" if save_images else None)  # fmt: skip
        parts = Parts(out / "parts", _facts(settings, work), work.sampler.count, settings.batch)
        if restart and rank == 0:
            parts.clear()
        wait()
        parts.open()
        _make(parts, work, rank, world)
        wait()
    if rank:
        return {}
    return _finish(settings, parts, work, names, out)


def _work(settings: Settings, prompts: list[str] | None, device: str, images: Path | None) -> Evaluation:
    zoo.resolve_model(settings.model)
    if settings.reference is None and settings.model not in zoo.names():
        raise MissingReference(
            "give --reference, images or statistics; only models of the zoo have their own"
        )
    pipe = load(settings.model, settings.scheduler, device, settings.dtype)
    check_stacks(settings.accel, pipe)
    sampler = _sampler(settings, pipe, prompts)
    return Evaluation(pipe, sampler, settings.methods, Extractor(protocol(settings.protocol), device), images)


def _sampler(settings: Settings, pipe: Any, prompts: list[str] | None) -> Sampler:
    if prompts is None:
        conditions = default_conditions(settings.model, pipe, settings.n)
    else:  # in turn, as often as it takes
        conditions = [prompts[n % len(prompts)] for n in range(settings.n)]
    return Sampler(pipe, conditions, settings.steps, settings.guidance, settings.seed, settings.n)


def _facts(settings: Settings, work: Evaluation) -> dict[str, Any]:
    """Returns everything that the parts depend on."""
    chosen = {
        key: value
        for key, value in asdict(settings).items()
        if key not in ("prompts", "reference", "metrics")
    }
    sampler, scheduler = work.sampler, work.pipe.scheduler
    return plain({
        **chosen, "guidance": sampler.guidance, "features": work.extractor.record, "judges": work.judges,
        "weights": model_digest(work.pipe),
        "versions": versions(), "conditions": settings_digest({"conditions": sampler.conditions}),
        "pipeline": type(sampler.pipe).__name__, "scheduler_class": type(scheduler).__name__,
        "scheduler_config": dict(scheduler.config),
    })  # fmt: skip


def _make(parts: Parts, work: Evaluation, rank: int, world: int) -> None:
    todo = parts.missing(rank, world, work.written)
    total = sum(len(parts.ranges[number]) for number in todo) * len(work.methods)
    with counting("images", total) as advance:
        for number in todo:
            parts.save(number, work.part(parts.ranges[number], advance))


def _finish(
    settings: Settings, parts: Parts, work: Evaluation, names: list[str], out: Path
) -> dict[str, Any]:
    extractor = work.extractor
    results = read_results(parts, work.methods, extractor, names)
    record = summarize(results, _reference(settings, extractor, names), extractor, names,
                       labels_of(work.sampler.conditions))  # fmt: skip
    record = {"kind": "eval", "settings": parts.settings, **record}
    grid = draw_grid([(result.method.label, result.shown / 255) for result in results],
                     work.sampler.conditions[: len(results[0].shown)])  # fmt: skip
    write_files(out, {
        "eval.json": json.dumps(record, indent=1, allow_nan=False),
        "timing.json": json.dumps(_timing(results, extractor.device), indent=1),
        "table.md": markdown(eval_lines(record["rows"])),
        "grid.png": grid,
        "report.html": page([record], [grid]),
    })  # fmt: skip
    return record


def _timing(results: list[MethodResult], device: torch.device) -> dict[str, Any]:
    """Returns the seconds an image, beside the record: they differ from run to run."""
    seconds = {result.method.label: result.seconds / (result.statistics.count or 1) for result in results}
    return {"seconds_per_image": seconds, "machine": machine(device),
            "note": "not interleaved; use diffaccel bench to compare times"}  # fmt: skip


def _reference(settings: Settings, extractor: Extractor, names: list[str]) -> Statistics:
    """Returns the statistics of the reference; those of the zoo's are kept in the cache."""
    with counting("reference") as advance:
        if settings.reference is not None:
            return reference_of(settings.reference, extractor, names, batch=settings.batch, advance=advance)
        return zoo_statistics(extractor, names, advance)

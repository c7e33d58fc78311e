"""``diffaccel search s3 | polish | autodiffusion | inherit``: what makes a model fast, searched."""

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import OptionError, closest
from ..eval import Extractor, protocol
from ..eval.provenance import plain, versions
from ..eval.sampler import default_conditions
from ..eval.scoring import reference_of
from ..pipelines import Inheritance
from ..samplers.autodiffusion import LayerSearch
from ..samplers.family import solver_of
from ..samplers.inheriting import InheritanceSearch
from ..samplers.objective import FrechetScore, Score
from ..samplers.polishing import Polish
from ..samplers.s3 import Search
from ..samplers.schedule import Schedule, load_schedules
from ..samplers.searched import fitting
from ..samplers.thinning import ThinnedSchedule
from ..zoo.folders import quiet
from .evaluate import processes
from .generate import load
from .reading import check_options, read_prompts
from .scoring import reference_data
from .writing import check_output, counting, write_files

__all__ = [
    "OBJECTIVES",
    "Settings",
    "inheritance_lines",
    "layer_lines",
    "lines_of",
    "polish_schedules",
    "polished_lines",
    "search_inheritance",
    "search_layers",
    "search_s3",
]

OBJECTIVES = ("distance", "fd")

FILE = "schedules.json"


@dataclass(frozen=True)
class Settings:
    """The options that all searches share, as the commands name them."""

    model: str
    nfe: tuple[int, ...] = (5,)
    guidance: float | None = None
    prompts: Path | None = None
    images: int = 32
    budget: int = 300
    seed: int = 0
    objective: str = "distance"
    protocol: str = "offline"
    reference: Path | None = None
    engine: str = "evolution"
    device: str = "cpu"
    dtype: str = "float32"
    scheduler: str | None = None


def search_s3(settings: Settings, out: Path) -> list[Schedule]:
    """Searches schedules, and writes ``scheduler_config.json`` and ``schedules.json``.

    Schedules of other numbers of evaluations that the folder holds already are kept. Under ``accelerate
    launch`` the processes share the candidates, and the first one writes.

    Arguments:
        settings: The settings.
        out: The folder; the states of unfinished searches are in it, too.

    Raises:
        DiffaccelError: For any mistake in the settings.
    """
    return _search(settings, out, _kind(Search, settings), {}, _write_schedules)


def polish_schedules(
    settings: Settings, out: Path, file: str, bound: float, near: int, depth: int, part: float
) -> list[Schedule]:
    """Moves the last steps of searched schedules for an objective; writes what `search_s3` does.

    Arguments:
        settings: The settings.
        out: The folder; the states of unfinished searches are in it, too.
        file: The schedules; those that ship with the package if it is empty.
        bound: By what factor the distance to the fine solution may grow.
        near: The first images, whose distance it is.
        depth: The most steps that are changed.
        part: How much of the change that is found is made.

    Raises:
        DiffaccelError: For any mistake in the settings.
    """

    def make(pipe: Any, evaluations: int, **common: Any) -> Polish:
        found = fitting(pipe, file, settings.guidance)
        known = {schedule.evaluations: schedule for schedule in found}
        if evaluations not in known:
            raise OptionError(f"no schedule of {evaluations} evaluations; there are {sorted(known)}")
        return Polish(pipe, known[evaluations], **numbers, **common)

    numbers: dict[str, Any] = {"bound": bound, "near": near, "depth": depth, "part": part}
    return _search(settings, out, make, {"file": file, **numbers}, _write_schedules)


def search_layers(settings: Settings, out: Path, max_drop: float, solver: str) -> list[ThinnedSchedule]:
    """Searches timesteps and layers to leave out, and writes one ``autodiffusion-N.json`` for each budget.

    Arguments:
        settings: The settings; ``nfe`` are budgets, in evaluations of the whole network.
        out: The folder; the states of unfinished searches are in it, too.
        max_drop: The largest part of the layers that is dropped at a step.
        solver: What goes from node to node.

    Raises:
        DiffaccelError: For any mistake in the settings.
    """
    options = {"max_drop": max_drop, "solver": solver}
    make, write = _kind(LayerSearch, settings, **options), functools.partial(_write_alone, "autodiffusion")
    return _search(settings, out, make, options, write)


def search_inheritance(settings: Settings, out: Path, steps: int, level: str) -> list[Inheritance]:
    """Searches what inherits at which step, and writes one ``inherit-N.json`` for each budget.

    Arguments:
        settings: The settings; ``nfe`` are budgets, in evaluations of the whole network.
        out: The folder; the states of unfinished searches are in it, too.
        steps: The number of inference steps.
        level: What inherits: "block" or "layer".

    Raises:
        DiffaccelError: For any mistake in the settings.
    """
    options = {"steps": steps, "level": level}
    make, write = _kind(InheritanceSearch, settings, **options), functools.partial(_write_alone, "inherit")
    return _search(settings, out, make, options, write)


def _kind(kind: Any, settings: Settings, **options: Any) -> Any:
    """Returns what makes a search of a kind; all of them share the objectives."""
    return functools.partial(kind, objectives={}, engine=settings.engine, **options)


def _search(settings: Settings, out: Path, make: Any, options: dict[str, Any], write: Any) -> list[Any]:
    """Runs one search for each number of evaluations, and writes each result."""
    check_options(settings.device, settings.dtype, settings.guidance, None)
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    score = _score(settings)
    check_output(out)
    rank, world, wait = processes(settings.device)
    found: list[Any] = []
    with quiet([]):
        pipe = load(settings.model, settings.scheduler, settings.device, settings.dtype)
        if prompts is None:
            prompts = default_conditions(settings.model, pipe, 5 * settings.images)
        for evaluations in settings.nfe:
            search = make(pipe, evaluations, conditions=prompts, guidance=settings.guidance,
                          images=settings.images, budget=settings.budget, seed=settings.seed, score=score,
                          file=out / f"search-{evaluations}.json", writes=rank == 0)  # fmt: skip
            with counting(f"{evaluations} evaluations", settings.budget) as advance:
                found.append(search.run(advance, _share(rank, world)))
            if rank == 0:
                facts = {**found[-1].facts, "settings": {**asdict(settings), **options}}
                write(out, pipe, found[-1], plain({**facts, "versions": versions()}), evaluations)
            wait()
    return found if rank == 0 else []


def _score(settings: Settings) -> Score | None:
    """Returns what scores the images of a candidate; nothing for the distance to the fine solution."""
    if settings.objective not in OBJECTIVES:
        raise OptionError(f"no objective {settings.objective!r}; {closest(settings.objective, OBJECTIVES)}")
    if settings.objective == "distance":
        return None
    if settings.reference is None:
        raise OptionError("the objective fd needs --reference, images or statistics; not those of the report")
    extractor = Extractor(protocol(settings.protocol), settings.device)
    return FrechetScore(extractor, reference_of(reference_data(settings.reference), extractor, ["fid"]))


def _share(rank: int, world: int) -> Any:
    """Returns what scores candidates in all processes."""
    if world == 1:
        return None
    from accelerate.utils import gather_object

    def share(candidates: list[Schedule], score: Callable[[Schedule], float]) -> list[float]:
        mine = [(n, score(candidate)) for n, candidate in enumerate(candidates) if n % world == rank]
        return [value for _, value in sorted(gather_object(mine))]

    return share


def _write_schedules(out: Path, pipe: Any, winner: Schedule, facts: Any, evaluations: int) -> None:
    known = {schedule.evaluations: schedule for schedule in _known(out)}
    known[evaluations] = replace(winner, facts=facts)
    schedules = [known[count].to_dict() for count in sorted(known)]
    with tempfile.TemporaryDirectory() as folder:
        solver_of(pipe.scheduler, schedules=schedules).save_pretrained(folder)
        config = (Path(folder) / "scheduler_config.json").read_text(encoding="utf-8")
    write_files(out, {"scheduler_config.json": config, FILE: json.dumps(schedules, indent=1)})


def _write_alone(name: str, out: Path, pipe: Any, winner: Any, facts: Any, evaluations: int) -> None:
    """Writes a winner to a file of its own, named after its accelerator."""
    text = json.dumps(replace(winner, facts=facts).to_dict(), indent=1)
    write_files(out, {f"{name}-{evaluations}.json": text})


def _known(out: Path) -> list[Schedule]:
    return load_schedules(out / FILE) if (out / FILE).is_file() else []


def _where(out: Path) -> str:
    """Returns where `_write_schedules` has written."""
    return f'scheduler: {out / "scheduler_config.json"}; use accel="s3:{out / FILE}"'


def lines_of(found: list[Schedule], out: Path) -> list[str]:
    """Returns what was found by `search_s3` as lines of text."""
    lines = [f"{schedule.evaluations} evaluations: {_compared(schedule.facts)}" for schedule in found]
    return [*lines, _where(out)]


def polished_lines(found: list[Schedule], out: Path) -> list[str]:
    """Returns what was found by `polish_schedules` as lines of text."""
    lines = []
    for schedule in found:
        facts = schedule.facts["polished"]
        before, after = facts["held_out_start"], facts["held_out"]
        lines.append(
            f"{schedule.evaluations} evaluations: score {after['score']:.4f} on held-out noise, before "
            f"{before['score']:.4f}; distance to the fine solution {after['distance']:.4f}, before "
            f"{before['distance']:.4f}"
        )
    return [*lines, _where(out)]


def layer_lines(found: list[ThinnedSchedule], budgets: tuple[int, ...], out: Path) -> list[str]:
    """Returns what was found by `search_layers` as lines of text."""
    lines = []
    for budget, thinned in zip(budgets, found, strict=True):
        steps, dropped = thinned.schedule.evaluations, sum(map(len, thinned.dropped))
        lines.append(
            f"{steps} steps, {dropped} layers left out, the work of {thinned.facts['cost']:.2f} evaluations: "
            f"{_compared(thinned.facts)}"
        )
        lines.append(f'use accel="autodiffusion:{out / f"autodiffusion-{budget}.json"}"')
    return lines


def inheritance_lines(found: list[Inheritance], budgets: tuple[int, ...], out: Path) -> list[str]:
    """Returns what was found by `search_inheritance` as lines of text."""
    lines = []
    for budget, pattern in zip(budgets, found, strict=True):
        facts, full = pattern.facts, pattern.inherited.count(())
        lines.append(f"{len(pattern.inherited)} updates, {full} of them in full, the work of "
                     f"{facts['cost']:.2f} evaluations: {_compared(facts, '')}")  # fmt: skip
        lines.append(f'use accel="inherit:{out / f"inherit-{budget}.json"}"')
    return lines


def _compared(facts: dict[str, Any], where: str = " on its best grid") -> str:
    """Returns the score of a winner and of the best that is known."""
    known = facts["held_out_of_known_solvers"]
    best = min(known, key=known.__getitem__)
    return (f"score {facts['held_out']:.5f} on held-out noise, {100 * facts['held_out'] / known[best]:.0f} % "
            f"of {best}{where} ({known[best]:.5f})")  # fmt: skip

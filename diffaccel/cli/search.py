"""``diffaccel search s3``: schedules of few evaluations for a model."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..eval.provenance import plain, versions
from ..eval.sampler import default_conditions
from ..samplers.family import solver_of
from ..samplers.s3 import Search
from ..samplers.schedule import Schedule, load_schedules
from ..zoo.folders import quiet
from .evaluate import processes
from .generate import load
from .reading import check_options, read_prompts
from .writing import check_output, counting, write_files

__all__ = ["Settings", "lines_of", "search_s3"]

FILE = "schedules.json"


@dataclass(frozen=True)
class Settings:
    """The options of a search, as the command names them."""

    model: str
    nfe: tuple[int, ...] = (5,)
    guidance: float | None = None
    prompts: Path | None = None
    images: int = 32
    budget: int = 300
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


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
    check_options(settings.device, settings.dtype, settings.guidance, None)
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    check_output(out)
    rank, world, wait = processes(settings.device)
    found: list[Schedule] = []
    objectives: dict[int, Any] = {}
    with quiet([]):
        pipe = load(settings.model, None, settings.device, settings.dtype)
        if prompts is None:
            prompts = default_conditions(settings.model, pipe, 5 * settings.images)
        for evaluations in settings.nfe:
            search = Search(pipe, evaluations, prompts, settings.guidance, settings.images, settings.budget,
                            settings.seed, file=out / f"search-{evaluations}.json",
                            writes=rank == 0, objectives=objectives)  # fmt: skip
            found.append(_run(search, _share(rank, world)))
            if rank == 0:
                _write(out, pipe, found[-1], settings)
            wait()
    return found if rank == 0 else []


def _run(search: Search, share: Any) -> Schedule:
    with counting(f"{search.evaluations} evaluations", search.budget) as advance:
        return search.run(advance, share)


def _share(rank: int, world: int) -> Any:
    """Returns what scores candidates in all processes."""
    if world == 1:
        return None
    from accelerate.utils import gather_object

    def share(candidates: list[Schedule], score: Callable[[Schedule], float]) -> list[float]:
        mine = [(n, score(candidate)) for n, candidate in enumerate(candidates) if n % world == rank]
        return [value for _, value in sorted(gather_object(mine))]

    return share


def _write(out: Path, pipe: Any, winner: Schedule, settings: Settings) -> None:
    known = {schedule.evaluations: schedule for schedule in _known(out)}
    facts = {**winner.facts, "settings": asdict(settings), "versions": versions()}
    known[winner.evaluations] = Schedule.from_dict({**winner.to_dict(), "facts": plain(facts)})
    schedules = [known[count].to_dict() for count in sorted(known)]
    with tempfile.TemporaryDirectory() as folder:
        solver_of(pipe.scheduler, schedules=schedules).save_pretrained(folder)
        config = (Path(folder) / "scheduler_config.json").read_text(encoding="utf-8")
    write_files(out, {"scheduler_config.json": config, FILE: json.dumps(schedules, indent=1)})


def _known(out: Path) -> list[Schedule]:
    return load_schedules(out / FILE) if (out / FILE).is_file() else []


def lines_of(schedules: list[Schedule], out: Path) -> list[str]:
    """Returns what was found as lines of text.

    Raises:
        OptionError: If a schedule tells nothing of its search.
    """
    lines = []
    for schedule in schedules:
        facts = schedule.facts
        if "held_out" not in facts:
            raise OptionError("a schedule without the facts of its search")
        known = facts["held_out_of_known_solvers"]
        best = min(known, key=known.__getitem__)
        lines.append(
            f"{schedule.evaluations} evaluations: distance {facts['held_out']:.5f} on held-out noise, "
            f"{100 * facts['held_out'] / known[best]:.0f} % of {best} on its best grid ({known[best]:.5f})"
        )
    lines.append(f'scheduler: {out}{os.sep}scheduler_config.json; use accel="s3:{out / FILE}"')
    return lines

"""``diffaccel distill pairs``: noise, and what a teacher makes of it; in shards that survive a kill."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distill.pair_store import PairStore
from ..distill.pairs import Work, make_pairs
from ..eval.sampler import default_conditions
from ..zoo.folders import quiet
from .generate import load
from .processes import own_device, processes
from .reading import check_options, read_prompts
from .writing import check_output, counting

__all__ = ["Settings", "line_of", "pairs", "verify"]


@dataclass(frozen=True)
class Settings:
    """The options of the command, as it names them."""

    model: str
    n: int = 50_000
    steps: int = 50
    guidance: float | None = None
    scheduler: str | None = None
    prompts: Path | None = None
    batch: int = 64
    seed: int = 0
    shard_size: int = 1024
    stored: str = "float16"
    device: str = "cpu"
    dtype: str = "float32"


def pairs(settings: Settings, out: Path, silent: bool = False) -> PairStore | None:
    """Makes pairs, or goes on with it; under ``accelerate launch`` the processes share the shards.

    Arguments:
        settings: The settings.
        out: The folder.
        silent: Whether to show no progress.

    Returns:
        The pairs; None in all processes but the first.

    Raises:
        DiffaccelError: For any mistake in the settings; no shard is lost by one.
    """
    check_options(settings.device, settings.dtype, settings.guidance, settings.scheduler)
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    check_output(out)
    rank, world, wait = processes(settings.device)
    device = own_device(settings.device, world)
    with quiet([]):
        pipe = load(settings.model, settings.scheduler, device, settings.dtype)
        if prompts is None:
            prompts = default_conditions(settings.model, pipe, settings.n)

        def make(advance: Callable[[int], Any]) -> PairStore | None:
            return make_pairs(
                out, pipe, prompts, count=settings.n, steps=settings.steps, guidance=settings.guidance,
                seed=settings.seed, batch=settings.batch, shard_size=settings.shard_size,
                stored=settings.stored, model=settings.model, work=Work(rank, world, wait, advance),
            )  # fmt: skip

        return _counted("pairs", -(-settings.n // world), silent, make)


def verify(out: Path, silent: bool = False) -> PairStore:
    """Reads all pairs of a folder, and compares their checksums.

    Arguments:
        out: The folder.
        silent: Whether to show no progress.

    Raises:
        PairsError: Naming what is missing or damaged.
    """
    store = PairStore(out)
    _counted("pairs", len(store), silent, store.verify)
    return store


def line_of(store: PairStore) -> str:
    """Returns what is to be said about pairs."""
    facts = [f"{store.settings[key]} {key}" for key in ("steps", "evaluations") if key in store.settings]
    guided = "no guidance" if store.guidance is None else f"guidance {store.guidance:g}"
    what = f"{len(store)} {store.kind} pairs of shape {store.shape}"
    return f"{what}, {', '.join(facts)}, {guided}: {store.folder}"


def _counted(what: str, total: int, silent: bool, task: Callable[[Callable[[int], Any]], Any]) -> Any:
    """Runs a task that is given what tells its progress."""
    if silent:
        return task(lambda count: None)
    with counting(what, total) as advance:
        return task(advance)

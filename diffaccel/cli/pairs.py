"""``diffaccel distill pairs``: noise, and what a teacher makes of it; in shards that survive a kill."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..distill.denoiser import Denoiser, guided_velocity
from ..distill.host import Host
from ..distill.inversion import Velocity
from ..distill.latents import encoder_of
from ..distill.pair_store import PairStore
from ..distill.pairs import Work, invert_pairs, make_pairs
from ..distill.shards import sha256
from ..errors import OptionError
from ..eval.images import open_images
from ..eval.provenance import model_digest
from ..eval.sampler import default_conditions
from ..zoo.folders import quiet
from .generate import load
from .processes import own_device, processes
from .reading import check_options, read_prompts
from .writing import check_output, counting

__all__ = ["Settings", "inverted", "line_of", "pairs", "verify"]


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


def inverted(settings: Settings, real: Path, out: Path, silent: bool = False) -> PairStore | None:
    """Makes pairs of real images and the noise that the teacher's ODE leads them back to, as `pairs` does.

    Arguments:
        settings: The settings; ``steps`` are evaluations, ``prompts`` has a line for each image.
        real: The images: a folder, in the order of their names, or a zip or array file.
        out: The folder.
        silent: Whether to show no progress.

    Raises:
        DiffaccelError: For any mistake in the settings, or images that cannot be read or encoded.
    """
    check_options(settings.device, settings.dtype, settings.guidance, None)
    check_output(out)
    rank, world, wait = processes(settings.device)
    images, scale = open_images(real), 1.0 if settings.guidance is None else settings.guidance
    with quiet([]):
        host = Host(load(settings.model, None, own_device(settings.device, world), settings.dtype))
        denoiser, encode = Denoiser.of(host), encoder_of(host)
        conditions: list[Any] = [None] if settings.prompts is None else read_prompts(settings.prompts)
        if settings.prompts is None and host.kind != "batch_size":
            raise OptionError(f"{settings.model!r} needs --prompts FILE, a prompt or label for each image")
        device = next(host.network.parameters()).device
        latents = torch.cat([encode(batch.pixels.to(device) / 127.5 - 1)
                             for batch in images.batches(settings.batch, settings.n)])  # fmt: skip
        if latents.shape[1:] != host.shape:
            raise OptionError(f"the images become {tuple(latents.shape[1:])}, but samples are {host.shape}")

        def field(rows: list[Any]) -> Velocity:
            uncond = None if scale == 1 else host.encode_unconditional(len(rows)).to(device)
            return guided_velocity(denoiser, host.encode(rows).to(device), uncond, scale)

        facts = {"weights": model_digest(host.pipe), "data": sha256({"latents": latents.cpu()})}

        def make(advance: Callable[[int], Any]) -> PairStore | None:
            return invert_pairs(
                out, latents, field, conditions, count=len(latents), evaluations=settings.steps,
                seed=settings.seed, guidance=scale, batch=settings.batch, shard_size=settings.shard_size,
                stored=settings.stored, facts=facts, work=Work(rank, world, wait, advance),
            )  # fmt: skip

        return _counted("pairs", -(-len(latents) // world), silent, make)


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

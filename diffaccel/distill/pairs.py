"""Making pairs of noise and sample: by a teacher's ODE from noise, or by inversion from data.

::

    pairs = make_pairs("out/pairs", pipe, prompts, count=50_000, steps=50, guidance=2.5)
    x0, noise, conditions = pairs.rows([0, 1, 2])

Pairs are made shard by shard; what is done stays done after a kill, and processes share the shards. A pair
does not depend on who makes it, nor on the others but for rounding.

References:
    | Flow Straight and Fast (2022), arXiv 2209.03003
    | Improving the Training of Rectified Flows (2024), arXiv 2405.20320
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..eval.provenance import settings_digest, versions
from ..eval.sampler import device_of
from .draws import Draws
from .inversion import Velocity, invert
from .pair_store import PairStore
from .shards import Condition, PairsError, Shards, sha256
from .teacher import Teacher

__all__ = ["PairStore", "PairsError", "Work", "invert_pairs", "make_pairs"]

_STORED = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Work:
    """How much of the work is this process', and who is told of it.

    Arguments:
        rank: The number of the process.
        world: The number of processes; they share the shards.
        wait: What waits for all processes.
        advance: What is told how many more pairs are there.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], Any] = lambda: None
    advance: Callable[[int], Any] = lambda count: None


def make_pairs(
    folder: str | Path,
    pipe: Any,
    conditions: Sequence[str | int] = (),
    *,
    count: int,
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 64,
    shard_size: int = 1024,
    stored: str = "float16",
    options: Mapping[str, Any] | None = None,
    model: str = "",
    work: Work | None = None,
) -> PairStore | None:
    """Makes pairs of noise and what a pipeline makes of it, or goes on with it.

    Arguments:
        folder: Their folder.
        pipe: The pipeline, with a deterministic scheduler.
        conditions: Prompts, or class names or numbers, in turn: pair n has number n mod K.
        count: The number of pairs.
        steps: The number of inference steps.
        guidance: The guidance scale, or None for the pipeline's own; the samples have it, and it is recorded.
        seed: The seed of the first pair's noise; the next pair has the next one.
        batch: Pairs a call of the pipeline.
        shard_size: Pairs a file.
        stored: The type of x0 on disk, "float16" or "float32"; of the noise, its seed is kept.
        options: Further arguments of the pipeline's call, plain data, such as height and width.
        model: The name of the pipeline, for the record.
        work: This process' part of the work; by default all.

    Returns:
        The pairs; None in all processes but the first.

    Raises:
        OptionError: If an argument is of no use, or the pipeline does not take it.
        UnsupportedPipeline: If the pipeline does not start from noise, or its scheduler injects noise.
        PairsError: If the folder holds other pairs, or cannot be written.
    """
    _check_sizes(count, batch, shard_size, stored)
    teacher = Teacher(pipe, conditions, steps, guidance, seed, options)
    source = teacher.source(batch)
    packing = None if source.order is None else sha256({"order": source.order})
    noise = {"dtype": str(source.dtype).removeprefix("torch."), "packing": packing}
    shards = Shards(Path(folder), {
        "kind": "teacher", **teacher.facts, "count": count, "shard_size": shard_size, "shape": source.shape,
        "stored": stored, "noise": noise, "conditions": settings_digest({"conditions": teacher.conditions}),
    })  # fmt: skip
    made = {"model": model, "device": str(device_of(pipe)), "batch": batch, "versions": versions(),
            "first_noise": source.rows([0]).flatten()[:8].tolist()}  # fmt: skip

    def part(numbers: range) -> dict[str, Tensor]:
        return {"x0": _narrow(teacher.solve(numbers, source), stored)}

    shards.open(made, teacher.conditions, source.order)
    return _make(shards, part, batch, work or Work())


def invert_pairs(
    folder: str | Path,
    latents: Tensor | Callable[[range], Tensor],
    field: Callable[[list[Condition]], Velocity],
    conditions: Sequence[Condition] = (None,),
    *,
    count: int,
    evaluations: int = 128,
    solver: str = "heun",
    seed: int = 0,
    guidance: float | None = None,
    batch: int = 64,
    shard_size: int = 1024,
    stored: str = "float16",
    facts: Mapping[str, Any] | None = None,
    work: Work | None = None,
) -> PairStore | None:
    """Makes pairs of data and the noise that a velocity field's ODE leads them to, or goes on with it.

    Arguments:
        folder: Their folder.
        latents: The encoded data (N, *), or what returns those of some numbers, on the field's device.
        field: What returns the velocity field of the conditions of B rows, see `invert`.
        conditions: Prompts, numbers of classes, or None, in turn: pair n has number n mod K.
        count: The number of pairs.
        evaluations: The evaluations of the field for each pair.
        solver: "heun" or "euler".
        seed: The seed of the noise that is mixed in at t = 0.001.
        guidance: The guidance scale that the field has, for the record.
        batch: Pairs at once.
        shard_size: Pairs a file.
        stored: The type of x0 and noise on disk, "float16" or "float32".
        facts: What else the pairs depend on, plain data: name the data, and the digest of the weights.
        work: This process' part of the work; by default all.

    Returns:
        The pairs; None in all processes but the first.

    Raises:
        OptionError: If an argument is of no use, or what is stored would not be finite.
        PairsError: If the folder holds other pairs, or cannot be written.
    """
    _check_sizes(count, batch, shard_size, stored)
    take = (lambda some: latents[some.start : some.stop]) if isinstance(latents, Tensor) else latents
    known, first = list(conditions), take(range(1))
    shards = Shards(Path(folder), {
        "kind": "real", **(facts or {}), "evaluations": evaluations, "solver": solver, "seed": seed,
        "guidance": guidance, "count": count, "shard_size": shard_size, "shape": first.shape[1:],
        "stored": stored, "noise": None, "conditions": settings_digest({"conditions": known}),
    })  # fmt: skip

    def part(numbers: range) -> dict[str, Tensor]:
        x0 = take(numbers)
        if len(x0) != len(numbers):
            raise OptionError(
                f"there are {len(x0)} latents for the pairs {numbers.start} to {numbers.stop - 1}"
            )
        mixed = Draws(seed, numbers, "inversion", x0.device).normal(*x0.shape[1:])
        velocity = field([known[n % len(known)] for n in numbers])
        noise = invert(velocity, x0, mixed, evaluations, solver)
        return {"x0": _narrow(x0, stored), "noise": _narrow(noise, stored)}

    made = {"device": str(first.device), "batch": batch, "versions": versions()}
    shards.open(made, known)
    return _make(shards, part, batch, work or Work())


def _make(
    shards: Shards, part: Callable[[range], dict[str, Tensor]], batch: int, work: Work
) -> PairStore | None:
    """Makes the shards that are missing, in batches that depend on nothing but the shard."""
    if work.rank == 0:
        shards.clean()
    work.wait()
    for number in shards.missing(work.rank, work.world, work.advance):
        numbers, parts = shards.ranges[number], []
        for start in range(numbers.start, numbers.stop, batch):
            some = range(start, min(start + batch, numbers.stop))
            parts.append(part(some))
            work.advance(len(some))
        shards.save(number, {name: torch.cat([one[name] for one in parts]) for name in parts[0]})
    work.wait()
    if work.rank:
        return None
    shards.finish()
    return PairStore(shards.folder)


def _narrow(tensor: Tensor, stored: str) -> Tensor:
    found = tensor.to("cpu", _STORED[stored])
    if not bool(found.isfinite().all()):
        raise OptionError(f"samples are not finite, or too large for {stored}; use float32, or less guidance")
    return found


def _check_sizes(count: int, batch: int, shard_size: int, stored: str) -> None:
    for name, number in (("count", count), ("batch", batch), ("shard_size", shard_size)):
        if number < 1:
            raise OptionError(f"{name} is {number}; expected at least 1")
    if stored not in _STORED:
        raise OptionError(f"stored is {stored!r}; known: {', '.join(_STORED)}")

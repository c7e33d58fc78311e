"""A student tried in its pipeline, on fixed noise: as it is in training, rounded, and loaded again."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import noise
from ..errors import ModelError
from ..eval.sampler import Sampler
from ..pipelines import NoiseExperts
from ..pipelines.capturing import sibling
from ..samplers import FixedGridScheduler
from .adapters import using
from .grid import Calls, Grid, fixed_grid

__all__ = ["Made", "Student", "cast", "compare", "images", "in_training", "with_network", "with_parts"]

_LEVEL = 1 / 255
_COARSE = 0.05

Made = dict[int, tuple[Tensor, noise.Path]]
"""Images (N, 3, H, W) and the path that they were made on, by the number of steps."""


@dataclass(frozen=True)
class Student:
    """A student in training, and how it is used.

    Arguments:
        network: The network.
        adapter: The adapter that makes it the student, or None.
        pipe: The teacher's pipeline.
        component: The name of the network in it.
        grids: The grids.
        guidance: The guidance scale, or None if the pipeline takes none.
        conditions: What it is tried on.
        options: Further arguments of a call, as height and width.
    """

    network: nn.Module
    adapter: str | None
    pipe: Any
    component: str
    grids: tuple[Grid, ...]
    guidance: float | None
    conditions: tuple[str, ...]
    options: Mapping[str, Any]


def images(student: Student, pipe: Any) -> Made:
    """Returns what a pipeline makes of a student's conditions, always of the same noise."""
    made: Made = {}
    for steps in map(len, student.grids):
        sampler = Sampler(pipe, student.conditions, steps, student.guidance, seed=0,
                          count=max(2, len(student.conditions)), options=student.options)  # fmt: skip
        with torch.random.fork_rng(), _SameNoise():
            torch.manual_seed(0)  # some pipelines do not give their generator to the scheduler
            made[steps] = sampler().float().cpu(), noise.path_of(pipe.scheduler)
    return made


class _SameNoise(TorchFunctionMode):
    """Draws noise of all types in float32: that of a half type is other noise in some versions of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of torch."""
        options = dict(kwargs or {})
        dtype = options.get("dtype")
        if func is not torch.randn or dtype not in (torch.float16, torch.bfloat16):
            return func(*args, **options)
        return func(*args, **{**options, "dtype": torch.float32}).to(dtype)


class _Recording(FixedGridScheduler):
    """Keeps how its pipeline calls it, by the number of steps."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Any = None,
        sigmas: Any = None, mu: float | None = None,
    ) -> None:  # fmt: skip
        """Keeps the arguments."""
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        known = {name: value for name, value in {**given, "mu": mu}.items() if value is not None}
        self.received = {**getattr(self, "received", {}), self.num_inference_steps: known}

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Keeps that it was called."""
        self.scaled = True
        return sample


def in_training(student: Student) -> tuple[Made, Calls]:
    """Returns what a student makes now, in its own type, and how its pipeline calls a scheduler."""
    dtype = next(student.network.parameters()).dtype
    pipe = cast(with_network(student.pipe, student.component, student.network), dtype, student.component)
    pipe.scheduler = scheduler = fixed_grid(student.pipe.scheduler, student.grids, _Recording)
    adapted = using(student.network, student.adapter) if student.adapter else nullcontext()
    with _evaluating(student.network), adapted:
        made = images(student, pipe)
    return made, Calls(scheduler.received, getattr(scheduler, "scaled", False))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Puts a network in evaluation mode inside the block."""
    before = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def with_parts(pipe: Any, **parts: Any) -> Any:
    """Returns another pipeline object with some other components, without a progress bar."""
    other = sibling(pipe)
    for name, part in parts.items():
        setattr(other, name, part)
    other.set_progress_bar_config(disable=True)
    return other


def with_network(pipe: Any, component: str, network: nn.Module) -> Any:
    """Returns another pipeline object with a network in the place of its own.

    Two experts by noise level take the two places of a pipeline that has these, as that of Wan 2.2.
    """
    if "boundary_ratio" not in pipe.config:
        return with_parts(pipe, **{component: network})
    ratio, parts = None, {"transformer": network, "transformer_2": None}
    pair = network.pair if isinstance(network, NoiseExperts) else None
    if pair is not None:
        parts, boundary = {"transformer": pair[0], "transformer_2": pair[1]}, pair[2]
        ratio = boundary / pipe.scheduler.config.num_train_timesteps
    other = with_parts(pipe)
    other.register_modules(**parts)  # the index of a pipeline does not follow when a part comes about
    other.register_to_config(boundary_ratio=ratio)
    return other


def cast(pipe: Any, dtype: torch.dtype, kept: str = "") -> Any:
    """Returns a pipeline whose networks are of one type; those that are not already are copied.

    Arguments:
        pipe: The pipeline, which is left as it is.
        dtype: The type.
        kept: The component that is left as it is.
    """
    parts = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != kept:
            kinds = {tensor.dtype for tensor in part.state_dict().values() if tensor.is_floating_point()}
            # the method of diffusers warns of float16 on a CPU
            parts[name] = part if kinds <= {dtype} else nn.Module.to(copy.deepcopy(part), dtype)
    return with_parts(pipe, **parts)


def compare(made: Made, wanted: Made, rounded: Made, dtype: str) -> str:
    """Returns how far the images of a loaded student are from those in training, in words.

    Arguments:
        made: What the loaded pipeline makes.
        wanted: What the student makes in training.
        rounded: What it makes with rounded weights, but the scheduler of the training.
        dtype: The name of the type that it is rounded to.

    Raises:
        ModelError: If they differ by more than three times what rounding does, or by more than one of 255
            levels if that is more; if the times differ; or if rounding does too much.
    """
    worst = []
    for steps, (pictures, path) in made.items():
        target, trained = wanted[steps]
        if not _same_times(path, trained):
            what = f"{_times(path)}, and {_times(trained)} in training"
            raise ModelError(f"the loaded scheduler's times of {steps} steps are {what}")
        rounding, difference = _rms(rounded[steps][0], target), _rms(pictures, target)
        if not rounding <= _COARSE:
            what = f"the images of {steps} steps by {rounding:.2g} (RMS, of 1)"
            raise ModelError(f"{dtype} changes {what}; export in another type")
        if not difference <= max(3 * rounding, _LEVEL):
            what = f"they differ by {difference:.2g} (RMS, of 1), of which rounding explains {rounding:.2g}"
            raise ModelError(f"loaded again, the student makes other images in {steps} steps: {what}")
        worst.append((difference, rounding))
    difference, rounding = max(worst)
    return (f"loaded again, its images differ by {difference:.1e} (RMS, of 1) from those in training; "
            f"rounding to {dtype} explains {rounding:.1e}")  # fmt: skip


def _rms(images: Tensor, target: Tensor) -> float:
    return float((images - target).square().mean().sqrt()) if images.shape == target.shape else math.inf


def _times(path: noise.Path) -> list[float]:
    return [round(level.sigma / (level.alpha + level.sigma), 6) for level in path.levels[:-1]]


def _same_times(path: noise.Path, other: noise.Path) -> bool:
    return len(path) == len(other) and all(
        math.isclose(a, b, abs_tol=1e-4) for a, b in zip(_times(path), _times(other), strict=True)
    )

"""Particles in the loop of a pipeline: its network predicts, its scheduler counts, the particles move."""

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedPipeline, UnsupportedScheduler
from ..noise import NoiseLevel, Path
from .accelerator import Accelerator, Proceed
from .capturing import with_inputs
from .experts import Experts
from .feynman_kac import CLEAN, total_of
from .particles import Particles, Rules
from .run import AUXILIARY, Evaluation, Run, Update
from .unguided import check_scheduler

__all__ = ["FeynmanKac"]


class FeynmanKac(Accelerator):
    """Drives the loop of a pipeline whose batch is (expert, group, particle) and whose guidance is off.

    Every expert sees the same particles: the noise of the first expert's rows, as wide as the target's prior.
    The scheduler's own step is made as well, so that it counts and packs as ever, and its result replaced.
    It has no name and is in no registry, since it needs a call that `FeynmanKacPipeline` arranges.

    Arguments:
        rules: How particles are weighted, moved and resampled.
        experts: The experts.
        generator: The source of all randomness.
        draw: Whether the pipeline is left with one particle of each group, drawn from the weights; else with
            all of them.
    """

    def __init__(
        self, rules: Rules, experts: Experts, generator: torch.Generator | None, draw: bool = True
    ) -> None:
        self.rules, self.experts, self.generator, self.draw = rules, experts, generator, draw
        self.particles: Particles | None = None
        self.drawn: Tensor | None = None
        """The rows of the particles that the pipeline was left with, once the loop has ended."""
        self.evaluations = 0

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns a copy of the pipeline's scheduler, which is left as it is."""
        return copy.deepcopy(pipe.scheduler)

    def start(self, run: Run) -> None:
        """Checks the noise levels of the loop.

        Raises:
            UnsupportedPipeline: If they cannot be driven, or this is a second loop.
        """
        if self.particles is not None:
            raise UnsupportedPipeline(f"{type(run.pipe).__name__} has a second loop; particles make one")
        check_scheduler(run.scheduler)
        _check_levels(run.path, run.scheduler)
        self._levels = self.experts.paths(run.path)
        self._shape: torch.Size | None = None
        self._last: Tensor | None = None
        self._version = 0

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Gives the first evaluation the particles' noise, and all experts their own networks."""
        if not isinstance(call.sample, Tensor):
            raise UnsupportedPipeline(f"{type(call.module).__name__} takes a list of samples, not a tensor")
        self._check_rows(call)
        if call.step == 0:
            scale = math.sqrt(total_of(self.rules.exponents))
            call = with_inputs(call, self._tiled(call.sample[: self.rules.count] / scale))
        if call.network in AUXILIARY:
            return proceed(call)
        self._shape = call.sample.shape
        self.evaluations += call.rows
        return self.experts.evaluate(call, proceed)

    def update(self, call: Update, proceed: Proceed) -> Any:
        """Moves the particles, and puts them in the place of the scheduler's result."""
        self._check_update(call)
        path, index, count = call.run.path, call.index, self.rules.count
        if self.particles is None:
            self.particles = Particles(self.rules, call.sample[:count], self.generator)
        levels = [own[index] for own in self._levels]
        target = CLEAN if index + 1 == len(path) else path[index + 1]
        samples = self._step(levels, call.output.unflatten(0, (len(self.experts), count)), target)
        ending = call.step + 1 == call.run.num_updates
        if ending:
            self.drawn = torch.arange(count)
            if self.draw:
                first = self.rules.particles * torch.arange(self.rules.groups)
                self.drawn = first + self.particles.draw()
        rows = samples[self.drawn.to(samples.device)] if self.drawn is not None else self._tiled(samples)
        self._last = rows.to(call.sample.dtype)
        self._version = _version(self._last)
        return _with_first(proceed(call), self._last)

    def _step(self, levels: list[NoiseLevel], outputs: Tensor, target: NoiseLevel) -> Tensor:
        assert self.particles is not None
        try:
            return self.particles.step(levels, outputs, target)
        except ZeroDivisionError as error:
            raise UnsupportedScheduler(f"at the noise level {levels[0][:2]}: {error}") from error

    def _tiled(self, samples: Tensor) -> Tensor:
        """Returns the samples for every expert."""
        return samples.repeat(len(self.experts), *[1] * (samples.ndim - 1))

    def _check_rows(self, call: Evaluation) -> None:
        """Checks that every expert sees every particle once a step."""
        expected, name = len(self.experts) * self.rules.count, type(call.run.pipe).__name__
        if call.rows != expected:
            raise UnsupportedPipeline(
                f"{name} evaluates {call.rows} rows for {expected} samples: it still guides itself; switch "
                "its guidance off"
            )
        if call.branch:
            raise UnsupportedPipeline(
                f"{name} evaluates its {call.network} twice a step: it still guides itself; switch its "
                "guidance off"
            )

    def _check_update(self, call: Update) -> None:
        """Checks that the sample is what the network has seen, and what the last update gave."""
        name = type(call.run.pipe).__name__
        if call.output.shape != call.sample.shape:
            raise UnsupportedPipeline(
                f"{name} gives its scheduler {tuple(call.output.shape)} for samples "
                f"{tuple(call.sample.shape)}, such as a variance besides"
            )
        if self._shape != call.sample.shape:
            raise UnsupportedPipeline(
                f"the network of {name} sees {tuple(self._shape or ())} for samples "
                f"{tuple(call.sample.shape)}: it has further inputs, such as a picture"
            )
        if self._last is None and call.index:
            raise UnsupportedPipeline(f"{name} starts in the middle of the noise levels, from a picture")
        if self._last is None:
            return
        changed = _version(self._last) != self._version  # in place
        if changed or not (self._last is call.sample or torch.equal(self._last, call.sample)):
            raise UnsupportedPipeline(f"{name} (or a callback) changes the samples between the updates")


def _version(tensor: Tensor) -> int:
    """Returns how often a tensor was changed in place, which tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _check_levels(path: Path, scheduler: Any) -> None:
    """Checks that noise decreases; a level that occurs twice (PNDM) is a step without a change."""
    name = type(scheduler).__name__
    if any(later.log_snr < earlier.log_snr for earlier, later in itertools.pairwise(path.levels)):
        raise UnsupportedScheduler(f"the noise of {name} does not decrease from step to step")
    schedule = getattr(scheduler, "schedule", None)
    if getattr(schedule, "skipped", 0):
        raise UnsupportedScheduler(f"this {name} saves the first evaluation; use another schedule")


def _with_first(packed: Any, sample: Tensor) -> Any:
    """Returns a scheduler's output with another sample."""
    if isinstance(packed, tuple):
        return (sample, *packed[1:])
    packed[next(iter(packed))] = sample
    return packed

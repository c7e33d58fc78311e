"""A teacher's ODE: a pipeline is called as ever, and ended when its solver has made its last update.

Noise and sample are taken at the solver, where both are in the coordinates that a network is trained in:
latents that are packed, or that a pipeline never hands out, are all the same, and no picture is decoded.
"""

import copy
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, UnsupportedPipeline, UnsupportedScheduler, closest
from ..eval.provenance import model_digest, plain
from ..eval.sampler import Sampler, refusals
from ..noise import is_stochastic
from ..pipelines.accelerator import Accelerator, Proceed
from ..pipelines.run import Run, Update, check_stack, denoisers_of
from .pair_noise import ROWS, NoiseSource, is_scaled, packed_source, plain_source
from .shards import Condition

__all__ = ["Teacher"]

_OURS = re.compile(
    r"self|prompt|class_labels|batch_size|generator|latents|guidance_scale|num_inference_steps|"
    r"num_\w+_per_prompt|output_type|return_dict|eta|denoising_\w+|callback\w*"
)
"""What is set here, would make the ODE another one, or would end it early."""


class _Ended(Exception):
    """Ends a call, and carries a sample of its solver away."""

    def __init__(self, sample: Tensor, scale: float = 1.0) -> None:
        super().__init__("ended")
        self.sample, self.scale = sample, scale


class _Loop(Accelerator):
    """Shows the first sample of a sampling loop, and ends the call after the last update.

    Arguments:
        begin: What is given the first sample, and the scale of its noise.
    """

    def __init__(self, begin: Callable[[Tensor, float], None]) -> None:
        self.begin = begin

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns a copy, so that the pipeline's own is left as it is."""
        return copy.deepcopy(pipe.scheduler)

    def update(self, call: Update, proceed: Proceed) -> Any:
        """Makes the update, and ends the call if it is the last one."""
        if call.step == 0:
            self.begin(call.sample, float(getattr(call.run.scheduler, "init_noise_sigma", 1.0)))
        result = proceed(call)
        if call.step + 1 == call.run.num_updates:
            raise _Ended(result[0])
        return result


class Teacher:
    """A pipeline that turns noise into samples by a deterministic solver.

    Arguments:
        pipe: The pipeline: prompted, class-conditional or unconditional.
        conditions: Prompts; class names or numbers; or for an unconditional pipeline nothing. Sample n has
            the condition n mod K.
        steps: The number of inference steps.
        guidance: The guidance scale, or None for the pipeline's own.
        seed: The seed of sample 0's noise; the next sample has the next one.
        options: Further arguments of the call, plain data, such as height and width.

    Raises:
        OptionError: If the conditions or options are not what the pipeline takes.
        UnsupportedPipeline: If it is accelerated, or its solver injects noise.
    """

    def __init__(self, pipe: Any, conditions: Sequence[str | int], steps: int, guidance: float | None = None,
                 seed: int = 0, options: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        check_stack(pipe, [])
        name = type(pipe).__name__
        if hasattr(type(pipe), "_diffaccel_base"):
            raise UnsupportedPipeline(
                f"this {name} is accelerated; take the plain one: accelerate(pipe, None)"
            )
        if reason := is_stochastic(pipe.scheduler):
            raise UnsupportedScheduler(
                f"pairs need a deterministic solver, but {reason}; use DPM-Solver++ or DDIM"
            )
        sampler = Sampler(pipe, [str(condition) for condition in conditions], steps, guidance, seed)
        self.pipe, self.kind, self.steps, self.seed = pipe, sampler.kind, steps, seed
        self.guidance = sampler.guidance
        self.conditions: list[Condition] = list(sampler.values) or [None]
        self.options = _checked(pipe, options or {})

    @property
    def facts(self) -> dict[str, Any]:
        """What its samples depend on, plain data."""
        scheduler, network = self.pipe.scheduler, next(iter(denoisers_of(self.pipe).values()))
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        return plain({
            "pipeline": type(self.pipe).__name__, "weights": model_digest(self.pipe),
            "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "scheduler": {"class": type(scheduler).__name__, "config": config},
            "steps": self.steps, "guidance": self.guidance, "options": self.options, "seed": self.seed,
        })  # fmt: skip

    def source(self, batch: int = ROWS) -> NoiseSource:
        """Returns what draws the noise again that the solver starts from; for at most `ROWS` evaluations.

        Arguments:
            batch: Samples a call of the pipeline, at most.

        Raises:
            UnsupportedPipeline: If the solver starts from anything else.
        """
        samples, scale = self._begin(range(min(2, batch)))
        found = plain_source(self.seed, samples, scale)
        if found is None:
            parts = [self._begin(range(n, min(n + batch, ROWS)))[0] for n in range(0, ROWS, batch)]
            found = packed_source(self.seed, torch.cat(parts), scale)
        if found is None:
            raise self._other_noise()
        return found

    def solve(self, numbers: Sequence[int], source: NoiseSource) -> Tensor:
        """Returns the samples x0 (B, *) that the solver makes of the noise of some numbers.

        Arguments:
            numbers: The B samples, which are made in one call.
            source: Their noise; what the solver starts from is compared with it.

        Raises:
            UnsupportedPipeline: If the solver starts from anything else, or ends early.
            OptionError: If the pipeline refuses its arguments, or a sample is not finite.
        """
        noise = source.rows(numbers)

        def begin(sample: Tensor, scale: float) -> None:
            if not is_scaled(noise, self._own(sample, numbers), scale):
                raise self._other_noise()

        x0 = self._own(self._call(numbers, begin).sample, numbers)
        if not bool(x0.isfinite().all()):
            raise OptionError("samples are not finite; use float32, or less guidance")
        return x0

    def _begin(self, numbers: Sequence[int]) -> tuple[Tensor, float]:
        """Returns what the solver starts from, (B, *), and the scale of its noise."""

        def begin(sample: Tensor, scale: float) -> None:
            raise _Ended(sample, scale)

        ended = self._call(numbers, begin)
        return self._own(ended.sample, numbers), ended.scale

    def _call(self, numbers: Sequence[int], begin: Callable[[Tensor, float], None]) -> _Ended:
        values = [self.conditions[n % len(self.conditions)] for n in numbers]
        call: dict[str, Any] = {
            self.kind: len(values) if self.kind == "batch_size" else values,
            **self.options,
        }
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        generators = [torch.Generator().manual_seed((self.seed + n) % 2**63) for n in numbers]
        try:
            with Run(self.pipe, [_Loop(begin)], {}), refusals(self.pipe):
                self.pipe(**call, num_inference_steps=self.steps, generator=generators)
        except _Ended as ended:
            return ended.with_traceback(None)  # it would keep the call's tensors
        finally:  # the call itself would have, at its end
            getattr(self.pipe, "maybe_free_model_hooks", lambda: None)()
        raise UnsupportedPipeline(f"{type(self.pipe).__name__} has ended before its solver's last update")

    def _own(self, sample: Tensor, numbers: Sequence[int]) -> Tensor:
        """Returns the samples out of what may hold them once for each guidance branch."""
        if len(sample) % len(numbers):
            name = type(self.pipe).__name__
            raise UnsupportedPipeline(
                f"the solver of {name} has {len(sample)} rows for {len(numbers)} samples"
            )
        return sample[: len(numbers)]

    def _other_noise(self) -> UnsupportedPipeline:
        return UnsupportedPipeline(
            f"the solver of {type(self.pipe).__name__} does not start from what its generators draw, times "
            f"the init_noise_sigma of {type(self.pipe.scheduler).__name__}; pairs need that"
        )


def _checked(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns further arguments of a pipeline's call."""
    known = [name for name in inspect.signature(type(pipe).__call__).parameters if not _OURS.fullmatch(name)]
    for name, value in options.items():
        if name not in known:
            raise OptionError(f"{type(pipe).__name__} takes no {name!r} here; {closest(name, known)}")
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise OptionError(
                f"{name}={type(value).__name__} is not plain data; the store keeps its options"
            ) from None
    return dict(options)

"""The arguments that a pipeline gives its network: a call is begun, and ended at its first evaluation."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import UnsupportedPipeline
from ..noise import Path
from .accelerator import Accelerator, Proceed
from .run import AUXILIARY, Evaluation, Run

__all__ = ["Captured", "first_evaluation", "sibling", "with_inputs"]


class Captured(Exception):
    """Ends a call at an evaluation, which it carries away, with the path of the loop."""

    def __init__(self, call: Evaluation, path: Path) -> None:
        super().__init__("captured")
        self.call, self.path = call, path


class _Capture(Accelerator):
    """Ends a call at the first evaluation of a denoiser in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns a copy, so that the pipeline's own is left as it is."""
        return copy.deepcopy(pipe.scheduler)

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Carries the evaluation away."""
        if call.network in AUXILIARY:
            name = type(call.run.pipe).__name__
            raise UnsupportedPipeline(f"{name} feeds its network at every step anew ({call.network})")
        if call.step < self.step:
            return proceed(call)
        raise Captured(call, call.run.path)


def sibling(pipe: Any) -> Any:
    """Returns another pipeline object with the same components; what a call leaves on it, it alone has."""
    return copy.copy(pipe)


def with_inputs(call: Evaluation, sample: Any, timestep: Any = None) -> Evaluation:
    """Returns an evaluation with another sample, and another timestep if one is given.

    Raises:
        UnsupportedPipeline: If the network has no argument of that name.
    """
    args, kwargs = list(call.args), dict(call.kwargs)
    if args:
        args[0] = sample
    else:
        kwargs[next(name for name, value in kwargs.items() if value is call.sample)] = sample
    if timestep is not None:
        if len(args) > 1:
            args[1] = timestep
        elif "timestep" in kwargs:
            kwargs["timestep"] = timestep
        else:
            raise UnsupportedPipeline(f"{type(call.module).__name__} has no argument 'timestep'")
    return replace(call, args=tuple(args), kwargs=kwargs)


def first_evaluation(pipe: Any, arguments: Mapping[str, Any], step: int = 0) -> Captured:
    """Returns the first evaluation of a call, or that of a later step; it is not made.

    Arguments:
        pipe: The pipeline.
        arguments: The arguments of the call, but for the generator.
        step: The solver update that the evaluation leads to.

    Raises:
        UnsupportedPipeline: If the call evaluates no network, or feeds it by another one at every step.
    """
    generator = torch.Generator().manual_seed(0)  # its noise is thrown away
    try:
        with Run(pipe, [_Capture(step)], {}):
            pipe(**arguments, generator=generator)
    except Captured as captured:
        return captured.with_traceback(None)  # it would keep the call's tensors
    raise UnsupportedPipeline(f"{type(pipe).__name__} has evaluated no network")

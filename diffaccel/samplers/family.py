"""What a schedule was searched for: the model's path, and the model itself."""

import functools
import inspect
from typing import Any, ClassVar

import torch

from ..errors import DiffaccelError, UnsupportedScheduler
from ..noise import family_name
from ..pipelines.accelerator import Accelerator
from ..pipelines.identity import identity_of
from .unified import UnifiedSolverScheduler

__all__ = ["SolverAccelerator", "family_of", "scales_input", "solver_of"]


class SolverAccelerator(Accelerator):
    """Base of accelerators that sample with a `UnifiedSolverScheduler`, which `scheduler` returns."""

    exclusive: ClassVar[str] = "solver"

    def check(self, pipe: Any) -> str | None:
        """Returns why there is no such scheduler for the pipeline."""
        try:
            solver = self.scheduler(pipe, {})
        except DiffaccelError as error:
            return str(error)
        if any(schedule.skipped for schedule in solver.known) and not scales_input(pipe):
            return "it does not call scale_model_input, which an analytic first step needs"
        return None


def solver_of(
    scheduler: Any, cls: type[UnifiedSolverScheduler] = UnifiedSolverScheduler, **options: Any
) -> UnifiedSolverScheduler:
    """Returns our scheduler with the settings of a pipeline's.

    Arguments:
        scheduler: The pipeline's scheduler.
        cls: A subclass to make instead.
        options: Settings of `UnifiedSolverScheduler` that are others.

    Raises:
        UnsupportedScheduler: If its path is not known, or its table of alphas not that of its settings.
    """
    from ..zoo.folders import quiet

    family_name(scheduler)  # the settings of an unknown scheduler would be taken for those of DDPM
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    with quiet([]):  # of settings that only other solvers have
        solver: UnifiedSolverScheduler = cls.from_config(config, **options)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None and not solver.path.is_flow:
        ours = solver.alphas_cumprod.to(table)
        if len(table) != len(ours) or not torch.allclose(table, ours, rtol=1e-3, atol=1e-5):
            raise UnsupportedScheduler(f"{type(scheduler).__name__} has alphas that its betas do not make")
    return solver


def scales_input(pipe: Any) -> bool:
    """Returns whether a pipeline calls scale_model_input, as far as its class' source can be read."""
    cls: Any = type(pipe)
    return _scales_input(cls)


@functools.cache
def _scales_input(cls: type) -> bool:
    """Reads the source once for a class: it takes a good part of a second."""
    for base in cls.__mro__[:-1]:
        try:
            if "scale_model_input" in inspect.getsource(base):
                return True
        except (OSError, TypeError):  # made at run time: what it does is seen when it runs
            return True
    return False


def family_of(pipe: Any) -> dict[str, str]:
    """Returns what tells one model from another: pipeline, denoiser, path and a digest of the configuration.

    Raises:
        UnsupportedPipeline: If the pipeline has no denoiser.
    """
    return {"pipeline": type(pipe).__name__, **identity_of(pipe), "path": solver_of(pipe.scheduler).path.name}

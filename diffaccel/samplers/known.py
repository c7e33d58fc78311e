"""Known solvers as an accelerator: ``pipe.to(accel={"solver": {"solver": "unipc2", "grid": "karras"}})``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..pipelines.accelerator import option
from .family import SolverAccelerator, solver_of
from .grids import GRIDS
from .presets import SOLVERS

__all__ = ["Solver"]


@dataclass
class Solver(SolverAccelerator):
    """Samples with a known solver on a known grid; num_inference_steps of the call is its evaluations.

    For the length of a call, the pipeline has a `UnifiedSolverScheduler` with these settings and the path of
    its own scheduler.

    Arguments:
        solver: One of ``presets.SOLVERS``, see docs/samplers.md.
        grid: One of ``grids.GRIDS``.
    """

    name: ClassVar[str] = "solver"
    trials: ClassVar[Mapping[str, Sequence[Any]]] = {
        "solver": ("dpm++2m", "unipc2", "deis2", "theta2", "dpm++3m", "unipc3"),
        "grid": ("trailing", "uniform", "karras", "log_snr", "theta"),
    }

    solver: str = option("dpm++2m", choices=tuple(SOLVERS))
    grid: str = option("trailing", choices=tuple(GRIDS))

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns the solver with the settings of the pipeline's scheduler."""
        return solver_of(pipe.scheduler, solver=self.solver, grid=self.grid)

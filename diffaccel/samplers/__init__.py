"""Schedulers for diffusers' pipelines: one solver with free decisions per step, known and searched ones.

``pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, solver="dpm++3m")``
"""

from diffusers import SchedulerMixin

from .anchored import AnchoredFlowScheduler
from .few_step import FewStep
from .fixed_grid import FixedGridScheduler
from .grids import GRIDS
from .known import Solver
from .presets import SOLVERS, solver_schedule
from .schedule import Schedule, ScheduleError, Step, load_schedules
from .searched import S3
from .thinning import AutoDiffusion, ThinnedSchedule
from .unified import UnifiedSolverScheduler

__all__ = [
    "GRIDS",
    "S3",
    "SOLVERS",
    "AnchoredFlowScheduler",
    "AutoDiffusion",
    "FewStep",
    "FixedGridScheduler",
    "Schedule",
    "ScheduleError",
    "SchedulerMixin",
    "Solver",
    "Step",
    "ThinnedSchedule",
    "UnifiedSolverScheduler",
    "load_schedules",
    "solver_schedule",
]

# the file format of diffusers names the module of a scheduler, and loads it through its package
for _scheduler in (AnchoredFlowScheduler, FixedGridScheduler, UnifiedSolverScheduler):
    _scheduler.__module__ = __name__

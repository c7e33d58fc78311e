"""diffaccel: faster diffusers pipelines.

Importing it gives ``DiffusionPipeline.to`` of diffusers the keyword ``accel``::

    from diffaccel import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("...").to("cuda", accel="sada")
"""

from diffusers import DiffusionPipeline, ModularPipeline

from . import zoo
from .errors import (
    AcceleratorConflict,
    DiffaccelError,
    ModelError,
    OptionError,
    UnknownAccelerator,
    UnsupportedPipeline,
    UnsupportedScheduler,
)
from .pipelines import (
    APG,
    Accel,
    Accelerator,
    DiffuseHighPipeline,
    FeynmanKacPipeline,
    Inherit,
    MARPipeline,
    Report,
    Reuse,
    Sada,
    StepAnnealing,
    accelerate,
    install,
)
from .samplers import S3, AutoDiffusion, FewStep, Solver, UnifiedSolverScheduler
from .tuning import Auto, Plan

__version__ = "0.1.0"

__all__ = [
    "APG",
    "S3",
    "Accel",
    "Accelerator",
    "AcceleratorConflict",
    "Auto",
    "AutoDiffusion",
    "DiffaccelError",
    "DiffuseHighPipeline",
    "DiffusionPipeline",
    "FewStep",
    "FeynmanKacPipeline",
    "Inherit",
    "MARPipeline",
    "ModelError",
    "OptionError",
    "Plan",
    "Report",
    "Reuse",
    "Sada",
    "Solver",
    "StepAnnealing",
    "UnifiedSolverScheduler",
    "UnknownAccelerator",
    "UnsupportedPipeline",
    "UnsupportedScheduler",
    "accelerate",
    "zoo",
]

install(DiffusionPipeline)
install(ModularPipeline)

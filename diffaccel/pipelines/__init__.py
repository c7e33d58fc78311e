"""Training-free acceleration of pipelines: ``pipe.to(accel=...)`` and the accelerators."""

from .accelerator import Accelerator, option, registry, resolve
from .apg import APG
from .attach import Accel, accelerate, install
from .report import Action, Report
from .reuse import Reuse
from .run import BlockCall, Evaluation, Run, Update
from .sada import Sada

__all__ = [
    "APG",
    "Accel",
    "Accelerator",
    "Action",
    "BlockCall",
    "Evaluation",
    "Report",
    "Reuse",
    "Run",
    "Sada",
    "Update",
    "accelerate",
    "install",
    "option",
    "registry",
    "resolve",
]

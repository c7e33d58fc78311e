"""Training-free acceleration of pipelines: ``pipe.to(accel=...)`` and the accelerators."""

from .accelerator import Accelerator, option, registry, resolve
from .apg import APG
from .attach import Accel, accelerate, install
from .autoregressive import ARStep
from .feynman_kac_pipeline import FeynmanKacOutput, FeynmanKacPipeline
from .report import Action, Report
from .reuse import Reuse
from .rewards import image_reward
from .run import BlockCall, Evaluation, Run, Update
from .sada import Sada

__all__ = [
    "APG",
    "ARStep",
    "Accel",
    "Accelerator",
    "Action",
    "BlockCall",
    "Evaluation",
    "FeynmanKacOutput",
    "FeynmanKacPipeline",
    "Report",
    "Reuse",
    "Run",
    "Sada",
    "Update",
    "accelerate",
    "image_reward",
    "install",
    "option",
    "registry",
    "resolve",
]

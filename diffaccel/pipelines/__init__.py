"""Training-free acceleration of pipelines: ``pipe.to(accel=...)`` and the accelerators."""

from diffusers import ModelMixin, SchedulerMixin

from .accelerator import Accelerator, option, registry, resolve
from .apg import APG
from .attach import Accel, accelerate, attached, install
from .autoregressive import ARStep
from .condition_experts import ConditionExperts
from .diffusehigh import DiffuseHighOutput, DiffuseHighPipeline
from .disa import StepAnnealing
from .feynman_kac_pipeline import FeynmanKacOutput, FeynmanKacPipeline
from .inherit import Inherit
from .inheritance import Inheritance
from .mar import MARPipeline
from .mar_scheduler import MARScheduler
from .mar_transformer import MARTransformer2DModel
from .noise_experts import NoiseExperts
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
    "ConditionExperts",
    "DiffuseHighOutput",
    "DiffuseHighPipeline",
    "Evaluation",
    "FeynmanKacOutput",
    "FeynmanKacPipeline",
    "Inherit",
    "Inheritance",
    "MARPipeline",
    "MARScheduler",
    "MARTransformer2DModel",
    "ModelMixin",
    "NoiseExperts",
    "Report",
    "Reuse",
    "Run",
    "Sada",
    "SchedulerMixin",
    "StepAnnealing",
    "Update",
    "accelerate",
    "attached",
    "image_reward",
    "install",
    "option",
    "registry",
    "resolve",
]

# the file format of diffusers names the module of a component, and loads it and its base through that module
for _component in (MARTransformer2DModel, MARScheduler, NoiseExperts, ConditionExperts):
    _component.__module__ = __name__

"""Students that are adapters: a folder with their weights and scheduler, and the name of what they change."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffaccel.errors import ModelError
from diffaccel.files import read_object

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["ADAPTED", "load_adapted"]

ADAPTED = "student.json"
"""Names the pipeline that the adapters change ("base") and its network ("component")."""

_SCHEDULER = "scheduler"


def load_adapted(folder: Path, dtype: torch.dtype, **kwargs: Any) -> "DiffusionPipeline":
    """Loads the pipeline that the adapters in a folder change, with them and with their scheduler.

    Arguments:
        folder: What ``diffaccel distill export --lora`` has written.
        dtype: The type of the weights.
        kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``.

    Raises:
        ModelError: If a file is missing or damaged, or of another network, or the other pipeline is absent.
    """
    import diffusers

    from .. import pipelines, samplers
    from ..pipelines.routed import ADAPTERS
    from .folders import load_pipeline

    facts = read_object(folder / ADAPTED, ModelError)
    absent = [key for key in ("base", "component") if not isinstance(facts.get(key), str)]
    if absent:
        raise ModelError(f"{str(folder / ADAPTED)!r} names no {absent[0]}; expected one")
    about = read_object(folder / _SCHEDULER / "scheduler_config.json", ModelError)
    name = str(about.get("_class_name"))
    scheduler = getattr(samplers, name, None) or getattr(diffusers, name, None)
    if scheduler is None or not name.endswith("Scheduler"):
        raise ModelError(f"{str(folder / _SCHEDULER)!r} is of {name}, which is no scheduler")
    pipe: Any = load_pipeline(facts["base"], dtype, **kwargs)
    if (folder / ADAPTERS).is_file():
        kind = getattr(pipelines, str(read_object(folder / "config.json", ModelError).get("_class_name")))
        setattr(pipe, facts["component"], kind.on(getattr(pipe, facts["component"]), folder))
    else:
        pipe.load_lora_weights(folder)
    pipe.scheduler = scheduler.from_pretrained(folder, subfolder=_SCHEDULER)
    return pipe

"""The trained pipelines that ship with the package, and the loading of models by name, folder or hub id."""

from typing import TYPE_CHECKING, Any

import torch

from diffaccel.zoo.fashion import LABELS, labels, prompts
from diffaccel.zoo.folders import check_folder, load_pipeline, names, path, resolve_model
from diffaccel.zoo.reference import reference

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "LABELS",
    "check_folder",
    "labels",
    "load",
    "load_pipeline",
    "names",
    "path",
    "prompts",
    "reference",
    "resolve_model",
]


def load(name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> "DiffusionPipeline":
    """Loads the zoo's pipeline ``name``.

    Arguments:
        name: One of ``names()``.
        dtype: The type of the weights.
        kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``.

    Raises:
        ModelError: If the zoo has no such pipeline, or its files are damaged.
    """
    return load_pipeline(path(name), dtype, **kwargs)

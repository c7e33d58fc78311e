"""What tells one model from another: its denoiser, and for a student what it was trained for."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedPipeline
from .run import denoisers_of

__all__ = ["GUIDANCE_KEY", "STEPS_KEY", "differs_from", "identity_of"]

GUIDANCE_KEY = "_guidance_scale"
"""In the configuration of a student's scheduler: the guidance scale to call the pipeline with."""

STEPS_KEY = "_trained_steps"
"""In the configuration of a student's scheduler: the numbers of steps that were trained."""


def identity_of(pipe: Any) -> dict[str, str]:
    """Returns the name and class of a pipeline's denoiser, and a digest of its configuration.

    Raises:
        UnsupportedPipeline: If the pipeline has no denoiser.
    """
    networks = denoisers_of(pipe)
    if not networks:
        raise UnsupportedPipeline(f"{type(pipe).__name__} has no denoiser")
    name, module = next(iter(networks.items()))
    network: Any = getattr(module, "_orig_mod", module)
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    return {"denoiser": f"{name}: {type(network).__name__}",
            "config": hashlib.sha256(text.encode()).hexdigest()[:16]}  # fmt: skip


def differs_from(pipe: Any, known: Mapping[str, Any]) -> str | None:
    """Returns why a pipeline's denoiser is not the one that layers were chosen for, or None if it is.

    Arguments:
        pipe: The pipeline.
        known: What `identity_of` said of that one; what it lacks is not compared.
    """
    ours = identity_of(pipe)
    if any(known.get(key, value) != value for key, value in ours.items()):
        return f"the layers are those of {known.get('denoiser')}, another model"
    return None

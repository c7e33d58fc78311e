"""What a schedule was searched for: the model's path, and the model itself."""

import hashlib
import json
from typing import Any

from ..errors import UnsupportedPipeline
from ..pipelines.run import denoisers_of
from .paths import TrainingPath
from .unified import UnifiedSolverScheduler

__all__ = ["family_of", "path_name", "solver_of"]


def solver_of(scheduler: Any, **options: Any) -> UnifiedSolverScheduler:
    """Returns our scheduler with the settings of a pipeline's.

    Arguments:
        scheduler: The pipeline's scheduler.
        options: Settings of `UnifiedSolverScheduler` that are others.
    """
    from ..zoo.folders import quiet

    with quiet([]):  # of settings that only other solvers have
        return UnifiedSolverScheduler.from_config(scheduler.config, **options)


def path_name(path: TrainingPath) -> str:
    """Returns the name of a path: "flow", or "vp" with its largest ratio."""
    return "flow" if path.is_flow else f"vp {path.largest:.4g}"


def family_of(pipe: Any) -> dict[str, str]:
    """Returns what tells one model from another: pipeline, denoiser, path and a digest of the configuration.

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
    return {
        "pipeline": type(pipe).__name__, "denoiser": f"{name}: {type(network).__name__}",
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "path": path_name(solver_of(pipe.scheduler).path),
    }  # fmt: skip

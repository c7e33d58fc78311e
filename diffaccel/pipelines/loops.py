"""Pipelines with unusual sampling loops: what accelerators of some kinds cannot do there, and why."""

from typing import Any

from diffusers import DiffusionPipeline

__all__ = ["why_unusual"]

_GRADIENTS = "it differentiates through the network at each step"
_TWICE = "it calls its solver twice in each step"
_TABLES = "it computes with the tables of its own scheduler"

_LOOPS = "it runs several loops over parts of the steps"

_REFUSED: dict[str, dict[str, str]] = {
    "AnyFlowFAR": {"skip": _LOOPS, "solver": _LOOPS},
    "CosmosTextToWorld": {"skip": _TWICE},
    "CosmosVideoToWorld": {"skip": _TWICE},
    "CycleDiffusion": {"solver": _TABLES},
    "KandinskyImg2ImgPipeline": {"solver": _TABLES},
    "LEditsPP": {"solver": _TABLES},
    "SkyReelsV2DiffusionForcing": {"": "it gives each frame a scheduler of its own"},
    "StableDiffusionAttendAndExcite": {"skip": _GRADIENTS},
    "StableDiffusionPanorama": {"skip": "it evaluates views of one sample in turn"},
    "StableDiffusionParadigms": {"": "it solves many steps at once, and not by scheduler.step"},
    "StableDiffusionPix2PixZero": {"skip": _GRADIENTS},
    "StableDiffusionSAG": {"skip": "it reads the attention maps of each evaluation",
                           "blocks": "it reads the attention maps of each evaluation",
                           "solver": "it takes schedulers of some classes only"},
    "TextToVideoZero": {"skip": _LOOPS, "solver": _LOOPS},
}  # fmt: skip
"""Reasons by the beginning of a class name and the kind of accelerator, "" being all; of diffusers 0.42."""


def why_unusual(pipe: Any, kind: str) -> str | None:
    """Returns why accelerators of a kind cannot serve the loop of a pipeline's class, or None if they can.

    Arguments:
        pipe: The pipeline.
        kind: The accelerator's ``exclusive``.
    """
    if kind == "solver" and any(isinstance(part, DiffusionPipeline) for part in vars(pipe).values()):
        return "it calls pipelines of its own, which keep their schedulers; accelerate these"
    for base in type(pipe).__mro__:
        for start, reasons in _REFUSED.items():
            if base.__name__.startswith(start):
                return reasons.get(kind, reasons.get(""))
    return None

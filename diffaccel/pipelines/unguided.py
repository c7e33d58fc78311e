"""How a pipeline is called so that its network predicts once a sample: guidance off, conditions in a list."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError, UnsupportedPipeline, closest
from .branches import is_embedded
from .run import check_stack

__all__ = ["NULL_LABEL", "arguments_of", "check_pipeline", "check_scheduler", "condition_of", "kind_of",
           "unconditional", "unguided"]  # fmt: skip

NULL_LABEL = 1000
"""The class label without a class, which DiTPipeline hard-codes."""

_KINDS = ("prompt", "class_labels", "batch_size")
_PICTURES = ("strength", "mask_image")
_PROMPTS = re.compile(r"(negative_)?(pooled_)?prompt(_\d|_embeds.*|_attention_mask.*)?")
_IDLE = re.compile(r"eta|guidance_.*|negative_.*|skip_.*guidance.*")
"""What has no effect where neither the pipeline's guidance nor its solver is in force."""
_OURS = ("self", "class_labels", "batch_size", "generator", "guidance_scale", "latents",
         "true_cfg_scale", "num_images_per_prompt", "num_videos_per_prompt", "return_dict")  # fmt: skip


def check_pipeline(pipe: Any) -> None:
    """Checks that a pipeline makes samples out of noise and conditions only.

    Raises:
        UnsupportedPipeline: With the reason, if it does not.
    """
    check_stack(pipe, [])
    name, known = type(pipe).__name__, _parameters(pipe)
    if hasattr(type(pipe), "_diffaccel_base"):
        raise UnsupportedPipeline(f"this {name} is accelerated; take the plain one: accelerate(pipe, None)")
    if found := [word for word in _PICTURES if word in known]:
        raise UnsupportedPipeline(f"{name} starts from a picture ({found[0]}), not from noise alone")
    if not any(kind in known for kind in _KINDS):
        raise UnsupportedPipeline(f"{name} takes none of {', '.join(_KINDS)}")
    vae = getattr(pipe, "vae", None)
    if getattr(getattr(vae, "config", None), "timestep_conditioning", False):
        raise UnsupportedPipeline(f"the decoder of {name} takes a time step for each row of the batch")
    check_scheduler(pipe.scheduler)


def check_scheduler(scheduler: Any) -> None:
    """Checks that a scheduler makes one update an evaluation, of samples with noise of unit variance.

    Raises:
        UnsupportedPipeline: If it does not, with schedulers to use.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1:
        raise UnsupportedPipeline(
            f"{name} evaluates the network twice a step; use DDIM, Euler, DPM-Solver++, or FlowMatchEuler"
        )
    if name == "SCMScheduler":
        raise UnsupportedPipeline(f"the noise of {name} has the variance of the data; use another scheduler")


def kind_of(pipe: Any) -> str:
    """Returns the argument that holds a pipeline's conditions: "prompt", "class_labels" or "batch_size"."""
    known = _parameters(pipe)
    return next(kind for kind in _KINDS if kind in known)


def condition_of(pipe: Any, condition: Any) -> Any:
    """Returns a condition as a pipeline's call takes it: a prompt, the number of a class, or None.

    Raises:
        OptionError: If it is of another kind, or a class that the pipeline does not know.
    """
    name, kind = type(pipe).__name__, kind_of(pipe)
    if kind == "batch_size":
        if condition is not None:
            raise OptionError(f"{name} takes no condition; it is unconditional")
        return None
    if kind == "prompt":
        if not isinstance(condition, str):
            raise OptionError(f"{name} takes prompts, not {condition!r}")
        return condition
    labels: Mapping[str, int] = getattr(pipe, "labels", None) or {}
    if isinstance(condition, int) and not isinstance(condition, bool):
        if condition != NULL_LABEL and (condition < 0 or (labels and condition not in labels.values())):
            raise OptionError(f"no label {condition}; {name} knows {len(labels)}, and {NULL_LABEL} for none")
        return condition
    if condition not in labels:
        raise OptionError(f"no label {condition!r}; {closest(str(condition), labels)}")
    return int(labels[condition])


def unconditional(pipe: Any, negative: Any) -> tuple[Any, dict[str, Any], bool]:
    """Returns what stands for a pipeline's unconditional branch of guidance.

    Arguments:
        pipe: The pipeline.
        negative: The negative prompt or label, or None for the pipeline's own.

    Returns:
        The condition, what its call needs other than the others', and whether its text embeddings are zeros.

    Raises:
        OptionError: If the pipeline is unconditional, or does not take this condition.
        UnsupportedPipeline: If it has no such branch that could be called by itself.
    """
    kind, known = kind_of(pipe), _parameters(pipe)
    if kind == "batch_size":
        raise OptionError(f"{type(pipe).__name__} is unconditional, which leaves nothing to guide")
    if kind == "class_labels":
        return (NULL_LABEL if negative is None else condition_of(pipe, negative)), {}, False
    if "system_prompt" in known:
        raise UnsupportedPipeline(f"{type(pipe).__name__} gives prompts a beginning that negative ones lack")
    # Sana prepends its instruction to prompts, but not to negative ones
    options = {"complex_human_instruction": None} if "complex_human_instruction" in known else {}
    # Stable Diffusion XL has zeros for the text of no negative prompt, which is not the text ""
    blank = negative is None and bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False))
    return condition_of(pipe, "" if negative is None else negative), options, blank


def arguments_of(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns further arguments of a pipeline's call, checked.

    Raises:
        OptionError: If the pipeline has no such argument, or it is not the caller's to set.
    """
    known = [name for name in _parameters(pipe) if name not in _OURS and not _PROMPTS.fullmatch(name)]
    free = [name for name in known if not _IDLE.fullmatch(name)]
    for name in options:
        if name not in free:
            raise OptionError(f"{type(pipe).__name__} takes no {name!r} here; {closest(name, free)}")
    return dict(options)


def unguided(pipe: Any, conditions: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call with one row for each condition, in which guidance is off.

    A guidance scale that is an input of the network (Flux, HunyuanVideo) keeps the pipeline's default.

    Arguments:
        pipe: The pipeline.
        conditions: The condition of each row.
        options: Further arguments.
    """
    known, kind = _parameters(pipe), kind_of(pipe)
    call: dict[str, Any] = {kind: len(conditions) if kind == "batch_size" else list(conditions)}
    scale = next((name for name in ("true_cfg_scale", "guidance_scale") if name in known), None)
    if scale == "true_cfg_scale" or (scale is not None and not is_embedded(pipe)):
        call[scale] = 1.0
    return {**call, **options}


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters

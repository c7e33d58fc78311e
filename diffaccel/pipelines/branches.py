"""How pipelines compute their guidance: the branches, their order, and where pictures have channels."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .run import denoisers_of, parameters_of

__all__ = [
    "Convention",
    "Layout",
    "convention_of",
    "guidance_of",
    "is_embedded",
    "is_guiding",
    "leading",
    "samples_of",
    "scale_of",
    "why_unguided",
]


class Layout(NamedTuple):
    """The axes of latents, the batch being axis 0.

    Arguments:
        channel: The axis of the channels; 0 for the usual one.
        frame: The axis of the frames of videos.
    """

    channel: int = 0
    frame: int = 2

    def channel_axis(self, ndim: int) -> int:
        """Returns the axis of the channels: usually 1, and 2 of packed tokens (B, N, C)."""
        return self.channel or (2 if ndim == 3 else 1)


def leading(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns the leading part of a tensor that has the shape of another one: the latents, or the sample."""
    return tensor[tuple(slice(size) for size in like.shape)]


class Convention(NamedTuple):
    """What a pipeline does that others do not.

    Arguments:
        cond_first: Whether the conditional half of a stacked batch comes first.
        sign: -1 if the scheduler gets the negative of what the network predicts.
        layout: The axes of its latents.
        scale: The argument with the guidance scale, where the combination has to be replaced as a whole:
            it is renormalized, or the network's output is longer than the sample.
        refused: Why no other combination can take the place of the pipeline's own.
    """

    cond_first: bool = False
    sign: int = 1
    layout: Layout = Layout()
    scale: str = ""
    refused: str = ""


_TIME_FIRST = Convention(layout=Layout(channel=2, frame=1))
_THREE = "it combines three predictions"

_CONVENTIONS = {
    "AceStep": Convention(refused="it has an adaptive projected guidance of its own"),
    "CogVideoX": _TIME_FIRST,
    "ConsisID": _TIME_FIRST,
    "Cosmos": Convention(refused="it combines predictions in coordinates that are not the scheduler's"),
    "Cosmos2_5": Convention(),
    "DiT": Convention(cond_first=True),
    "FluxKontext": Convention(scale="true_cfg_scale"),
    "HiDreamImage": Convention(sign=-1),
    "JoyImageEdit": Convention(refused="it rescales its guidance in ways that are not known here"),
    "Kandinsky5": Convention(layout=Layout(channel=4, frame=1)),
    "LTX2": Convention(refused="its networks predict pictures and sound at once"),
    "LatentConsistencyModel": Convention(refused="its guidance scale is an input of the network"),
    "Lumina": Convention(cond_first=True, sign=-1),
    "LongCatImage": Convention(scale="guidance_scale"),
    "Lumina2": Convention(sign=-1, scale="guidance_scale"),
    "NucleusMoE": Convention(sign=-1, scale="guidance_scale"),
    "OmniGen": Convention(refused=_THREE),
    "QwenImage": Convention(scale="true_cfg_scale"),
    "QwenImage21": Convention(refused="the predictions of its network begin with the prompt's tokens"),
    "StableAudio": Convention(layout=Layout(channel=1)),
    "SemanticStableDiffusion": Convention(refused=_THREE),
    "StableDiffusionInstructPix2Pix": Convention(refused=_THREE),
    "StableDiffusionPanorama": Convention(refused="it evaluates views of one sample in turn"),
    "StableDiffusionPipelineSafe": Convention(refused=_THREE),
    "StableDiffusionSAG": Convention(refused=_THREE),
    "StableDiffusionXLInstructPix2Pix": Convention(refused=_THREE),
    "StableVideoDiffusion": _TIME_FIRST,
    "ZImage": Convention(cond_first=True, sign=-1),
}
"""By the beginning of a pipeline's class name; the longest counts.  Read from diffusers 0.42."""


def convention_of(pipe: Any) -> Convention:
    """Returns the convention of a pipeline: that of its class or the nearest base class, or the usual one."""
    for base in type(pipe).__mro__:
        known = [start for start in _CONVENTIONS if base.__name__.startswith(start)]
        if known and "Pipeline" in base.__name__:  # no mixin
            return _CONVENTIONS[max(known, key=len)]
    return Convention()


def why_unguided(pipe: Any) -> str | None:
    """Returns why a pipeline never computes classifier-free guidance that could be changed, or None."""
    if reason := convention_of(pipe).refused:
        return reason
    if getattr(pipe, "guider", None) is not None:
        return (
            "its guidance is a component; use pipe.guider = APGGuider(...) of diffaccel.pipelines.apg_guider"
        )
    names = inspect.signature(type(pipe).__call__).parameters
    negative = any(name.startswith("negative") for name in names)
    if not negative and not any(name.endswith(("guidance_scale", "cfg_scale")) for name in names):
        return "it has no guidance: its call takes neither a guidance scale nor a negative prompt"
    if is_embedded(pipe):
        return "its guidance scale is an input of the network, which predicts once"
    return None


def is_embedded(pipe: Any) -> bool:
    """Returns whether a pipeline's guidance scale is an input of its network, which predicts once."""
    names = inspect.signature(type(pipe).__call__).parameters
    negative = any(name.startswith("negative") for name in names)
    inner: list[Any] = [getattr(network, "_orig_mod", network) for network in denoisers_of(pipe).values()]
    takes = any("guidance" in parameters_of(network) for network in inner)
    distilled = any(getattr(network.config, "time_cond_proj_dim", None) is not None for network in inner)
    return distilled or (takes and not negative)


def is_guiding(pipe: Any, arguments: dict[str, Any]) -> bool:
    """Returns False in a call (or a part of it) that is known to have its guidance switched off.

    Arguments:
        pipe: The pipeline.
        arguments: The arguments of its call.
    """
    known = getattr(pipe, "do_classifier_free_guidance", None)
    if isinstance(known, bool):
        return known
    scale = arguments.get("guidance_scale")
    true_scale = "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters
    return true_scale or not isinstance(scale, (int, float)) or scale > 1


def scale_of(pipe: Any, arguments: dict[str, Any], name: str) -> float:
    """Returns the guidance scale of a call, given or by default.

    Arguments:
        pipe: The pipeline.
        arguments: The arguments of its call.
        name: The name of the argument.
    """
    return float(_value_of(pipe, arguments, name))


def guidance_of(pipe: Any, arguments: Mapping[str, Any]) -> float | None:
    """Returns the guidance scale of a call, given or by default; None where it has none that is a number.

    Arguments:
        pipe: The pipeline.
        arguments: The arguments of its call.
    """
    value = _value_of(pipe, arguments, "guidance_scale")
    return float(value) if isinstance(value, (int, float)) else None


def _value_of(pipe: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """Returns an argument of a call, given or by default; None where the pipeline takes none of this name."""
    known = inspect.signature(type(pipe).__call__).parameters.get(name)
    return arguments.get(name, known.default if known else None)


def samples_of(pipe: Any, arguments: dict[str, Any]) -> int:
    """Returns the number of samples that a call asks for, as far as its prompts tell; 0 if they do not.

    Arguments:
        pipe: The pipeline.
        arguments: The arguments of its call.
    """
    for name in ("prompt", "prompt_embeds", "class_labels"):
        value = arguments.get(name)
        if value is not None:
            parameters = inspect.signature(type(pipe).__call__).parameters
            each = [key for key in parameters if key.startswith("num_") and key.endswith("_per_prompt")]
            counts = [arguments.get(key, parameters[key].default) or 1 for key in each]
            listed = isinstance(value, (list, tuple, Tensor))
            return (len(value) if listed else 1) * (counts[0] if counts else 1)
    return 0

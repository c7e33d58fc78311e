"""What DiffuseHigh needs of a pipeline, and of a call of it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.embeddings import PatchEmbed

from ..errors import OptionError, UnsupportedPipeline, closest
from ..noise import trial_of
from .late_start import late_start, num_steps
from .latent_images import LatentImages
from .run import check_stack, denoisers_of

__all__ = ["arguments_of", "check_pipeline", "parameters_of_call", "sizes_of"]

_OURS = ("self", "denoising_end", "generator", "guidance_scale", "height", "num_inference_steps",
         "output_type", "prompt", "return_dict", "use_resolution_binning", "width")  # fmt: skip
_LADDER = (2, 3, 4)

Size = tuple[int, int]


def parameters_of_call(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters


def check_pipeline(pipe: Any) -> None:
    """Checks that a pipeline makes images from prompts or labels, in a loop that can begin late.

    Raises:
        UnsupportedPipeline: With the reason, if it does not.
    """
    check_stack(pipe, [])
    name, known = type(pipe).__name__, parameters_of_call(pipe)
    if found := [word for word in ("image", "strength", "mask_image") if word in known]:
        raise UnsupportedPipeline(
            f"{name} takes a picture ({found[0]}); take the one that makes them from text"
        )
    for word, what in (("num_frames", "videos"), ("audio_length_in_s", "sound")):
        if word in known:
            raise UnsupportedPipeline(f"{name} makes {what}, not images")
    if not {"prompt", "class_labels"} & set(known):
        raise UnsupportedPipeline(f"{name} takes neither a prompt nor class_labels")
    if not {"latents", "class_labels"} & set(known):
        raise UnsupportedPipeline(f"{name} takes no latents to begin from")
    LatentImages(pipe)
    if hasattr(type(pipe), "_diffaccel_base"):
        for accelerator in pipe.accel.stack:
            if accelerator.alone:
                raise UnsupportedPipeline(
                    f"{accelerator.name} is for one size and one number of steps, and each size here has its "
                    "own; use accelerators without a plan"
                )
            if accelerator.exclusive == "solver":
                raise UnsupportedPipeline(
                    f"{accelerator.name} brings a schedule of its own, which cannot begin late; use others"
                )
    trial = trial_of(pipe.scheduler)
    late_start(trial, max(num_steps(trial) // 2, 1))


def sizes_of(
    pipe: Any, ways: LatentImages, first: tuple[int | None, int | None], targets: Any
) -> tuple[Size, list[Size]]:
    """Returns the first size and the ladder, in pixels, as (height, width).

    Arguments:
        pipe: The pipeline.
        ways: The way between its images and latents.
        first: The height and width of the first size, or None for the model's.
        targets: The user's sizes of the ladder.

    Raises:
        OptionError: If a size is of no use, or not one that the pipeline makes.
        UnsupportedPipeline: If the network has no positions for a size.
    """
    own, name = _native(pipe, ways), type(pipe).__name__
    height, width = first
    if own is None and (height is None or width is None):
        raise OptionError(f"the native size of {name} is not known; give height and width")
    if own is not None:
        height, width = (side if given is None else given for given, side in zip(first, own, strict=True))
    size = (int(height or 0), int(width or 0))
    ladder = [(factor * size[0], factor * size[1]) for factor in _LADDER]
    if targets is not None:
        ladder = _ladder(targets)
    if "height" not in parameters_of_call(pipe):
        if size != own:
            raise OptionError(f"{name} takes no height and width; its images are {own}")
        if any(height != width for height, width in ladder):
            raise OptionError(f"{name} makes squares; target_sizes are {ladder}")
    _check_sizes([size, *ladder], _multiple(pipe, ways))
    _check_positions(pipe, ways, ladder[-1])
    return size, ladder


def arguments_of(pipe: Any, prompt: Any, call: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Returns what the calls of all stages have in common, checked.

    SDXL's conditions on the size of the image stay those of the first size, and no pipeline takes another
    size than it is told (``use_resolution_binning``).

    Arguments:
        pipe: The pipeline.
        prompt: The prompts, or None.
        call: The user's further arguments.
        size: The first size.

    Raises:
        OptionError: If the pipeline has no such argument, or it is not the user's to set.
    """
    known, name = parameters_of_call(pipe), type(pipe).__name__
    free = [word for word in known if word not in _OURS]
    for word in call:
        if word not in free:
            raise OptionError(f"{name} takes no {word!r} here; {closest(word, free)}")
    chosen = dict(call)
    if prompt is not None:
        if "prompt" not in known:
            raise OptionError(f"{name} takes no prompt; give class_labels")
        chosen["prompt"] = prompt
    for word in ("original_size", "target_size"):
        if word in known and chosen.get(word) is None:
            chosen[word] = size
    if "use_resolution_binning" in known:
        chosen["use_resolution_binning"] = False
    return chosen


def _native(pipe: Any, ways: LatentImages) -> Size | None:
    """Returns the size of the images that a model was trained for, or None if it does not say."""
    network = next(iter(denoisers_of(pipe).values()))
    side = getattr(pipe, "default_sample_size", None) or getattr(network.config, "sample_size", None)
    if side is None:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    return height * ways.factor, width * ways.factor


def _multiple(pipe: Any, ways: LatentImages) -> int:
    """Returns the number of pixels that sides are multiples of."""
    patches = [getattr(network.config, "patch_size", None) for network in denoisers_of(pipe).values()]
    patch = max([patch for patch in patches if isinstance(patch, int)], default=1)
    return ways.factor * max(patch, 2 if ways.is_packed else 1)


def _ladder(targets: Any) -> list[Size]:
    """Returns the user's sizes as pairs."""
    listed = targets if isinstance(targets, Sequence) and not isinstance(targets, str) else [targets]
    ladder = [(size, size) if isinstance(size, int) else size for size in listed]
    for size in ladder:
        if not (isinstance(size, (list, tuple)) and [type(side) for side in size] == [int, int]):
            raise OptionError(f"target_sizes has {size!r}; expected whole numbers, or pairs (height, width)")
    if not ladder:
        raise OptionError("target_sizes is empty; expected at least one size")
    return [(height, width) for height, width in ladder]


def _check_sizes(sizes: Sequence[Size], multiple: int) -> None:
    (height, width), last = sizes[0], (0, 0)
    for size in sizes:
        if any(side <= 0 or side % multiple for side in size):
            raise OptionError(f"a size is {size[0]} x {size[1]}; sides are multiples of {multiple}")
        if size[0] < last[0] or size[1] < last[1]:
            raise OptionError(f"the size {size} follows {last}; sizes rise from the first one on")
        if abs(size[0] * width / (size[1] * height) - 1) > 0.1:
            raise OptionError(
                f"the size {size} has another shape than the first, {(height, width)}; set height and width"
            )
        last = size


def _check_positions(pipe: Any, ways: LatentImages, size: Size) -> None:
    """Checks that a network has positions for all tokens of its largest images, where it has a table."""
    for network in denoisers_of(pipe).values():
        for module in network.modules():
            if not isinstance(module, PatchEmbed) or not module.pos_embed_max_size:
                continue
            limit = module.pos_embed_max_size * module.patch_size * ways.factor
            if max(size) > limit:
                raise UnsupportedPipeline(
                    f"the {type(network).__name__} of {type(pipe).__name__} has positions for images of "
                    f"{limit} x {limit} pixels at most, not {size[0]} x {size[1]}"
                )

"""What a recipe for tiny pipelines is, and the things that recipes are made of."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image

from tiny.text import MAX_LENGTH

__all__ = [
    "CALL",
    "EIGHT",
    "OMIT",
    "SIDE",
    "NotBuilt",
    "Recipe",
    "embeds",
    "mask",
    "normal",
    "ones",
    "picture",
    "pictures",
    "scheduler",
]

SIDE = 32
"""The height and width of pictures."""

OMIT: Any = object()
"""An argument that is left at its default."""


class NotBuilt(Exception):
    """A pipeline that is not built, with the reason."""


@dataclass(frozen=True)
class Recipe:
    """What the pipelines whose names match a pattern need besides annotations.

    Arguments:
        pattern: A regular expression that is searched in the name of the class.
        parts: Arguments of the constructor by name: options of the annotated class as a dict, a function that
            makes the component, or the value itself.
        call: Arguments of the call, or functions that make them; `OMIT` leaves a default one out.
        before: What is done with the pipeline before it is called.
        refused: Why such pipelines are not built.
    """

    pattern: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[Any], Any] | None = None
    refused: str = ""


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """A fixed tensor with standard normal entries."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embeds(length: int = MAX_LENGTH, seed: int = 1) -> Callable[[], torch.Tensor]:
    """A function that makes the embeddings of a prompt."""
    return lambda: normal(1, length, 32, seed=seed)


def ones(length: int = MAX_LENGTH) -> Callable[[], torch.Tensor]:
    """A function that makes the mask of a prompt."""
    return lambda: torch.ones(1, length, dtype=torch.long)


def picture(side: int = SIDE, seed: int = 1) -> Image.Image:
    """A fixed picture, smooth enough to look like one."""
    pixels = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def pictures(count: int, side: int = SIDE) -> Callable[[], list[Image.Image]]:
    """A function that makes some pictures."""
    return lambda: [picture(side, seed) for seed in range(count)]


def mask(side: int = SIDE) -> Image.Image:
    """A mask whose left half is white."""
    image = Image.new("L", (side, side))
    image.paste(255, (0, 0, side // 2, side))
    return image


def scheduler(name: str, **options: Any) -> Any:
    """A scheduler; those with a table of betas have that of Stable Diffusion, where they can."""
    common = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
              "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    own = {key: value for key, value in common.items() if key in known and name != "UnCLIPScheduler"}
    return cls(**{**own, **options})


EIGHT = {
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""The options of an autoencoder that shrinks pictures by 8, as some pipelines take for granted."""

CALL: dict[str, Any] = {
    "prompt": "a red boot",
    "negative_prompt": "blur",
    "true_cfg_scale": 4.0,
    "strength": 0.75,
    "height": SIDE,
    "width": SIDE,
    "num_frames": 5,
    "image": picture,
    "mask_image": mask,
    "control_image": lambda: picture(seed=2),
    "control_video": pictures(5),
    "video": pictures(5),
    "output_type": "latent",
    "max_sequence_length": MAX_LENGTH,
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
    "original_size": (SIDE, SIDE),
    "target_size": (SIDE, SIDE),
}
"""What a call is given where it has such an argument."""

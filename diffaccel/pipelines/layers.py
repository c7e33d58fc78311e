"""The residual layers of a denoiser, and what a call of one gives when its body is left out.

A residual layer is y = skip(x) + body(x, ...); without its body it is y = skip(x), where skip is the
identity, or what a residual block of a U-Net does to its input when size or channels change.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from diffusers.models.transformers.transformer_bria import BriaTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn

__all__ = [
    "SKIP_PATH",
    "image_tokens",
    "is_transformer_block",
    "residual_layers",
    "skip_path",
    "with_image_tokens",
]

_CORRECTED = {
    BriaTransformerBlock: TransformerBlockMetadata(1, 0),
    SanaTransformerBlock: TransformerBlockMetadata(0, None),
    ZImageTransformerBlock: TransformerBlockMetadata(0, None, hidden_states_argument_name="x"),
}
"""What diffusers' own list lacks, or has wrong: the places of image and text in the output, their names."""

SKIP_PATH = ("upsample", "downsample", "conv_shortcut")
"""The parts of a U-Net's residual block that work on its input."""


def residual_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Returns the outermost residual layers of a denoiser by name, in the order of its modules.

    In U-Nets these are the residual blocks and the attention layers, in transformers their blocks. A layer
    inside of another is not among them. Empty for a denoiser whose layers are not known.
    """
    found: dict[str, nn.Module] = {}
    for name, module in getattr(denoiser, "_orig_mod", denoiser).named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and _is_residual(module):
            found[name] = module
    return found


def _is_residual(module: nn.Module) -> bool:
    kept = isinstance(module, Transformer2DModel) and module.is_input_continuous
    return kept or isinstance(module, ResnetBlock2D) or is_transformer_block(module)


def is_transformer_block(module: nn.Module) -> bool:
    """Returns whether a module is a residual block of a transformer that is known."""
    return _packing(module) is not None


def image_tokens(module: nn.Module, output: Any) -> Any:
    """Returns what a transformer's block gives for the image, without what it gives for the prompt."""
    packing = _packing(module)
    alone = packing.return_encoder_hidden_states_index is None
    return output if alone else output[packing.return_hidden_states_index]


def with_image_tokens(module: nn.Module, output: Any, tokens: Any) -> Any:
    """Returns the output of a transformer's block with other tokens of the image."""
    packing = _packing(module)
    if packing.return_encoder_hidden_states_index is None:
        return tokens
    pair = list(output)
    pair[packing.return_hidden_states_index] = tokens
    return tuple(pair)


def skip_path(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns what a call of a residual layer gives without the layer's body, packed as the layer packs it.

    Arguments:
        module: One of `residual_layers`.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.

    Raises:
        TypeError: If the module is no such layer.
    """
    inner: Any = getattr(module, "_orig_mod", module)
    given = inspect.signature(type(inner).forward).bind(inner, *args, **kwargs).arguments
    if isinstance(inner, ResnetBlock2D):
        return _resnet_skip(inner, given["input_tensor"])
    if isinstance(inner, Transformer2DModel):
        sample = given["hidden_states"]
        return Transformer2DModelOutput(sample=sample) if given.get("return_dict", True) else (sample,)
    if (packing := _packing(inner)) is None:
        raise TypeError(f"{type(inner).__name__} is no residual layer that is known")
    return _packed(packing, given)


def _resnet_skip(block: ResnetBlock2D, x: Tensor) -> Tensor:
    if block.upsample is not None:
        x = block.upsample(x.contiguous())
    elif block.downsample is not None:
        x = block.downsample(x)
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    return x / block.output_scale_factor


def _packing(module: nn.Module) -> Any:
    """Returns what diffusers knows of a transformer block's arguments and outputs, or None."""
    TransformerBlockRegistry._register()
    return _CORRECTED.get(type(module), TransformerBlockRegistry._registry.get(type(module)))


def _packed(packing: Any, given: Mapping[str, Any]) -> Any:
    hidden = given[packing.hidden_states_argument_name]
    if packing.return_encoder_hidden_states_index is None:
        return hidden
    pair = {packing.return_hidden_states_index: hidden,
            packing.return_encoder_hidden_states_index:
                given.get(packing.encoder_hidden_states_argument_name)}  # fmt: skip
    return pair[0], pair[1]

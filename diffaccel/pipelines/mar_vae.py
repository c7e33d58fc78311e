"""The official KL-16 autoencoder of MAR as an AutoencoderKL.

Its encoder attends at the lowest level and in the middle, its decoder in the middle only.

References:
    | Autoregressive Image Generation without Vector Quantization (Li et al., 2024)
    | https://arxiv.org/abs/2406.11838, https://github.com/LTH14/mar
    | High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022)
    | https://arxiv.org/abs/2112.10752
"""

from collections.abc import Mapping

from diffusers import AutoencoderKL
from torch import Tensor

from ..errors import ModelError
from .mar_files import count_layers, fill, rename

__all__ = ["SCALE", "vae_from_official"]

SCALE = 0.2325
"""What the latents are multiplied by."""

SHAPES = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "post_quant_conv.weight")
RESNET = r"(norm1|norm2|conv1|conv2)\."


def vae_from_official(weights: Mapping[str, Tensor], source: str) -> AutoencoderKL:
    """Returns the autoencoder of an official state dict.

    Arguments:
        weights: The tensors by their official names; those of the training's loss are left out.
        source: Where they come from, for errors.

    Raises:
        ModelError: If tensors are missing, left over, or of another shape.
    """
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}
    if absent := [name for name in SHAPES if name not in weights]:
        raise ModelError(f"{source!r} is no official autoencoder: it has no {', '.join(absent)}")
    levels = count_layers(weights, r"encoder\.down\.(\d+)\.")
    channels = [len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)]
    attends = [any(name.startswith(f"encoder.down.{i}.attn.") for name in weights) for i in range(levels)]
    renamed, unexpected = rename(weights, _table(levels))
    for name, tensor in renamed.items():
        if ".to_" in name and tensor.ndim == 4:
            renamed[name] = tensor[:, :, 0, 0]  # a 1x1 convolution is a linear layer of the channels
    model = AutoencoderKL(
        in_channels=weights["encoder.conv_in.weight"].shape[1], out_channels=3,
        latent_channels=len(weights["post_quant_conv.weight"]), block_out_channels=channels,
        layers_per_block=count_layers(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        up_block_types=["UpDecoderBlock2D"] * levels, scaling_factor=SCALE,
    )  # fmt: skip
    fill(model, renamed, unexpected, source)
    return model


def _table(levels: int) -> list[tuple[str, str]]:
    """Returns the names of a model with so many levels; the decoder counts them from the other end."""
    table: list[tuple[str, str]] = [(r"(quant_conv|post_quant_conv)\.", r"\1.")]
    places = [(f"encoder.down.{i}", f"encoder.down_blocks.{i}") for i in range(levels)]
    places += [(f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}") for i in range(levels)]
    for old, new in places:
        table += _resnet(rf"{old}\.block\.(\d+)\.", rf"{new}.resnets.\1.")
        table += _attention(rf"{old}\.attn\.(\d+)\.", rf"{new}.attentions.\1.")
        table += [(rf"{old}\.downsample\.", f"{new}.downsamplers.0."),
                  (rf"{old}\.upsample\.", f"{new}.upsamplers.0.")]  # fmt: skip
    for part in ("encoder", "decoder"):
        for number in (0, 1):
            table += _resnet(rf"{part}\.(mid)\.block_{number + 1}\.", f"{part}.mid_block.resnets.{number}.")
        table += _attention(rf"{part}\.(mid)\.attn_1\.", f"{part}.mid_block.attentions.0.")
        table += [(rf"{part}\.(conv_in|conv_out)\.", rf"{part}.\1."),
                  (rf"{part}\.norm_out\.", f"{part}.conv_norm_out.")]  # fmt: skip
    return table


def _resnet(old: str, new: str) -> list[tuple[str, str]]:
    return [(old + RESNET, new + r"\2."), (old + r"nin_shortcut\.", new + "conv_shortcut.")]


def _attention(old: str, new: str) -> list[tuple[str, str]]:
    return [(old + r"norm\.", new + "group_norm."), (old + r"([qkv])\.", new + r"to_\2."),
            (old + r"proj_out\.", new + "to_out.0.")]  # fmt: skip

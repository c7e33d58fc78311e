"""Official MAR files as a pipeline folder.

References:
    | Autoregressive Image Generation without Vector Quantization (Li et al., 2024)
    | https://arxiv.org/abs/2406.11838, https://github.com/LTH14/mar
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..errors import ModelError
from ..files import whole_folder
from .mar import MARPipeline
from .mar_files import count_layers, fill, read_weights, rename
from .mar_scheduler import MARScheduler
from .mar_transformer import MARTransformer2DModel
from .mar_vae import vae_from_official

__all__ = ["convert_mar", "transformer_from_official"]

HEADS = {768: 12, 1024: 16, 1280: 16}  # of mar_base, mar_large and mar_huge, by the trunk's width
RENAMED = (
    (r"z_proj_ln\.", "input_norm."),
    (r"z_proj\.", "input."),
    (r"encoder_pos_embed_learned$", "encoder_positions"),
    (r"decoder_pos_embed_learned$", "decoder_positions"),
    (r"diffusion_pos_embed_learned$", "output_positions"),
    (r"(encoder|decoder)_blocks\.(\d+)\.(norm[12])\.", r"\1.\2.\3."),
    (r"(encoder|decoder)_blocks\.(\d+)\.attn\.(qkv|proj)\.", r"\1.\2.\3."),
    (r"(encoder|decoder)_blocks\.(\d+)\.mlp\.fc1\.", r"\1.\2.mlp.0."),
    (r"(encoder|decoder)_blocks\.(\d+)\.mlp\.fc2\.", r"\1.\2.mlp.2."),
    (r"decoder_embed\.", "decoder_input."),
    (r"(encoder_norm|decoder_norm)\.", r"\1."),
    (r"mask_token$", "mask_token"),
    (r"diffloss\.net\.time_embed\.mlp\.", "head.time."),
    (r"diffloss\.net\.cond_embed\.", "head.condition."),
    (r"diffloss\.net\.input_proj\.", "head.input."),
    (r"diffloss\.net\.res_blocks\.(\d+)\.in_ln\.", r"head.blocks.\1.norm."),
    (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.", r"head.blocks.\1.mlp."),
    (r"diffloss\.net\.res_blocks\.(\d+)\.adaLN_modulation\.", r"head.blocks.\1.modulation."),
    (r"diffloss\.net\.final_layer\.linear\.", "head.output."),
    (r"diffloss\.net\.final_layer\.adaLN_modulation\.", "head.modulation."),
)
SHAPES = ("class_emb.weight", "fake_latent", "z_proj.weight", "decoder_pos_embed_learned",
          "diffusion_pos_embed_learned", "encoder_blocks.0.mlp.fc1.weight", "diffloss.net.input_proj.weight",
          "diffloss.net.final_layer.linear.weight")  # fmt: skip
"""The tensors that tell the sizes of a model."""


def convert_mar(
    checkpoint: Path, out: Path, vae: Path | None = None, num_attention_heads: int | None = None
) -> MARPipeline:
    """Writes an official checkpoint as a folder that `MARPipeline.from_pretrained` loads.

    Arguments:
        checkpoint: The official file, as ``checkpoint-last.pth``, whose averaged weights are taken; or a
            safetensors file of these.
        out: The folder to write.
        vae: The official file of the autoencoder, ``kl16.ckpt``; without it the pipeline gives latents.
        num_attention_heads: The attention heads, if the width is not that of an official model.

    Returns:
        The pipeline that was written.

    Raises:
        ModelError: If ``out`` exists, a file cannot be read, or its tensors are not those of MAR.
    """
    if out.exists():
        raise ModelError(f"{str(out)!r} exists; give another folder")
    weights = read_weights(checkpoint, ("model_ema", "model"))
    transformer = transformer_from_official(weights, str(checkpoint), num_attention_heads)
    autoencoder: AutoencoderKL | None = None
    if vae is not None:
        autoencoder = vae_from_official(read_weights(vae, ("model",)), str(vae))
    variance = "learned" if transformer.config.learned_variance else "small"
    pipe = MARPipeline(transformer, MARScheduler(variance_type=variance), autoencoder)
    with whole_folder(out) as temporary:
        pipe.save_pretrained(temporary)
    return pipe


def transformer_from_official(
    weights: Mapping[str, Tensor], source: str, num_attention_heads: int | None = None
) -> MARTransformer2DModel:
    """Returns the transformer of an official state dict.

    Arguments:
        weights: The tensors by their official names.
        source: Where they come from, for errors.
        num_attention_heads: The attention heads, if the width is not that of an official model.

    Raises:
        ModelError: If tensors are missing, left over, or of another shape.
    """
    if absent := [name for name in SHAPES if name not in weights]:
        raise ModelError(f"{source!r} is no official MAR: it has no {', '.join(absent)}")
    classes, width = weights["class_emb.weight"].shape
    heads = num_attention_heads or HEADS.get(width, 0)
    if not heads or width % heads:
        raise ModelError(f"{source!r} has width {width}; give a num_attention_heads that divides it")
    rest = dict(weights)
    table = torch.cat([rest.pop("class_emb.weight"), rest.pop("fake_latent")])
    renamed, unexpected = rename(rest, RENAMED)
    renamed["class_embedding.weight"] = table
    model = MARTransformer2DModel(**_sizes(weights), num_classes=classes, num_attention_heads=heads,
                                  attention_head_dim=width // heads)  # fmt: skip
    fill(model, renamed, unexpected, source)
    return model


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the sizes that the shapes tell; a token is taken for one position of the latent."""
    tokens, width = weights["diffusion_pos_embed_learned"].shape[1:]
    hidden, channels = weights["diffloss.net.input_proj.weight"].shape
    return {
        "sample_size": math.isqrt(tokens),
        "in_channels": channels,
        "num_encoder_layers": count_layers(weights, r"encoder_blocks\.(\d+)\."),
        "num_decoder_layers": count_layers(weights, r"decoder_blocks\.(\d+)\."),
        "num_buffer_tokens": weights["decoder_pos_embed_learned"].shape[1] - tokens,
        "mlp_ratio": weights["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
        "head_width": hidden,
        "head_layers": count_layers(weights, r"diffloss\.net\.res_blocks\.(\d+)\."),
        "learned_variance": weights["diffloss.net.final_layer.linear.weight"].shape[0] == 2 * channels,
    }

"""SDXL-, SD3- and Flux-shaped pipelines with random weights: deeper than those of the tests, same parts.

Their last layers are fitted as those of the tests are, so that samples neither explode nor vanish; they have
learned nothing, and tell what runs and what it costs.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

if TYPE_CHECKING:
    from tiny_pipelines import TinyCase

__all__ = ["SHAPES", "shape"]

HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}


def _sdxl() -> Any:
    from tiny_pipelines import autoencoder, unet, vp
    from tiny_pipelines import clip as text

    network = unet(
        block_out_channels=(64, 96, 128), layers_per_block=2, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8, transformer_layers_per_block=(1, 2, 2),
        use_linear_projection=True,
    )  # fmt: skip
    parts = {"vae": autoencoder(), "unet": network, **text(), **text("_2", projection=True)}
    scheduler = vp(diffusers.EulerDiscreteScheduler, steps_offset=1, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)


def _sd3() -> Any:
    from tiny_pipelines import autoencoder, t5
    from tiny_pipelines import clip as text

    network = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=16, in_channels=4, out_channels=4, num_layers=10, joint_attention_dim=32,
        caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {**text("", True), **text("_2", True), **t5("_3")}
    return diffusers.StableDiffusion3Pipeline(network, scheduler, vae, **parts)


def _flux() -> Any:
    from tiny_pipelines import autoencoder, t5
    from tiny_pipelines import clip as text

    network = diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=16, num_layers=4, num_single_layers=8, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(8, 12, 12), guidance_embeds=True,
    )  # fmt: skip
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return diffusers.FluxPipeline(transformer=network, vae=vae, scheduler=scheduler, **text(), **t5("_2"))


SHAPES = {"sdxl": (_sdxl, "unet", "stacked"), "sd3": (_sd3, "transformer", "stacked"),
          "flux": (_flux, "transformer", "embedded")}  # fmt: skip
"""For each shape what makes it, its denoiser, and how guidance is computed."""


def shape(name: str) -> "TinyCase":
    """Returns a shape as a case of the tests."""
    from tiny_pipelines import TINY, TinyCase

    factory, denoiser, guided = SHAPES[name]
    call = {**TINY[name].call, "height": 64, "width": 64} if name == "flux" else TINY[name].call
    return TinyCase(name, factory, call, guided, (denoiser,))  # type: ignore[arg-type]

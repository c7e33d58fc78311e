"""Recipes for the pipelines with a transformer that make pictures."""

import diffusers
import torch

from tiny.encoders import byte_tokenizer, decoder, qwen_vl
from tiny.networks import make
from tiny.recipe import EIGHT, OMIT, Recipe, embeds, mask, picture
from tiny.text import gemma2, t5

__all__ = ["RECIPES"]

SHIFTED = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}
WAN_VAE_32 = {"dim_mult": [1] * 6, "temperal_downsample": [False] * 5}
"""An autoencoder for pictures that a pipeline resizes to 1024 x 1024."""


def yes(length: int = 8) -> torch.Tensor:
    """The mask of a prompt, as booleans."""
    return torch.ones(1, length, dtype=torch.bool)


SMALL = {
    "block_out_channels": (8,) * 6, "down_block_types": ("DownEncoderBlock2D",) * 6,
    "up_block_types": ("UpDecoderBlock2D",) * 6,
}  # fmt: skip
"""An autoencoder for pictures that a pipeline resizes to 1024 x 1024."""

RECIPES = [
    Recipe(
        "^(Flux(?!2)|Chroma|StableDiffusion3|Bria(?!Fibo)|VisualCloze|OvisImage|ZImage|LongCatImage)",
        {"vae": SHIFTED},
    ),
    Recipe("^StableDiffusion3", {}, {"strength": 0.75}),
    Recipe(
        "^StableDiffusion3ControlNetInpainting",
        {"controlnet": {"extra_conditioning_channels": 1}},
        {"control_mask": mask},
    ),
    Recipe(
        "^StableDiffusion3Inpaint",
        {"transformer": {"in_channels": 16, "out_channels": 16}, "vae": {"latent_channels": 16}},
    ),
    Recipe("^FluxPriorRedux|LatentUpsample|LTX2VideoDiffusionDecode", refused="it has no denoising loop"),
    Recipe("^FluxControl(?!Net)", {"transformer": {"in_channels": 32, "out_channels": 16}}),
    Recipe("^FluxFill|^VisualCloze", {"transformer": {"in_channels": 48, "out_channels": 16}}),
    Recipe(
        "^VisualCloze",
        {"resolution": 32},
        {
            "task_prompt": "a boot",
            "content_prompt": "",
            "image": lambda: [[picture(), picture(seed=2)], [picture(), None]],
        },
    ),
    Recipe("^FluxKontext", {}, {"_auto_resize": False, "max_area": 1024}),
    Recipe("^Flux2", {}, {"text_encoder_out_layers": (1, 1, 2)}),
    Recipe("^Flux2(?!KleinInpaint)", {}, {"image": lambda: picture(64)}),
    Recipe(
        "^Flux2(?!Klein)",
        {"text_encoder": lambda: decoder("Mistral", "ForCausalLM"), "tokenizer": byte_tokenizer},
    ),
    Recipe("^Flux2Klein", {"tokenizer": byte_tokenizer, "transformer": {"guidance_embeds": False}}),
    Recipe("^BriaFibo", {"transformer": {"num_layers": 2}}, {"prompt": '{"a": "red boot"}'}),
    Recipe("^BriaFiboEdit", {}, {"prompt": '{"edit_instruction": "a green boot"}'}),
    Recipe("^DiT", {}, {"class_labels": [1]}),
    Recipe("^ErnieImage", {"text_encoder": lambda: decoder("Mistral")}),
    Recipe(
        "^GlmImage",
        {
            "processor": None,
            "vision_language_encoder": None,
            "text_encoder": lambda: t5(words=512)["text_encoder"],
        },
        {"image": OMIT, "prior_token_ids": lambda: torch.zeros(1, 64, dtype=torch.long)},
    ),
    Recipe(
        "^HunyuanImageRefiner",
        {
            "transformer": {
                "in_channels": 16,
                "out_channels": 8,
                "patch_size": (1, 1, 1),
                "rope_axes_dim": (4, 6, 6),
            }
        },
    ),
    Recipe("^HiDream", {"tokenizer_4": byte_tokenizer}),
    Recipe(
        "^HunyuanDiT",
        {
            "text_encoder_2": lambda: t5()["text_encoder"],
            "tokenizer_2": lambda: t5()["tokenizer"],
            "text_encoder": {},
            "vae": EIGHT,
            "transformer": {"sample_size": 4},
        },
    ),
    Recipe("^HunyuanDiTControlNet", {"controlnet": {"sample_size": 4}}),
    Recipe("^CogView4Control", {"transformer": {"in_channels": 8}}),
    Recipe(
        "^(Krea2|JoyImage|Nucleus|QwenImage21|DreamLite)",
        {"tokenizer": byte_tokenizer},
        {"max_sequence_length": 256},
    ),
    Recipe("^Krea2", {"text_encoder_select_layers": (1, 2)}),
    Recipe("^Nucleus", {}, {"return_index": -1}),
    Recipe("^JoyImageEditPlus", {}, {"images": lambda: [[picture()]]}),
    Recipe("^DreamLite", {}, {"image": OMIT}),
    Recipe("^QwenImage21", {}, {"image": OMIT}),
    Recipe(
        "^(QwenImage(Edit|Layered)|LongCatImageEdit)",
        {"text_encoder": lambda: qwen_vl("Qwen2_5_VL"), "tokenizer": byte_tokenizer},
        {"height": OMIT, "width": OMIT},
    ),
    Recipe("^QwenImage(Edit|Layered)", {"vae": WAN_VAE_32}),
    Recipe("^QwenImageLayered", {}, {"output_type": "pt", "max_sequence_length": 512}),
    Recipe("^QwenImageControlNet", {}, {"control_mask": mask, "height": 64, "width": 64}),
    Recipe(
        "^QwenImage(ControlNetInpaint|Inpaint|Img2Img|Pipeline)",
        {},
        {
            "height": 64,
            "width": 64,
            "image": lambda: picture(64),
            "mask_image": lambda: mask(64),
            "control_image": lambda: picture(64),
            "control_mask": lambda: mask(64),
        },
    ),
    Recipe("^QwenImageControlNetInpaint", {"controlnet": {"extra_condition_channels": 4}}),
    Recipe(
        "^LongCatImage",
        {"vae": {"latent_channels": 16}, "transformer": {"in_channels": 64}},
        {"enable_prompt_rewrite": False},
    ),
    Recipe("^LongCatImageEdit", {"vae": SMALL}),
    Recipe("^Lumina(?!2)", {"tokenizer": lambda: gemma2()["tokenizer"]}),
    Recipe("^OmniGen", {"vae": EIGHT, "tokenizer": byte_tokenizer}, {"input_images": OMIT}),
    Recipe("^OvisImage", {"tokenizer": byte_tokenizer}, {"max_sequence_length": 256}),
    Recipe(
        "^PRX",
        {"text_encoder": None, "tokenizer": None},
        {
            "prompt": OMIT,
            "negative_prompt": OMIT,
            "prompt_embeds": embeds(8),
            "negative_prompt_embeds": embeds(8, 2),
            "prompt_attention_mask": yes,
            "negative_prompt_attention_mask": yes,
        },
    ),
    Recipe(
        "^PRXPixel",
        {"transformer": {"in_channels": 3, "bottleneck_size": 8, "resolution_embeds": True}},
        {"output_type": "pt"},
    ),
    Recipe(
        "^SanaSprint",
        {
            "scheduler": diffusers.SCMScheduler,
            "transformer": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        },
        {"intermediate_timesteps": None},
    ),
    Recipe("^SanaVideo|^SanaImageToVideo", {"vae": lambda: make("AutoencoderKLWan")}, {"frames": 5}),
    Recipe("^ZImage", {"text_encoder": lambda: decoder("Qwen3")}),
    Recipe("^ZImageControlNetInpaint", {"controlnet": {"control_in_dim": 9}}),
]

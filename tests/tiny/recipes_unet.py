"""Recipes for the pipelines with a UNet."""

from typing import Any

import diffusers

from tiny.encoders import VISION, byte_tokenizer, clip_vision, multilingual_clip
from tiny.networks import make
from tiny.recipe import OMIT, Recipe, mask, normal, picture, pictures, scheduler
from tiny.text import clap, clip_text, clip_tokenizer

__all__ = ["RECIPES"]

XL = {
    "cross_attention_dim": 64, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8, "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}  # fmt: skip
ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
KANDINSKY = {
    "out_channels": 8, "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "encoder_hid_dim": 32,
}  # fmt: skip
PIXELS = {
    "in_channels": 3, "out_channels": 6, "encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text", "addition_embed_type_num_heads": 2,
    "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "act_fn": "gelu",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}  # fmt: skip


def network(**options: Any) -> Any:
    """A UNet that another network is made from."""
    return make("UNet2DConditionModel", **options)


def xs_adapter(**options: Any) -> Any:
    """A ControlNet-XS for a UNet with these options."""
    unet = network(layers_per_block=2, **options)
    return diffusers.ControlNetXSAdapter.from_unet(
        unet, size_ratio=1.0, conditioning_embedding_out_channels=(8, 8), learn_time_embedding=True
    )


def prior_parts() -> dict[str, Any]:
    """The prior of a combined pipeline."""
    return {
        "prior_prior": lambda: make("PriorTransformer"), "prior_image_encoder": clip_vision,
        "prior_text_encoder": lambda: clip_text(projection=True), "prior_tokenizer": clip_tokenizer,
        "prior_scheduler": lambda: scheduler("UnCLIPScheduler", prediction_type="sample"),
    }  # fmt: skip


RECIPES = [
    Recipe("StableDiffusionXL|SDXL", {"unet": XL}),
    Recipe("StableDiffusionXLControlNet", {"controlnet": XL}),
    Recipe("StableDiffusionInpaint|StableDiffusionXLInpaint|ControlNetInpaint", {}, {"strength": 1.0}),
    Recipe("InstructPix2Pix", {"unet": {"in_channels": 8}}),
    Recipe(
        "ControlNetUnion",
        {"controlnet": {"num_proj_channel": 32}},
        {"control_mode": [0], "control_image": pictures(1)},
    ),
    Recipe("StableDiffusionXLControlNetUnionInpaint", {}, {"control_image": pictures(1)}),
    Recipe("^VersatileDiffusionImage", {}, {"negative_prompt": OMIT}),
    Recipe("ControlNetXS", {"unet": {"layers_per_block": 2}}),
    Recipe("StableDiffusionControlNetXS", {"controlnet": xs_adapter}),
    Recipe("StableDiffusionXLControlNetXS", {"controlnet": lambda: xs_adapter(**XL)}),
    Recipe("Stable.*Adapter", {"unet": ATTENTION_FIRST, "adapter": {"adapter_type": "full_adapter"}}),
    Recipe("AttendAndExcite", {}, {"token_indices": [1, 2], "attn_res": (8, 8), "max_iter_to_alter": 2}),
    Recipe(
        "Depth2Img",
        {"unet": {"in_channels": 5}, "depth_estimator": None, "feature_extractor": None},
        {"depth_map": lambda: normal(1, 32, 32)},
    ),
    Recipe(
        "DiffEdit",
        {},
        {
            "image_latents": lambda: normal(1, 8, 4, 16, 16),
            "inpaint_strength": 1.0,
            "mask_image": lambda: mask(16),
        },
    ),
    Recipe(
        "GLIGEN",
        {"unet": {"attention_type": "gated"}},
        {"gligen_phrases": ["a boot"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
    ),
    Recipe("GLIGENTextImage", refused="a CLIPProcessor with pictures is not made here"),
    Recipe("LDM3D", {"vae": {"in_channels": 6, "out_channels": 6}}, {"output_type": "np"}),
    Recipe(
        "LatentUpscale",
        {"unet": {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 160}},
        {"image": lambda: picture(16)},
    ),
    Recipe(
        "StableDiffusionUpscale",
        {"unet": {"in_channels": 7, "num_class_embeds": 1000}},
        {"image": lambda: picture(16)},
    ),
    Recipe("Paradigms", {"scheduler": lambda: scheduler("DDIMParallelScheduler")}),
    Recipe(
        "Pix2PixZero",
        {"caption_generator": None, "caption_processor": None},
        {"source_embeds": lambda: normal(2, 16, 32), "target_embeds": lambda: normal(2, 16, 32, seed=2)},
    ),
    Recipe(
        "UnCLIP",
        {
            "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64},
            "image_normalizer": lambda: image_normalizer(),
            "scheduler": {},
        },
    ),
    Recipe(
        "StableUnCLIP",
        {
            "image_noising_scheduler": {},
            "prior_scheduler": lambda: scheduler("DDPMScheduler", prediction_type="sample", clip_sample=True),
            "image_encoder": clip_vision,
            "feature_extractor": lambda: None,
        },
    ),
    Recipe("StableUnCLIPImg2Img", {}, {"image_embeds": lambda: normal(1, 32), "image": OMIT}),
    Recipe("LatentConsistency", {"unet": {"time_cond_proj_dim": 32}}, {"original_inference_steps": 50}),
    Recipe("Marigold", {"unet": {"in_channels": 8}}, {"processing_resolution": 0, "output_type": "np"}),
    Recipe(
        "MarigoldIntrinsics",
        {
            "unet": {"in_channels": 12, "out_channels": 8},
            "target_properties": lambda: {
                "target_names": ["albedo", "material"],
                "albedo": {"prediction_space": "srgb", "up_to_scale": False},
                "material": {"prediction_space": "stack", "up_to_scale": False},
            },
        },
    ),
    Recipe("PIA", {"motion_adapter": {"conv_in_channels": 9}}),
    Recipe(
        "PaintByExample",
        {"unet": {"in_channels": 9}, "image_encoder": lambda: example_encoder()},
        {"example_image": lambda: picture(seed=3)},
    ),
    Recipe(
        "AnimateDiff.*ControlNet", {}, {"conditioning_frames": pictures(5), "controlnet_frame_indices": [0]}
    ),
    Recipe("AnimateDiffSparse", {}, {"conditioning_frames": pictures(1)}),
    Recipe("TextToVideoZero", {}, {"t0": 4, "t1": 6, "video_length": 3}),
    Recipe("ConsistencyModel", {}, {"output_type": "np"}),
    Recipe("CycleDiffusion", {}, {"source_prompt": "a green dress"}),
    Recipe(
        "LEditsPP",
        {"scheduler": lambda: scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")},
        {"editing_prompt": ["a green dress"], "edit_threshold": [0.8]},
        before=lambda pipe: pipe.invert(image=picture(), num_inversion_steps=8, skip=0.1),
    ),
    Recipe("^LDM", {"vqvae": {"latent_channels": 4}, "unet": {"in_channels": 4, "out_channels": 4}}),
    Recipe(
        "LDMTextToImage",
        {"bert": lambda: clip_text(length=77), "tokenizer": lambda: clip_tokenizer(77), "unet": network},
    ),
    Recipe(
        "LDMSuperResolution",
        {"vqvae": {"latent_channels": 3, "vq_embed_dim": 3}, "unet": {"in_channels": 6, "out_channels": 3}},
    ),
    Recipe("I2VGenXL", {"image_encoder": clip_vision}),
    Recipe(
        "StableVideoDiffusion",
        {"unet": {"in_channels": 8}, "image_encoder": lambda: clip_vision(image_size=224, patch_size=112)},
    ),
    Recipe("^IF", {"unet": PIXELS}, {"output_type": "pt"}),
    Recipe(
        "^IF.*SuperResolution",
        {"unet": {"in_channels": 6, "class_embed_type": "timestep"}},
        {"image": lambda: picture(16), "original_image": picture},
    ),
    Recipe(
        "^Kandinsky(?!3|5|6|Prior|V22Prior)",
        {
            "unet": {
                **KANDINSKY,
                "encoder_hid_dim_type": "text_image_proj",
                "addition_embed_type": "text_image",
            },
            "movq": {"norm_type": "spatial", "block_out_channels": (32, 32)},
            "text_encoder": lambda: multilingual_clip(),
            "tokenizer": byte_tokenizer,
        },
        {
            "image_embeds": lambda: normal(1, 32),
            "negative_image_embeds": lambda: normal(1, 32, seed=2),
            "hint": lambda: normal(1, 3, 128, 128),
            "output_type": "pt",
        },
    ),
    Recipe("^KandinskyV22", {"unet": {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}}),
    Recipe("^KandinskyV22Controlnet", {"unet": {"in_channels": 8, "addition_embed_type": "image_hint"}}),
    Recipe("^Kandinsky.*Inpaint", {"unet": {"in_channels": 9}}),
    Recipe("^Kandinsky(V22)?Prior", {}, {"output_type": "pt"}),
    Recipe("^Kandinsky.*Prior", {"image_encoder": clip_vision, "scheduler": {"prediction_type": "sample"}}),
    Recipe(
        "^StableCascade|^Wuerstchen",
        {"latent_dim_scale": 10.67, "feature_extractor": None},
        {
            "height": 128,
            "width": 128,
            "image_embeddings": lambda: normal(1, 4, 3, 3),
            "output_type": "pt",
            "prior_num_inference_steps": 2,
        },
    ),
    Recipe("^StableCascadeDecoder|^StableCascadeCombined", {"decoder": {"effnet_in_channels": 4}}),
    Recipe(
        "^StableCascade.*Combined",
        {
            "prior_prior": {"clip_image_in_channels": 32, "clip_text_in_channels": 32},
            "prior_feature_extractor": None,
            "prior_image_encoder": None,
        },
    ),
    Recipe("^StableCascadePrior", {"prior": {"clip_image_in_channels": 32, "clip_text_in_channels": 32}}),
    Recipe("^Wuerstchen", {}, {"output_type": "pt"}),
    Recipe(
        "^Amused",
        {"vqvae": {"num_vq_embeddings": 32}, "scheduler": {"mask_token_id": 31}},
        {"image": picture},
    ),
    Recipe("^AltDiffusion", {"text_encoder": lambda: alt_text(), "tokenizer": byte_tokenizer}),
    Recipe(
        "^(MusicLDM|AudioLDM)(?!2)",
        {
            "tokenizer": lambda: clap()["tokenizer"],
            "text_encoder": lambda: clap()["text_encoder"],
            "feature_extractor": lambda: clap()["feature_extractor"],
            "vae": {"in_channels": 1, "out_channels": 1},
            "unet": {
                "class_embed_type": "simple_projection",
                "projection_class_embeddings_input_dim": 32,
                "class_embeddings_concat": True,
            },
        },
        {
            "prompt": OMIT,
            "negative_prompt": OMIT,
            "prompt_embeds": lambda: normal(1, 32),
            "audio_length_in_s": 0.02,
            "negative_prompt_embeds": lambda: normal(1, 32, seed=2),
        },
    ),
    Recipe("^AudioLDMPipe", {}, {"output_type": "np"}),
    Recipe("^StableAudioPipe", {}, {"audio_end_in_s": 0.5, "output_type": "latent"}),
    Recipe("^DanceDiffusion", {"unet": {"sample_rate": 512}}, {"audio_length_in_s": 1.0}),
    Recipe(
        "^MARPipeline",
        {"transformer": lambda: mar(), "vae": None, "scheduler": {"variance_type": "small"}},
        {"class_labels": [1], "output_type": "latent"},
    ),
    Recipe("^Kandinsky.*Combined", prior_parts(), {"prior_num_inference_steps": 2}),
]


def alt_text() -> Any:
    """The text encoder of AltDiffusion."""
    from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
        RobertaSeriesConfig,
        RobertaSeriesModelWithTransformation,
    )

    config = RobertaSeriesConfig(
        hidden_size=32, project_dim=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=len(byte_tokenizer()), max_position_embeddings=600,
    )  # fmt: skip
    return RobertaSeriesModelWithTransformation(config)


def mar() -> Any:
    """The network of our own autoregressive pipeline."""
    from diffaccel.pipelines import MARTransformer2DModel

    return MARTransformer2DModel(16, 2, 1, 3, 2, 8, 1, 1, 2, head_width=16, head_layers=1,
                                 learned_variance=False)  # fmt: skip


def image_normalizer() -> Any:
    """The normalizer of CLIP embeddings in Stable unCLIP."""
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(embedding_dim=32)


def example_encoder() -> Any:
    """The picture encoder of Paint by Example."""
    import transformers
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder

    return PaintByExampleImageEncoder(transformers.CLIPVisionConfig(**VISION), proj_size=32)

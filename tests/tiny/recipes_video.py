"""Recipes for the pipelines with a transformer that make videos or sound."""

from typing import Any

import torch
from transformers import CLIPImageProcessor

from tiny.encoders import byte_tokenizer, clip_vision, qwen_processor, qwen_vl
from tiny.recipe import EIGHT, OMIT, Recipe, embeds, normal, ones, pictures, scheduler
from tiny.text import clip_text, clip_tokenizer, t5

__all__ = ["RECIPES"]


class NoGuard:
    """Stands for the guardrail of Cosmos, which checks prompts and frames before and after the loop."""

    def to(self, *_: Any) -> "NoGuard":
        """It is on no device."""
        return self

    def check_text_safety(self, _: str) -> bool:
        """Every prompt is safe."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Every frame is safe."""
        return frames


TEXT = {
    "prompt": None,
    "negative_prompt": None,
    "prompt_embeds": embeds(),
    "negative_prompt_embeds": embeds(seed=2),
}
"""A prompt that is passed as embeddings."""

MASKED = {**TEXT, "prompt_attention_mask": ones(), "negative_prompt_attention_mask": ones()}
UMT5 = {"tokenizer": lambda: t5()["tokenizer"]}
HUNYUAN = {"prompt_template": {"template": "a photo of {}", "crop_start": 3}}
LONG = {"text_encoder_2": lambda: clip_text(length=77), "tokenizer_2": lambda: clip_tokenizer(77)}

RECIPES = [
    Recipe("^(Wan|AnyFlow|ChronoEdit|Helios|LucyEdit|SkyReels)", UMT5, TEXT),
    Recipe("^(Wan|ChronoEdit|LucyEdit|SkyReels|AnyFlow)", {}, {"width": 48}),
    Recipe(
        "^WanImageToVideo|^ChronoEdit|^SkyReelsV2ImageToVideo",
        {
            "transformer": {"in_channels": 12, "image_dim": 32},
            "image_encoder": clip_vision,
            "image_processor": {},
        },
    ),
    Recipe("^SkyReelsV2ImageToVideo", {"image_processor": lambda: CLIPImageProcessor(size=32, crop_size=32)}),
    Recipe("^AnyFlow", {}, {"guidance_scale": 4.0, "video": OMIT}),
    Recipe("^AnyFlowFAR", {}, {"chunk_partition": [1, 1], "width": 32}),
    Recipe(
        "^HunyuanVideo15",
        {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None},
        {
            **TEXT,
            "prompt_embeds_mask": ones(),
            "negative_prompt_embeds_mask": ones(),
            "prompt_embeds_2": embeds(),
            "prompt_embeds_mask_2": ones(),
            "negative_prompt_embeds_2": embeds(seed=2),
            "negative_prompt_embeds_mask_2": ones(),
        },
    ),
    Recipe(
        "^HunyuanVideo15ImageToVideo",
        {
            "transformer": {"task_type": "i2v", "image_embed_dim": 32},
            "image_encoder": {},
            "feature_extractor": {},
        },
    ),
    Recipe(
        "^HunyuanVideoImageToVideo",
        {"text_encoder": None, "tokenizer": None},
        {
            **MASKED,
            "pooled_prompt_embeds": lambda: normal(1, 32),
            "negative_pooled_prompt_embeds": lambda: normal(1, 32),
        },
    ),
    Recipe(
        "^HunyuanVideoImageToVideo",
        {"transformer": {"in_channels": 9, "image_condition_type": "latent_concat"}},
    ),
    Recipe("^Helios", {"scheduler": {"stages": 1}}, {"image": OMIT, "video": OMIT}),
    Recipe("^HeliosPyramid", {}, {"height": 64, "width": 64, "pyramid_num_inference_steps_list": [8]}),
    Recipe("^Kandinsky5I2V", {}, {"num_frames": 9}),
    Recipe("^Kandinsky5I2I", {}, {"height": OMIT, "width": OMIT}),
    Recipe("^SkyReelsV2DiffusionForcingVideoToVideo", {}, {"overlap_history": 1}),
    Recipe(
        "^MotifVideo",
        {
            "text_encoder": None,
            "tokenizer": None,
            "scheduler": lambda: scheduler("FlowMatchEulerDiscreteScheduler"),
        },
        MASKED,
    ),
    Recipe("^LTX2", {"text_encoder": None, "tokenizer": None}, {**MASKED, "image_crf": 0}),
    Recipe("^Wan(Pipeline|ImageToVideo)|^Lucy", {"transformer_2": None, "transformer": {}}),
    Recipe("^LucyEdit", {"transformer": {"in_channels": 8}}),
    Recipe("^WanVACE", {"transformer_2": None, "transformer": {}}, {"video": pictures(5)}),
    Recipe(
        "^WanAnimate",
        {"image_encoder": clip_vision},
        {"pose_video": pictures(5), "face_video": pictures(5), "segment_frame_length": 5},
    ),
    Recipe("^Latte", {}, {"video_length": 2}),
    Recipe("^Allegro", {"transformer": {"cross_attention_dim": 48}}),
    Recipe(
        "^CogVideoXFunControl|^CogVideoXImageToVideo", {"transformer": {"in_channels": 8}}, {"num_frames": 9}
    ),
    Recipe("^CogVideoXFunControl", {}, {"control_video": pictures(9)}),
    Recipe("^Cosmos", {"safety_checker": NoGuard}),
    Recipe("^Cosmos(?!2Text)", {}, {"num_frames": 9}),
    Recipe("^LTX", {}, {"num_frames": 17}),
    Recipe("^Cosmos2(?!_5)", {"scheduler": {"use_karras_sigmas": True}}),
    Recipe(
        "^CosmosVideoToWorld|^Cosmos2(VideoToWorld|_5)", {"transformer": {"in_channels": 5}}, {"image": OMIT}
    ),
    Recipe(
        "^Cosmos2_5",
        {"transformer": {"text_embed_dim": 64}, "controlnet": {"text_embed_dim": 64}},
        {"max_sequence_length": 512},
    ),
    Recipe(
        "^Cosmos2_5_Transfer",
        {"transformer": {"controlnet_block_every_n": 1}},
        {"controls": pictures(5), "num_frames_per_chunk": 5},
    ),
    Recipe("^EasyAnimate", {"text_encoder": {}, "tokenizer": byte_tokenizer}),
    Recipe(
        "^EasyAnimateInpaint",
        {"transformer": {"in_channels": 9}},
        {
            "video": lambda: normal(1, 3, 5, 32, 32).clamp(0, 1),
            "mask_video": lambda: torch.ones(1, 1, 5, 32, 32) * 255,
        },
    ),
    Recipe("^Hunyuan(Video(?!15)|Skyreels)", LONG, HUNYUAN),
    Recipe("^HunyuanSkyreels", {"transformer": {"in_channels": 8}}),
    Recipe("^HunyuanVideoFramepack", {"image_encoder": {}, "feature_extractor": {}}),
    Recipe(
        "^Kandinsky5",
        {
            "text_encoder": lambda: qwen_vl("Qwen2_5_VL"),
            "tokenizer": lambda: qwen_processor("Qwen2VL"),
            "text_encoder_2": LONG["text_encoder_2"],
            "tokenizer_2": LONG["tokenizer_2"],
        },
        {"max_sequence_length": 256},
    ),
    Recipe("^Kandinsky5I2", {"transformer": {"visual_cond": True}}),
    Recipe("^Kandinsky5I2I", {"vae": EIGHT}),
    Recipe("^Mochi", {}, {"num_frames": 7}),
]

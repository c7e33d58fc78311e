"""Options that make diffusers' networks tiny, by class; latents have 4 channels and texts 32 features."""

import importlib
from typing import Any

import diffusers
from torch import nn

__all__ = ["NETWORKS", "make"]

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = {"axes_dims_rope": (4, 6, 6)}
IN_OUT = {"in_channels": 4, "out_channels": 4}
TOKENS = {**HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32}
FLUX = {**TOKENS, **ROPE, "pooled_projection_dim": 32}
QWEN = {**HEADS, **ROPE, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 32}
SD3 = {
    **HEADS, "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "pos_embed_max_size": 16,
    "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 64,
}  # fmt: skip
SANA = {
    **HEADS, **IN_OUT, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
    "cross_attention_dim": 32, "caption_channels": 32, "sample_size": 16,
}  # fmt: skip
WAN = {
    **HEADS,
    **IN_OUT,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
COSMOS = {
    **HEADS, "out_channels": 4, "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 32, "adaln_lora_dim": 4,
    "max_size": (4, 32, 32), "rope_scale": (2.0, 1.0, 1.0), "extra_pos_embed_type": "learnable",
}  # fmt: skip
COGVIDEO = {
    **HEADS, **IN_OUT, "time_embed_dim": 8, "text_embed_dim": 32, "num_layers": 1, "sample_width": 4,
    "sample_height": 4, "sample_frames": 9, "max_text_seq_length": 16,
}  # fmt: skip
HUNYUAN = {
    **HEADS, **IN_OUT, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32,
    "pooled_projection_dim": 32, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
HUNYUAN_DIT = {
    **HEADS, "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 32,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 32, "pooled_projection_dim": 32, "activation_fn": "gelu-approximate",
}  # fmt: skip
Z_IMAGE = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
UNETS = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
VIDEO_VAE = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1}
WAN_VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.1,
    0.0, -0.1, 0.2],
           "latents_std": [1.5, 1.2, 1.0, 2.0]}  # fmt: skip
KL = {
    "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "sample_size": 32,
}  # fmt: skip

NETWORKS: dict[str, dict[str, Any]] = {
    # ------------------------------------------------------------ UNets
    "UNet2DConditionModel": {
        **UNETS, "sample_size": 16, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DModel": {
        "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D",
        "UpBlock2D"),
    },
    "UNet1DModel": {
        "sample_size": 512, "block_out_channels": (8, 8, 16), "extra_in_channels": 16,
    },
    "UNet3DConditionModel": {
        **UNETS, "sample_size": 16, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16, "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "num_attention_heads": 2, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
    },
    "I2VGenXLUNet": {
        **UNETS, "sample_size": 16, "attention_head_dim": 8, "num_attention_heads": 2,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "MotionAdapter": {
        "block_out_channels": (32, 32), "motion_layers_per_block": 1, "motion_norm_num_groups": 8,
        "motion_num_attention_heads": 2,
    },
    "Kandinsky3UNet": {
        "groups": 2, "attention_head_dim": 4, "layers_per_block": 3, "block_out_channels": (32, 64),
        "cross_attention_dim": 4, "encoder_hid_dim": 32, "time_embedding_dim": 4,
    },
    "DreamLiteUNetModel": {
        **IN_OUT, "sample_size": 16, "block_out_channels": (32, 64), "cross_attention_dim": 32,
        "attention_head_dim": 8, "layers_per_block": 1, "norm_num_groups": 8,
        "transformer_layers_per_block": 1,
        "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    },
    "PriorTransformer": {**HEADS, "embedding_dim": 32, "num_layers": 1, "num_embeddings": 16},
    "StableCascadeUNet": {
        **IN_OUT, "conditioning_dim": 32, "block_out_channels": (16, 32), "num_attention_heads": (-1, 2),
        "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "dropout": (0.0, 0.0),
        "down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (1, 1), "switch_level": None,
        "block_types_per_layer": (
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        "clip_text_pooled_in_channels": 32,
    },
    "WuerstchenPrior": {"c_in": 4, "c": 32, "c_cond": 32, "c_r": 16, "depth": 1, "nhead": 2},
    "WuerstchenDiffNeXt": {
        "c_cond": 32, "c_hidden": [16, 32], "nhead": [-1, 2], "blocks": [1, 1], "level_config": ["CT", "CTA"],
        "inject_effnet": [False, True], "effnet_embd": 4, "clip_embd": 32,
    },
    "PaellaVQModel": {"bottleneck_blocks": 1, "num_vq_embeddings": 2, "embed_dim": 16},
    "UVit2DModel": {
        "hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
        "encoder_hidden_size": 32, "vocab_size": 32, "codebook_size": 32, "in_channels": 32,
        "num_res_blocks": 1,
        "block_out_channels": 32, "block_num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "sample_size": 16,
    },
    "StableAudioProjectionModel": {
        "text_encoder_dim": 32, "conditioning_dim": 16, "min_value": 0, "max_value": 32,
    },
    # ------------------------------------------------------------ ControlNets and adapters
    "ControlNetModel": {
        **UNETS, "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (8, 8),
    },
    "ControlNetUnionModel": {
        **UNETS, "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (8, 8), "num_control_type": 6, "num_trans_channel": 32,
        "num_trans_head": 2,
    },
    "ControlNetXSAdapter": {
        "block_out_channels": (8, 8), "base_block_out_channels": (32, 32), "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "sample_size": 16,
        "max_norm_num_groups": 4,
        "conditioning_embedding_out_channels": (8, 8), "num_attention_heads": 2, "upcast_attention": False,
        "use_linear_projection": False,
    },
    "SparseControlNetModel": {
        **UNETS, "attention_head_dim": 8, "conditioning_channels": 3,
        "conditioning_embedding_out_channels": (8, 8),
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"), "motion_num_attention_heads": 2,
        "use_simplified_condition_embedding": False,
    },
    "T2IAdapter": {"channels": [32, 32], "num_res_blocks": 1, "downscale_factor": 2},
    "FluxControlNetModel": FLUX,
    "SD3ControlNetModel": SD3,
    "SanaControlNetModel": {**SANA, "num_layers": 1},
    "QwenImageControlNetModel": QWEN,
    "HunyuanDiT2DControlNetModel": {**HUNYUAN_DIT, "transformer_num_layers": 4},
    "CosmosControlNetModel": {
        **HEADS, "n_controlnet_blocks": 2, "in_channels": 6, "latent_channels": 6, "model_channels": 32,
        "mlp_ratio": 2, "text_embed_dim": 32, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
        "rope_scale": (2.0, 1.0, 1.0), "extra_pos_embed_type": "learnable",
    },
    "ZImageControlNetModel": {
        **Z_IMAGE, "control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4,
    },
    # ------------------------------------------------------------ transformers for images
    "AuraFlowTransformer2DModel": {
        **HEADS, **IN_OUT, "sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
        "caption_projection_dim": 32, "joint_attention_dim": 32, "pos_embed_max_size": 64,
    },
    "BriaTransformer2DModel": {**TOKENS, **ROPE, "pooled_projection_dim": None},
    "BriaFiboTransformer2DModel": {
        **TOKENS, **ROPE, "in_channels": 4, "joint_attention_dim": 64, "text_encoder_dim": 32,
        "pooled_projection_dim": None,
    },
    "ChromaTransformer2DModel": {
        **TOKENS, **ROPE, "approximator_hidden_dim": 32, "approximator_layers": 1,
        "approximator_num_channels": 16,
    },
    "CogView3PlusTransformer2DModel": {
        **HEADS, **IN_OUT, "num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 2,
        "pos_embed_max_size": 16, "sample_size": 16,
    },
    "CogView4Transformer2DModel": {
        **HEADS, **IN_OUT, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4,
    },
    "DiTTransformer2DModel": {**HEADS, "num_layers": 2, "out_channels": 8, "sample_size": 16},
    "ErnieImageTransformer2DModel": {
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32,
        "in_channels": 16,
        "out_channels": 16, "text_in_dim": 32, "rope_axes_dim": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {
        **HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 96,
        "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
    },
    "FluxTransformer2DModel": {**FLUX, "guidance_embeds": False},
    "GlmImageTransformer2DModel": {
        **HEADS, **IN_OUT, "num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 128,
    },
    "HiDreamImageTransformer2DModel": {
        **HEADS, **IN_OUT, "patch_size": 2, "num_layers": 1, "num_single_layers": 1,
        "caption_channels": [32, 32],
        "text_emb_dim": 64, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 4, 4),
        "max_resolution": (32, 32), "llama_layers": (0, 1),
    },
    "HunyuanDiT2DModel": {**HUNYUAN_DIT, "num_layers": 4},
    "HunyuanImageTransformer2DModel": {
        **HEADS, **IN_OUT, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
        "patch_size": (1, 1), "guidance_embeds": False, "text_embed_dim": 32, "text_embed_2_dim": 32,
        "rope_axes_dim": (8, 8),
    },
    "Krea2Transformer2DModel": {
        **HEADS, "in_channels": 16, "num_layers": 2, "num_key_value_heads": 2, "intermediate_size": 32,
        "timestep_embed_dim": 8, "text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1, "text_intermediate_size": 32, "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1, "axes_dims_rope": (8, 4, 4),
    },
    "LongCatImageTransformer2DModel": {**FLUX},
    "Lumina2Transformer2DModel": {
        "sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (8, 4, 4),
        "cap_feat_dim": 32,
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
        "num_kv_heads": 2, "multiple_of": 16, "cross_attention_dim": 32, "learn_sigma": True,
    },
    "NucleusMoEImageTransformer2DModel": {
        **QWEN, "num_key_value_heads": 2, "axes_dims_rope": (8, 4, 4), "moe_enabled": False,
        "capacity_factors": [8.0, 8.0],
    },
    "OmniGenTransformer2DModel": {
        "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
        "num_layers": 1, "in_channels": 4, "time_step_dim": 4,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    },
    "OvisImageTransformer2DModel": {**TOKENS, **ROPE, "out_channels": 16},
    "PixArtTransformer2DModel": {
        **HEADS, "num_layers": 2, "sample_size": 16, "cross_attention_dim": 32, "caption_channels": 32,
        "use_additional_conditions": False,
    },
    "PRXTransformer2DModel": {
        "in_channels": 4, "patch_size": 1, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1, "axes_dim": [8, 8],
    },
    "QwenImageTransformer2DModel": QWEN,
    "QwenImage21Transformer2DModel": {
        **HEADS, "in_channels": 16, "out_channels": 16, "num_layers": 1, "context_in_dim": 32, **ROPE,
    },
    "SanaTransformer2DModel": SANA,
    "SD3Transformer2DModel": SD3,
    "ZImageTransformer2DModel": {
        **Z_IMAGE, "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "n_layers": 2,
        "cap_feat_dim": 32, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
    },
    # ------------------------------------------------------------ transformers for videos
    "AllegroTransformer3DModel": {
        **HEADS, **IN_OUT, "num_layers": 1, "cross_attention_dim": 32, "sample_width": 4, "sample_height": 4,
        "sample_frames": 2, "caption_channels": 32, "attention_head_dim": 24,
    },
    "ChronoEditTransformer3DModel": WAN,
    "CogVideoXTransformer3DModel": COGVIDEO,
    "CosmosTransformer3DModel": {**COSMOS, "in_channels": 4, "concat_padding_mask": True},
    "EasyAnimateTransformer3DModel": {
        **HEADS, **IN_OUT, "time_embed_dim": 8, "text_embed_dim": 32, "num_layers": 1, "sample_width": 4,
        "sample_height": 4, "patch_size": 2,
    },
    "HeliosTransformer3DModel": {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"},
    "rope_dim": (4, 6, 6), "has_multi_term_memory_patch": True},
    "HunyuanVideoTransformer3DModel": HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 32,
                                                "has_clean_x_embedder": True},
    "HunyuanVideo15Transformer3DModel": {
        **HEADS, "in_channels": 9, "out_channels": 4, "num_layers": 1, "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 32, "text_embed_2_dim": 32,
        "image_embed_dim": 16,
        "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v",
    },
    "JoyImageEditTransformer3DModel": {
        "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 32, "num_layers": 1,
        "rope_dim_list": [4, 6, 6],
    },
    "JoyImageEditPlusTransformer3DModel": {
        "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 32, "num_layers": 1,
        "rope_dim_list": [4, 6, 6],
    },
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 16, "out_visual_dim": 4,
        "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
        "visual_cond": False, "attention_type": "regular",
    },
    "LatteTransformer3DModel": {
        **HEADS, "sample_size": 16, "num_layers": 1, "patch_size": 2, "caption_channels": 32,
        "in_channels": 4,
        "cross_attention_dim": 32, "out_channels": 8, "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
        "norm_eps": 1e-6, "video_length": 2,
    },
    "LTXVideoTransformer3DModel": {
        **HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 2,
        "caption_channels": 32,
    },
    "LTX2VideoTransformer3DModel": {
        **HEADS, **IN_OUT, "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
        "num_layers": 1, "caption_channels": 32, "rope_double_precision": False, "rope_type": "split",
    },
    "MochiTransformer3DModel": {
        **HEADS, "patch_size": 2, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 12,
        "text_embed_dim": 32, "time_embed_dim": 4, "max_sequence_length": 16,
    },
    "MotifVideoTransformer3DModel": {
        **HEADS, "in_channels": 9, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1, "text_embed_dim": 32, "rope_axes_dim": (4, 6, 6),
    },
    "SanaVideoTransformer3DModel": {
        **SANA, "mlp_ratio": 2.0, "patch_size": (1, 2, 2), "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    },
    "SkyReelsV2Transformer3DModel": WAN,
    "AnyFlowTransformer3DModel": WAN,
    "AnyFlowFARTransformer3DModel": {**WAN, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3,
                                     "chunk_partition": (1, 1, 1)},
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 72},
    "WanAnimateTransformer3DModel": {
        **WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 32, "motion_encoder_size": 16,
        "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        "motion_encoder_channel_sizes": {str(2**n): 8 for n in range(2, 11)},
    },
    # ------------------------------------------------------------ transformers for sound
    "StableAudioDiTModel": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "num_key_value_attention_heads": 2, "cross_attention_dim": 16,
        "cross_attention_input_dim": 16, "time_proj_dim": 8, "global_states_input_dim": 32,
    },
    "AudioLDM2UNet2DConditionModel": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16,
        **IN_OUT,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": (8, 16),
    },
    # ------------------------------------------------------------ autoencoders
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": {**KL, "latent_channels": 4},
    "VQModel": {**KL, "latent_channels": 4, "vq_embed_dim": 4},
    "AsymmetricAutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "down_block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "up_block_out_channels": (8, 16),
        "layers_per_up_block": 1,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1), "latent_channels": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 4, "encoder_block_types": ("ResBlock",
        "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)), "scaling_factor": 0.4, "decoder_norm_types": "rms_norm",
        "upsample_block_type": "interpolate", "downsample_block_type": "conv",
    },
    "AutoencoderKLWan": WAN_VAE,
    "AutoencoderKLQwenImage": WAN_VAE,
    "AutoencoderKLQwenImage21": {**WAN_VAE, "decoder_base_dim": 8},
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
    },
    "AutoencoderKLHunyuanVideo": {**VIDEO_VAE, "norm_num_groups": 4},
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2, "downsample_match_channel": False, "upsample_match_channel": False,
    },
    "AutoencoderKLHunyuanImage": {
        "latent_channels": 4, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1,
        "scaling_factor": 0.5,
        "spatial_compression_ratio": 8, "sample_size": 32, "in_channels": 3, "out_channels": 3,
    },
    "AutoencoderKLCogVideoX": {
        **VIDEO_VAE, "norm_num_groups": 2, "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    },
    "AutoencoderKLAllegro": {
        **VIDEO_VAE, "norm_num_groups": 2, "down_block_types": ("AllegroDownBlock3D",) * 4,
        "up_block_types": ("AllegroUpBlock3D",) * 4, "temporal_compression_ratio": 4,
    },
    "AutoencoderKLMagvit": {**VIDEO_VAE, "norm_num_groups": 2, "spatial_group_norm": False},
    "AutoencoderKLMochi": {
        "latent_channels": 12, "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
    },
    "AutoencoderKLTemporalDecoder": {
        "block_out_channels": (32, 32), "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
    },
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": (8,) * 4, "decode_block_out_channels": (8,) * 4,
        "attention_resolutions": (8,), "resolution": 64, "num_layers": 1, "patch_size": 4,
        "scaling_factor": 1.0,
        "spatial_compression_ratio": 4, "temporal_compression_ratio": 4,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 4, "block_out_channels": (8,), "decoder_block_out_channels": (8,), "patch_size": 1,
        "layers_per_block": (1,), "decoder_layers_per_block": (1, 1), "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,), "decoder_inject_noise": (False, False),
        "upsample_factor": (1,),
        "downsample_type": ("spatial",), "upsample_residual": (False,), "encoder_causal": True,
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": None, "resolution": 32,
        "latent_channels": 2, "mel_bins": 8, "mid_block_add_attention": False,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1,
    },
    "LTX2Vocoder": {
        "in_channels": 16, "hidden_channels": 32, "upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2],
        "resnet_kernel_sizes": [3], "resnet_dilations": [[1]], "output_sampling_rate": 16000,
    },
    "LTX2TextConnectors": {
        "caption_channels": 32, "text_proj_in_factor": 1, "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": 16, "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": None, "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 16, "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None, "connector_rope_base_seq_len": 32,
        "rope_double_precision": False, "rope_type": "split",
    },
    "LTX2LatentUpsamplerModel": {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1},
    "AutoencoderOobleck": {
        "encoder_hidden_size": 6, "downsampling_ratios": [1, 2], "decoder_channels": 3,
        "decoder_input_channels": 4,
        "audio_channels": 2, "channel_multiples": [2, 4], "sampling_rate": 16,
    },
}  # fmt: skip
"""Options by the name of the class."""

PRIVATE = {"LTX2TextConnectors": "ltx2.connectors", "LTX2Vocoder": "ltx2.vocoder",
           "LTX2LatentUpsamplerModel": "ltx2.latent_upsampler",
           "WuerstchenPrior": "deprecated.wuerstchen.modeling_wuerstchen_prior",
           "WuerstchenDiffNeXt": "deprecated.wuerstchen.modeling_wuerstchen_diffnext",
           "PaellaVQModel": "deprecated.wuerstchen.modeling_paella_vq_model",
           "StableAudioProjectionModel": "stable_audio.modeling_stable_audio"}  # fmt: skip
"""The modules of classes that diffusers does not export."""


def make(name: str, **options: Any) -> nn.Module:
    """A tiny network; its options are those of ``NETWORKS`` with some replaced."""
    return _class(name)(**{**NETWORKS[name], **options})


def _class(name: str) -> Any:
    """A model class of diffusers, some of which only their pipelines export."""
    if (cls := getattr(diffusers, name, None)) is not None:
        return cls
    return getattr(importlib.import_module(f"diffusers.pipelines.{PRIVATE[name]}"), name)

"""Text and picture encoders of the larger families, with a few features and a vocabulary of bytes."""

from typing import Any

import tokenizers
import transformers
from torch import nn

from tiny.text import WORDS, bpe, bytes_alphabet

__all__ = [
    "VISION",
    "bert",
    "byte_tokenizer",
    "clip_vision",
    "decoder",
    "multilingual_clip",
    "qwen_processor",
    "qwen_vl",
    "siglip_vision",
    "vocoder",
]

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "max_position_embeddings": 1024,
}  # fmt: skip


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
"""A picture encoder for 32 x 32 pictures in 4 x 4 patches."""


def byte_tokenizer(length: int = 512) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that knows ``WORDS``, with a template for chats."""
    parts = bpe(bytes_alphabet(), [list("Ġ" + word) for word in WORDS.split()], SPECIAL)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=parts["vocab"], merges=parts["merges"]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=SPECIAL[0], eos_token=SPECIAL[0], bos_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:], model_max_length=length, chat_template=CHAT,
    )  # fmt: skip


def decoder(name: str, model: str = "Model", **options: Any) -> nn.Module:
    """A language model of the transformers library without a head, such as ``decoder("Qwen3")``."""
    config = getattr(transformers, f"{name}Config")(
        **{**TEXT, "vocab_size": len(byte_tokenizer()), **options}
    )
    return getattr(transformers, f"{name}{model}")(config)


def clip_vision(model: str = "CLIPVisionModelWithProjection", **options: Any) -> nn.Module:
    """A CLIP picture encoder for 32 x 32 pictures in 4 x 4 patches."""
    config = transformers.CLIPVisionConfig(**{**VISION, "projection_dim": 32, **options})
    return getattr(transformers, model)(config)


def bert() -> nn.Module:
    """The text encoder of HunyuanDiT and EasyAnimate."""
    config = transformers.BertConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.BertModel(config)


def vocoder() -> nn.Module:
    """Spectrograms with 8 bands to sound."""
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )  # fmt: skip
    return transformers.SpeechT5HifiGan(config)


def multilingual_clip() -> nn.Module:
    """The text encoder of Kandinsky 2.1."""
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=32, transformerDimensions=32, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_hidden_layers=2, vocab_size=len(byte_tokenizer()),
    )  # fmt: skip
    return MultilingualCLIP(config)


def qwen_vl(name: str, model: str = "ForConditionalGeneration") -> nn.Module:
    """A Qwen model that reads pictures, such as ``qwen_vl("Qwen3VL")``, for `qwen_processor`."""
    tokens = byte_tokenizer()
    ids = {
        key: tokens.convert_tokens_to_ids(f"<|{token}|>")
        for key, token in {
            "image_token_id": "image_pad",
            "vision_start_token_id": "vision_start",
            "vision_end_token_id": "vision_end",
        }.items()
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    if name == "Qwen3VL":
        vision |= {"deepstack_visual_indexes": [0]}
    text = {**TEXT, "vocab_size": len(tokens), "rope_parameters": rope}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, f"{name}{model}")(config)


def qwen_processor(name: str) -> Any:
    """The processor of pictures and text for `qwen_vl`, such as ``qwen_processor("Qwen2VL")``."""
    tokens = byte_tokenizer(4096)
    images = transformers.Qwen2VLImageProcessor(min_pixels=256, max_pixels=4096, patch_size=8, merge_size=2)
    return getattr(transformers, f"{name}Processor")(
        image_processor=images, tokenizer=tokens, video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=CHAT,
    )  # fmt: skip


def siglip_vision() -> nn.Module:
    """The picture encoder of FramePack and HunyuanVideo 1.5."""
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))

"""Tokenizers and text encoders that are made in memory, with a vocabulary of a few words."""

import itertools
from typing import Any

import transformers
from torch import nn

WORDS = "a photo of the red green boot dress blur"
MAX_LENGTH = 16
QWEN_TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n"
)


def bytes_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = itertools.count(256)
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


def merges_of(words: list[list[str]]) -> list[tuple[str, str]]:
    """BPE merges that build each word from its symbols, from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for first, *rest in words:
        for symbol in rest:
            merges[first, symbol] = None
            first += symbol
    return list(merges)


def bpe(symbols: list[str], words: list[list[str]], special: list[str]) -> dict[str, Any]:
    """Vocabulary and merges, as the tokenizers take them."""
    merges = merges_of(words)
    tokens = dict.fromkeys([*special, *symbols, *(a + b for a, b in merges)])
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def clip_tokenizer(length: int = MAX_LENGTH) -> transformers.CLIPTokenizer:
    """Byte-level BPE that knows ``WORDS`` and can spell everything else."""
    alphabet = bytes_alphabet()
    words = [[*word[:-1], word[-1] + "</w>"] for word in WORDS.split()]
    model = bpe([*alphabet, *(b + "</w>" for b in alphabet)], words, ["<|startoftext|>", "<|endoftext|>"])
    return transformers.CLIPTokenizer(**model, model_max_length=length)


def clip_text(projection: bool = False, length: int = MAX_LENGTH, dim: int = 32) -> nn.Module:
    """A CLIP text encoder for :func:`clip_tokenizer`."""
    tokens = clip_tokenizer(length)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=dim, intermediate_size=dim, projection_dim=dim,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=length,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def clip(suffix: str = "", projection: bool = False, length: int = MAX_LENGTH) -> dict[str, Any]:
    """The two components ``tokenizer`` and ``text_encoder``, with a suffix."""
    return {
        f"tokenizer{suffix}": clip_tokenizer(length),
        f"text_encoder{suffix}": clip_text(projection, length),
    }


def t5(suffix: str = "", encoder: str = "T5", words: int = 0) -> dict[str, Any]:
    """The two components ``tokenizer`` and ``text_encoder`` of the T5 family, for so many words at least."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in dict.fromkeys(WORDS.split()))]
    letters = [chr(c) for c in range(33, 127)]
    vocab = [(piece, -float(i)) for i, piece in enumerate([*pieces, *letters])]
    tokens = transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_LENGTH)
    config = getattr(transformers, f"{encoder}Config")(
        vocab_size=max(words, len(vocab)), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return {
        f"tokenizer{suffix}": tokens,
        f"text_encoder{suffix}": getattr(transformers, f"{encoder}EncoderModel")(config),
    }


def gemma2() -> dict[str, Any]:
    """The text components of Sana."""
    symbols = ["▁", *(chr(c) for c in range(33, 127))]
    words = [[*word, "▁"] for word in WORDS.split()]
    tokens = transformers.GemmaTokenizer(
        **bpe(symbols, words, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]), model_max_length=MAX_LENGTH
    )
    config = transformers.Gemma2Config(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    return {"tokenizer": tokens, "text_encoder": transformers.Gemma2Model(config)}


def llama() -> dict[str, Any]:
    """The first text components of HunyuanVideo."""
    symbols = ["▁", *(chr(c) for c in range(33, 127))]
    words = [["▁", *word] for word in WORDS.split()]
    tokens = transformers.LlamaTokenizer(**bpe(symbols, words, ["<unk>", "<s>", "</s>"]), pad_token="</s>")
    config = transformers.LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return {"tokenizer": tokens, "text_encoder": transformers.LlamaModel(config)}


def clap() -> dict[str, Any]:
    """The text components of MusicLDM, able to be saved, not to encode (that needs all of CLAP)."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    config = transformers.ClapTextConfig(
        vocab_size=261, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return {
        "tokenizer": transformers.RobertaTokenizer(**bpe(bytes_alphabet(), [], special)),
        "text_encoder": transformers.ClapTextModelWithProjection(config),
        "feature_extractor": transformers.ClapFeatureExtractor(),
    }


def qwen2_5_vl() -> dict[str, Any]:
    """The text components of QwenImage."""
    alphabet = bytes_alphabet()
    words = [list("Ġ" + word) for word in [*WORDS.split(), *QWEN_TEMPLATE.replace(",", "").split()]]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = transformers.Qwen2Tokenizer(**bpe(alphabet, words, special))
    tokens.add_special_tokens({"additional_special_tokens": special[1:]})
    text = {
        "vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return {"tokenizer": tokens, "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config)}

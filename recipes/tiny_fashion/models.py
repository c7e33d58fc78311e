"""The networks of the tiny-fashion pipelines, new or from a pipeline folder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffaccel.errors import ModelError
from diffaccel.eval.classifier import FashionClassifier, load_classifier
from diffaccel.pipelines import MARScheduler, MARTransformer2DModel
from diffaccel.zoo import load_pipeline
from diffaccel.zoo.fashion import CLASSES, COLORS, LABELS
from recipes.tiny_fashion.config import Config

__all__ = [
    "Networks",
    "build",
    "ddim",
    "dit",
    "flow_dpm",
    "load_vae",
    "mar",
    "mar_scheduler",
    "text_encoder",
    "tokenizer",
    "unet",
    "vae",
]

Networks = dict[str, Any]  # modules by their name in the pipeline
ZOO = {
    "unet": "tiny-fashion-sd",
    "dit": "tiny-fashion-dit",
    "mar": "tiny-fashion-mar",
    "vae": "tiny-fashion-sd",
    "decoder": "tiny-fashion-sd",
}
NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=8, num_attention_heads=3,
        attention_head_dim=64, num_embeds_ada_norm=1000,
    )  # fmt: skip


def mar() -> MARTransformer2DModel:
    return MARTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_classes=len(LABELS), num_attention_heads=4,
        attention_head_dim=32, num_encoder_layers=4, num_decoder_layers=3, num_buffer_tokens=8,
        head_width=192, head_layers=4, learned_variance=False,
    )  # fmt: skip


def mar_scheduler() -> MARScheduler:
    return MARScheduler(variance_type="small")


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32, in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1,
        norm_num_groups=8, block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, mid_block_add_attention=False,
    )  # fmt: skip


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def flow_dpm() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )


def tokenizer() -> CLIPTokenizer:
    """Returns a byte-level tokenizer for the words of the captions.

    Merges of one word can cut up a later one ("sandal" becomes five tokens, because "an" of "ankle" comes
    first); the shipped text encoder has learned these tokens, so they stay.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + i) for i in range(256 - len(printable))]  # stand for the remaining bytes, as in CLIP
    letters = [*map(chr, printable), *others]
    vocabulary = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])  # an ordered set
    merges: dict[tuple[str, str], None] = {}
    words = {"a", "photo", "of", "the", "picture", "-"}
    words.update(word for name in (*CLASSES, *COLORS) for word in name.replace("-", " ").split())
    for word in sorted(words):
        head, *tail = [*word[:-1], word[-1] + "</w>"]
        for part in tail:  # merge from the left
            merges[head, part] = None
            head += part
            vocabulary[head] = None
    vocabulary.update({"<|startoftext|>": None, "<|endoftext|>": None})
    ids = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=list(merges), model_max_length=16)


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), max_position_embeddings=words.model_max_length, hidden_size=64,
            intermediate_size=128, projection_dim=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip


def load_vae(source: str) -> AutoencoderKL:
    """Loads an autoencoder from the zoo ("zoo"), a pipeline, or a folder of its own."""
    if not (Path(source) / "config.json").is_file():
        return _component(load_pipeline(ZOO["vae"] if source == "zoo" else source), "vae", source)
    try:
        return AutoencoderKL.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load an AutoencoderKL from {source!r}: {error}") from error


def build(config: Config) -> Networks:
    """Returns the networks that ``config.target`` trains, with their first weights.

    They are in evaluation mode, and stay so but for the classifier: nothing has dropout, except that DiT
    would drop labels, in each block on its own and out of reach of our generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        networks = _new(config) if config.init == "scratch" else _loaded(config)
    for network in networks.values():
        network.eval().requires_grad_(True)
    if config.target == "decoder":
        networks["vae"].encoder.requires_grad_(False)
        networks["vae"].quant_conv.requires_grad_(False)
    return networks


def _new(config: Config) -> Networks:
    if config.target == "unet":
        return {"unet": unet(), "text_encoder": text_encoder(tokenizer())}
    if config.target == "dit":
        return {"transformer": dit()}
    if config.target == "mar":
        return {"transformer": mar()}
    if config.target == "classifier":
        return {"classifier": FashionClassifier()}
    new = vae()
    if config.target == "decoder":
        old = load_vae(config.vae)
        old.decoder, old.post_quant_conv = new.decoder, new.post_quant_conv
        new = old
    return {"vae": new}


def _loaded(config: Config) -> Networks:
    if config.target == "classifier":
        return {"classifier": load_classifier(None if config.init == "zoo" else config.init)}
    source = ZOO[config.target] if config.init == "zoo" else config.init
    others = {"unet": ("unet", "text_encoder"), "dit": ("transformer",), "mar": ("transformer",)}
    names = others.get(config.target, ("vae",))
    if names == ("vae",):
        return {"vae": load_vae(source)}
    pipe = load_pipeline(source)
    return {name: _component(pipe, name, source) for name in names}


def _component(pipe: object, name: str, source: str) -> nn.Module:
    network = getattr(pipe, name, None)
    if not isinstance(network, nn.Module):
        raise ModelError(f"the pipeline {source!r} has no {name}; it is a {type(pipe).__name__}")
    return network

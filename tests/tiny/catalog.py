"""Every pipeline class of diffusers, as a tiny instance with random weights, and the arguments of a call.

A component is made from the annotation of the constructor's parameter, with the options of `tiny.networks`;
recipes say what a family of pipelines needs besides.  What cannot be made is an error that says why.
"""

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from diffaccel.pipelines import MARScheduler
from tiny import recipes_image, recipes_unet, recipes_video
from tiny.encoders import (
    bert,
    byte_tokenizer,
    clip_vision,
    decoder,
    qwen_processor,
    qwen_vl,
    siglip_vision,
    vocoder,
)
from tiny.networks import NETWORKS, make
from tiny.recipe import CALL, OMIT, NotBuilt, Recipe, scheduler
from tiny.text import clap, clip_text, clip_tokenizer, gemma2, llama, qwen2_5_vl, t5

__all__ = ["NotBuilt", "arguments", "build", "pipelines", "recipe_of"]

RECIPES = (*recipes_unet.RECIPES, *recipes_image.RECIPES, *recipes_video.RECIPES)

OTHERS: dict[str, Callable[[], Any]] = {
    "AutoTokenizer": byte_tokenizer,
    "BertModel": bert,
    "BertTokenizer": byte_tokenizer,
    "ByT5Tokenizer": transformers.ByT5Tokenizer,
    "CLIPImageProcessor": lambda: transformers.CLIPImageProcessor(size=32, crop_size=32),
    "CLIPTextModel": clip_text,
    "CLIPTextModelWithProjection": lambda: clip_text(projection=True),
    "CLIPTokenizer": clip_tokenizer,
    "CLIPVisionModel": lambda: clip_vision("CLIPVisionModel"),
    "CLIPVisionModelWithProjection": clip_vision,
    "ClapTextModelWithProjection": lambda: clap()["text_encoder"],
    "Gemma2PreTrainedModel": lambda: gemma2()["text_encoder"],
    "GemmaPreTrainedModel": lambda: decoder("Gemma"),
    "GemmaTokenizer": lambda: gemma2()["tokenizer"],
    "GlmModel": lambda: decoder("Glm"),
    "LlamaForCausalLM": lambda: decoder("Llama", "ForCausalLM"),
    "LlamaModel": lambda: llama()["text_encoder"],
    "LlamaTokenizer": lambda: llama()["tokenizer"],
    "Qwen2Tokenizer": lambda: qwen2_5_vl()["tokenizer"],
    "Qwen2_5_VLForConditionalGeneration": lambda: qwen2_5_vl()["text_encoder"],
    "Qwen2VLProcessor": lambda: qwen_processor("Qwen2VL"),
    "Qwen3VLForConditionalGeneration": lambda: qwen_vl("Qwen3VL"),
    "Qwen3VLModel": lambda: qwen_vl("Qwen3VL", "Model"),
    "Qwen3VLProcessor": lambda: qwen_processor("Qwen3VL"),
    "Qwen3ForCausalLM": lambda: decoder("Qwen3", "ForCausalLM"),
    "Qwen3Model": lambda: decoder("Qwen3"),
    "SchedulerMixin": lambda: scheduler("DDIMScheduler"),
    "SiglipImageProcessor": lambda: transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    "SiglipVisionModel": siglip_vision,
    "SmolLM3ForCausalLM": lambda: decoder("SmolLM3", "ForCausalLM"),
    "SpeechT5HifiGan": vocoder,
    "T5EncoderModel": lambda: t5()["text_encoder"],
    "T5Tokenizer": lambda: t5()["tokenizer"],
    "T5TokenizerFast": lambda: t5()["tokenizer"],
    "UMT5EncoderModel": lambda: t5("", "UMT5")["text_encoder"],
}
"""What is no model of diffusers, by the name of the class."""

UNUSED = {
    "safety_checker": None, "requires_safety_checker": False, "add_watermarker": False, "watermarker": None,
}  # fmt: skip


def pipelines() -> dict[str, type[DiffusionPipeline]]:
    """All pipeline classes that diffusers exports, by name."""
    found = {}
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and issubclass(cls, DiffusionPipeline) and cls is not DiffusionPipeline:
            found[name] = cls
    return found


def recipe_of(name: str) -> Recipe:
    """All recipes whose patterns the name of a class matches, as one; the later ones count."""
    parts: dict[str, Any] = dict(UNUSED)
    call: dict[str, Any] = {}
    before, refused = None, ""
    for recipe in RECIPES:
        if re.search(recipe.pattern, name):
            for key, value in recipe.parts.items():
                both = isinstance(value, dict) and isinstance(parts.get(key), dict)
                parts[key] = {**parts[key], **value} if both else value
            call |= recipe.call
            before, refused = recipe.before or before, recipe.refused or refused
    return Recipe(name, parts, call, before, refused)


def build(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    """A new pipeline of a class, always with the same weights.

    Raises:
        NotBuilt: If a component is not known here.
    """
    recipe = recipe_of(cls.__name__)
    if recipe.refused:
        raise NotBuilt(recipe.refused)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _built(cls, recipe)


def _built(cls: type[DiffusionPipeline], recipe: Recipe) -> DiffusionPipeline:
    parts = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        given = recipe.parts.get(name, OMIT)
        if isinstance(given, dict) or (given is OMIT and parameter.default is parameter.empty):
            parts[name] = _component(name, parameter.annotation, {} if given is OMIT else given)
        elif given is not OMIT:
            parts[name] = given() if callable(given) else given
    pipe = cls(**parts)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
            for weight in component.parameters():
                if weight.ndim > 1 and not weight.any():  # what a training would begin with
                    nn.init.normal_(weight, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    if recipe.before is not None:
        recipe.before(pipe)
    return pipe


def _component(name: str, annotation: Any, options: dict[str, Any]) -> Any:
    classes = _classes(annotation)
    for cls in classes:
        if cls in NETWORKS:
            return make(cls, **options)
        if cls in OTHERS and not options:
            return OTHERS[cls]()
        if cls == "MARScheduler":
            return MARScheduler(**options)
        if cls.endswith("Scheduler"):
            return scheduler(cls, **options)
        if cls in ("BaseGuidance", "ClassifierFreeGuidance"):
            return diffusers.ClassifierFreeGuidance(**options)
        if cls == "KarrasDiffusionSchedulers":
            return scheduler("DDIMScheduler", **options)
    raise NotBuilt(f"{name}: no tiny {' or '.join(classes) or annotation}")


def _classes(annotation: Any) -> list[str]:
    """The names of the classes in an annotation, in order."""
    inner = [item for part in typing.get_args(annotation) for item in _classes(part)]
    if inner or annotation is type(None):
        return inner
    return [annotation.__name__] if isinstance(annotation, type) else [str(annotation)]


def arguments(cls: type[DiffusionPipeline]) -> dict[str, Any]:
    """The arguments of a call, without the number of steps and the generator."""
    parameters = inspect.signature(cls.__call__).parameters
    call = {**CALL, **recipe_of(cls.__name__).call}
    given = {name: value for name, value in call.items() if name in parameters and value is not OMIT}
    return {name: value() if callable(value) else value for name, value in given.items()}

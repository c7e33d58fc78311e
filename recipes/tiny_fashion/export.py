"""A run as an ordinary diffusers folder, which stock ``from_pretrained`` loads, or one of the classifier."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTPipeline, StableDiffusionPipeline

from diffaccel.errors import ModelError
from diffaccel.files import whole_folder
from diffaccel.pipelines import MARPipeline
from diffaccel.zoo import load_pipeline
from diffaccel.zoo.fashion import ID2LABEL
from diffaccel.zoo.folders import quiet
from recipes.tiny_fashion import checkpoint, config, data, models

__all__ = ["export"]

HALF = ("unet", "transformer", "vae")


def export(source: Path, out: Path, base: str = "tiny-fashion-sd", overwrite: bool = False) -> str:
    """Writes the averaged weights of a run as a pipeline, through a temporary folder, and says what it wrote.

    A "vae" run becomes a folder with the autoencoder alone: the denoisers of the zoo cannot use its latents.
    A "classifier" run becomes one that ``diffaccel.eval.classifier.load_classifier`` reads.

    Arguments:
        source: The run folder, or one of its checkpoints.
        out: The folder to write.
        base: The pipeline that receives a trained decoder.
        overwrite: Whether to replace an existing folder.
    """
    if out.exists() and not overwrite:
        raise ModelError(f"{str(out)!r} exists; give another --out, or --overwrite")
    state = checkpoint.read(source)
    settings = config.merge(config.Config(), state["config"])
    networks = models.build(config.merge(settings, {"init": "scratch"}))
    for name, network in networks.items():
        network.load_state_dict(state["average"][name])
    if settings.target == "vae":
        model = networks["vae"]
        _scale(model, settings.data)
        parts = {"vae": model}
    elif settings.target == "classifier":
        parts = networks
        model = networks["classifier"]
    else:
        model = _pipeline(settings, networks, base)
        parts = {name: part for name, part in model.components.items() if name in HALF}
    for part in parts.values():
        torch.nn.Module.to(part, torch.float16)  # that of diffusers warns
    _publish(model.save_pretrained, out, {"images": state["images"], "config": state["config"]})
    what = f"{type(model).__name__} ({', '.join(parts)} in float16)"
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return f"wrote {what}, trained on {state['images']:,} images, to {out} ({size / 1e6:.1f} MB)"


def _pipeline(settings: config.Config, networks: models.Networks, base: str) -> DiffusionPipeline:
    if settings.target == "decoder":
        pipe = load_pipeline(base)
        if not hasattr(pipe, "vae"):
            raise ModelError(f"the pipeline {base!r} has no vae; it is a {type(pipe).__name__}")
        scale = networks["vae"].config.scaling_factor
        if pipe.vae.config.scaling_factor != scale:
            raise ModelError(
                f"{base!r} has other latents: scaling factor {pipe.vae.config.scaling_factor}, not {scale}"
            )
        pipe.vae = networks["vae"]
        return pipe
    vae = models.load_vae(settings.vae)
    if settings.target == "dit":
        return DiTPipeline(networks["transformer"], vae, models.flow_dpm())
    if settings.target == "mar":
        return MARPipeline(networks["transformer"], models.mar_scheduler(), vae, ID2LABEL)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=networks["text_encoder"], tokenizer=models.tokenizer(), unet=networks["unet"],
        scheduler=models.ddim(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def _scale(vae: Any, folder: str) -> None:
    """Sets the scaling factor that gives the latents of colored images a standard deviation of 1."""
    stream = data.Stream(data.load("train", folder), torch.Generator().manual_seed(0))
    latents = [vae.encode(stream.next(250).images).latent_dist.mode() for _ in range(8)]
    vae.register_to_config(scaling_factor=1 / torch.cat(latents).std().item())


def _publish(write: Callable[[Path], object], out: Path, record: dict[str, Any]) -> None:
    with whole_folder(out) as temporary:
        with quiet([]):
            write(temporary)
        for file in temporary.rglob("*.json"):
            _amend(file)
        checkpoint.replace_text(temporary / "training.json", json.dumps(record, indent=2) + "\n")


def _amend(file: Path) -> None:
    """Removes the paths of this machine, and adds the label names, which DiTPipeline does not save."""
    content = json.loads(file.read_text(encoding="utf-8"))
    changed = content.pop("_name_or_path", None) is not None
    if file.name == "model_index.json" and content["_class_name"] == "DiTPipeline":
        content["id2label"], changed = ID2LABEL, True
    if changed:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

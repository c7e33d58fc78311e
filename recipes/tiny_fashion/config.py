"""The settings of a run: defaults, then a YAML file, then the command line."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffaccel.errors import OptionError, closest
from recipes.tiny_fashion.data import DEBIAN_FOLDER

__all__ = ["TARGETS", "Config", "merge", "read"]

TARGETS = ("unet", "dit", "mar", "vae", "decoder", "classifier")
FIXED = ("target", "init", "seed", "vae", "device")  # without meaning once a run has begun


@dataclass(frozen=True)
class Config:
    """The settings of a run; durations are in images.

    Arguments:
        target: What is trained: "unet" (with its text encoder), "dit", "mar", "vae", the VAE's "decoder"
            alone, or the "classifier".
        init: The first weights: "scratch", "zoo", or a folder of the pipeline or classifier.
        vae: The autoencoder of the latents: "zoo", a pipeline folder or an AutoencoderKL folder.
    """

    target: str = "unet"
    init: str = "scratch"
    vae: str = "zoo"
    data: str = DEBIAN_FOLDER
    images: int = 2_400_000  # planned; the learning rate falls to final_lr at the end of them
    batch: int = 96
    lr: float = 6e-4  # the largest learning rate of AdamW
    final_lr: float = 0.02  # the last learning rate, as a part of the largest
    warmup_images: int = 20_000  # of linear rise
    flat: float = 0.5  # the part of the images before the linear fall
    weight_decay: float = 0.01
    clip: float = 1.0  # the largest norm of the gradient
    ema_images: int = 133_000  # half-life of the moving average of the weights
    null: float = 0.1  # the part of the images without a caption or label
    bf16: bool = True  # matrix products and convolutions in bfloat16
    threads: int = 1
    device: str = "cpu"
    cuda_graph: bool = False  # replay a step as one CUDA graph: steps of small networks are mostly launches
    seed: int = 0
    log_images: int = 2_000  # between two records of the training loss
    eval_images: int = 50_000  # between two records of the held-out loss
    eval_size: int = 256  # test images in the held-out loss
    save_minutes: float = 3.0  # between two checkpoints

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise OptionError(f"unknown target {self.target!r}; {closest(self.target, TARGETS)}")
        for name in ("images", "batch", "lr", "clip", "threads", "log_images", "eval_images", "eval_size"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.cuda_graph and not self.device.startswith("cuda"):
            raise OptionError(f"cuda_graph is for device=cuda, not {self.device}")
        for name in ("final_lr", "flat", "null"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("warmup_images", "weight_decay", "ema_images", "save_minutes"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name} must be 0 or more, not {getattr(self, name)}")

    def learning_rate(self, images: int) -> float:
        """Returns the learning rate of the step that begins after ``images`` images."""
        rise = min(1.0, (images + self.batch) / max(self.warmup_images, 1))
        rest = max(0.0, 1 - images / self.images)
        fall = min(1.0, rest / (1 - self.flat)) if self.flat < 1 else 1.0
        return self.lr * rise * max(self.final_lr, fall)


def read(target: str, file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Returns the settings of ``target``: its YAML file, or ``file``, and ``overrides`` above it.

    Raises:
        OptionError: If the file cannot be read, a name is unknown, or a value has a wrong type.
    """
    if target not in TARGETS:
        raise OptionError(f"unknown target {target!r}; {closest(target, TARGETS)}")
    file = file or Path(__file__).parent / f"{target}.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionError(
            f"cannot read the settings {str(file)!r}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise OptionError(f"{str(file)!r} holds a {type(content).__name__}; expected lines 'name: value'")
    return merge(merge(Config(target=target), content), overrides or {})


def merge(config: Config, changes: Mapping[str, Any], begun: bool = False) -> Config:
    """Returns ``config`` with some settings changed; those given as None stay.

    Arguments:
        config: The settings to begin with.
        changes: The new values by name.
        begun: Whether the run has begun, so that some settings cannot change.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Config)}
    values = {}
    for name, value in changes.items():
        if name not in kinds:
            raise OptionError(f"unknown setting {name!r}; {closest(str(name), kinds)}")
        if value is not None:
            values[name] = _convert(name, value, kinds[name])
            if begun and name in FIXED and values[name] != getattr(config, name):
                raise OptionError(
                    f"{name} cannot change in a run that has begun with {getattr(config, name)!r}"
                )
    return dataclasses.replace(config, **values)


def _convert(name: str, value: Any, kind: type) -> Any:
    """Converts a value of YAML, where 6e-4 is a string, to the type of its setting."""
    wrong = OptionError(f"{name} must be of type {kind.__name__}, not {value!r}")
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    if kind in (bool, str) or isinstance(value, bool):
        raise wrong
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise wrong from error
    if kind is int and number != int(number):
        raise wrong
    return kind(number)

"""The settings of a run: defaults, then a YAML file, then ``key=value`` from the command line."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError
from ..options import check_names, check_options, option
from .method import Method, method_of

__all__ = ["Config", "merge", "read"]


@dataclass(frozen=True)
class Config:
    """The settings of a run; all durations are in samples ("images") of the student.

    Arguments:
        method: The method's name.
        teacher: A name of the zoo, a pipeline folder or a hub id.
        pairs: The folder of pairs.
        run: The folder of the run.
        student: The student's first weights: "teacher", "random", "pruned" or the folder of a pipeline.
        student_changes: What the student's network has otherwise than the teacher's, as in its config.json.
        lora_rank: The rank of LoRA students, which share the teacher's weights; 0 trains all weights.
        images: The samples to train on.
        batch: The samples of an update, over all processes.
        micro_batch: The most samples computed at once by a process; 0 for all of its share.
        optimizer: A class of torch.optim, or of the library pytorch-optimizer.
        optimizer_options: Its further options.
        lr: The largest learning rate.
        warmup_images: The length of its linear rise.
        lr_decay: How it falls afterwards: "constant", "linear" or "cosine", to zero.
        clip: The largest norm of the gradient; 0 does not clip.
        ema_images: The half-life of the moving average of the weights; 0 for none.
        precision: "no", "bf16" or "fp16": mixed precision of the networks.
        gradient_checkpointing: Whether activations are computed again for the gradient.
        seed: The seed of everything.
        threads: The CPU threads; 0 leaves them.
        log_images: Between two records of the loss.
        eval_images: Between two validations.
        steps: The numbers of steps that the student is for: those of validations and of the export.
        eval_count: The samples of a validation; 0 for none.
        reference: Images or statistics for its Frechet distance; "" takes those of the zoo's models.
        protocol: The protocol of that distance.
        save_minutes: Between two checkpoints.
        keep_last: The checkpoints that are kept.
        keep_images: Between two copies of the raw weights that are kept for combination; 0 keeps none.
        keep_raw: The newest of these copies that stay; 0 for all.
        combine_budget: The evaluations of a search for their combination after the training, see `combine`;
            0 for none.
        combine_images: The images of one of them.
        tracker: A tracker of accelerate, such as "tensorboard" or "wandb"; "" for none.
        options: The options of the method.
    """

    method: str = option("rectified-flow")
    teacher: str = option("tiny-fashion-dit")
    pairs: str = option("")
    run: str = option("")
    student: str = option("teacher")
    student_changes: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int = option(0, low=0)
    images: int = option(400_000, low=1)
    batch: int = option(64, low=1)
    micro_batch: int = option(0, low=0)
    optimizer: str = option("AdamW")
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = option(2e-4, low=0.0)
    warmup_images: int = option(5_000, low=0)
    lr_decay: str = option("constant", choices=("constant", "linear", "cosine"))
    clip: float = option(1.0, low=0.0)
    ema_images: int = option(30_000, low=0)
    precision: str = option("no", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False)
    seed: int = option(0, low=0)
    threads: int = option(0, low=0)
    log_images: int = option(2_000, low=1)
    eval_images: int = option(50_000, low=1)
    steps: Sequence[int] = (1, 2, 4)
    eval_count: int = option(256, low=0)
    reference: str = option("")
    protocol: str = option("offline")
    save_minutes: float = option(3.0, low=0.0)
    keep_last: int = option(2, low=1)
    keep_images: int = option(0, low=0)
    keep_raw: int = option(0, low=0)
    combine_budget: int = option(0, low=0)
    combine_images: int = option(1000, low=2)
    tracker: str = option("")
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            OptionError: If one is of a wrong type or not allowed.
        """
        check_options(self, "the configuration")
        for name in ("student_changes", "optimizer_options", "options"):
            if not isinstance(getattr(self, name), Mapping):
                raise OptionError(f"{name} must be a mapping of names to values, not {getattr(self, name)!r}")
        steps = self.steps
        if not isinstance(steps, (list, tuple)) or not all(type(n) is int and n > 0 for n in steps):
            raise OptionError(f"steps must be a list of numbers above 0, not {steps!r}")
        if not steps or len(set(steps)) < len(steps):
            raise OptionError(f"steps must be different numbers, at least one, not {steps!r}")
        if self.eval_count == 1:
            raise OptionError("eval_count=1: the health of one image cannot be told; 0 measures nothing")
        if self.lora_rank and self.student_changes:
            raise OptionError("lora_rank and student_changes exclude each other")
        if self.combine_budget and not self.keep_images:
            raise OptionError("combine_budget needs the raw weights that keep_images=N keeps")
        self.make_method()

    def make_method(self) -> Method:
        """Returns the method with its options."""
        return method_of(self.method, self.options)

    def learning_rate(self, images: int) -> float:
        """Returns the learning rate after some images."""
        import math

        rise = min(1.0, (images + self.batch) / self.warmup_images) if self.warmup_images else 1.0
        done = min(1.0, images / self.images)
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
        return self.lr * rise * fall[self.lr_decay]


def read(file: str | Path | None, overrides: Sequence[str] = (), **fixed: Any) -> Config:
    """Returns the settings of a YAML file, some of them replaced.

    Arguments:
        file: The file, or None for the defaults.
        overrides: Texts ``key=value``, the values in YAML; ``options.density=uniform`` sets one of a mapping.
        fixed: Settings that neither may change, such as the method.

    Raises:
        OptionError: If the file is not a mapping, or a setting is unknown or not allowed.
    """
    settings: dict[str, Any] = {}
    if file is not None:
        try:
            settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise OptionError(f"cannot read {str(file)!r}: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict):
            raise OptionError(f"{str(file)!r} holds no mapping of settings")
    return merge(settings, overrides, **fixed)


def merge(settings: Mapping[str, Any], overrides: Sequence[str] = (), **fixed: Any) -> Config:
    """Returns settings, some of them replaced, as `read` does."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"{text!r} is not of the form key=value")
        outer, dot, inner = key.partition(".")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OptionError(f"the value of {text!r} is not YAML: {' '.join(str(error).split())}") from error
        if isinstance(parsed, str) and _is_number(parsed):  # YAML 1.1 takes 1e-4 for a text
            parsed = float(parsed)
        if dot:
            merged[outer] = {**(merged.get(outer) or {}), inner: parsed}
        else:
            merged[outer] = parsed
    for key, value in fixed.items():
        if merged.setdefault(key, value) != value:
            raise OptionError(f"{key} is {merged[key]!r} in the settings, but {value!r} was asked for")
    if merged.get("precision") is False:  # what YAML 1.1 takes no for
        merged["precision"] = "no"
    check_names(Config, merged, "the configuration")
    return Config(**{key: _number(value) for key, value in merged.items()})


def as_dict(config: Config) -> dict[str, Any]:
    """Returns the settings as plain data."""
    return dataclasses.asdict(dataclasses.replace(config))


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _is_number(value) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "e" in text.lower() and text.lower() not in ("inf", "nan")

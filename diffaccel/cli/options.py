"""What the commands share: reading options, opening output folders, calling a pipeline."""

import ast
import contextlib
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import DiffaccelError, OptionError, closest
from ..pipelines.run import denoisers_of

__all__ = [
    "SCHEDULERS",
    "OutputError",
    "Sampler",
    "open_output",
    "read_accel",
    "set_scheduler",
    "versions",
    "write",
]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++1s": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Short names of schedulers; any class name of diffusers is understood as well."""


class OutputError(DiffaccelError, OSError):
    """An output folder that cannot be written."""


def read_accel(text: str) -> Any:
    """Reads a stack: ``name``, ``name:preset``, ``name(option=value, ...)``, ``a+b``, or JSON.

    Raises:
        OptionError: If the text has none of these forms.
    """
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"--accel {text!r} is not valid JSON: {error}") from None
    return [_read_one(part.strip()) for part in text.split("+")]


def _read_one(text: str) -> Any:
    if "(" not in text:
        return text
    name, _, rest = text.partition("(")
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {name: {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}}
    except (SyntaxError, ValueError, AssertionError):
        raise OptionError(f"--accel {text!r} is not of the form name(option=value, ...)") from None


def set_scheduler(pipe: Any, name: str | None) -> None:
    """Gives a pipeline another scheduler, made from the configuration of the one it has.

    Raises:
        OptionError: If there is no such scheduler, or it does not take the configuration.
    """
    if name is None:
        return
    cls: Any = getattr(diffusers, SCHEDULERS.get(name, name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise OptionError(f"no scheduler {name!r}; {closest(name, SCHEDULERS)}, or a class name of diffusers")
    try:
        pipe.scheduler = cls.from_config(pipe.scheduler.config)  # type: ignore[attr-defined]
    except (ValueError, NotImplementedError, TypeError) as error:
        raise OptionError(f"{cls.__name__} does not fit this model: {error}") from error


@contextlib.contextmanager
def open_output(folder: Path) -> Iterator[Path]:
    """Makes an output folder, and removes it again if the work fails and nothing has been written.

    Raises:
        OutputError: Before any work, if it cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None
    try:
        yield folder
    finally:
        for path in missing:  # innermost first
            with contextlib.suppress(OSError):
                path.rmdir()


def write(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name, and then gives it its own."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    from .. import __version__

    return {"diffaccel": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


class Sampler:
    """Calls a pipeline of any kind on fixed conditions and noise.

    Arguments:
        pipe: The pipeline: prompted, class-conditional or unconditional.
        conditions: Prompts; class names or numbers; or for an unconditional pipeline nothing.
        steps: The number of inference steps.
        guidance: The guidance scale, or None for the pipeline's own.
        seed: The seed of the one generator that decides all noise.
        count: The number of images of an unconditional pipeline.

    Raises:
        OptionError: If the conditions are not what the pipeline takes.
    """

    def __init__(self, pipe: Any, conditions: Sequence[str], steps: int, guidance: float | None, seed: int,
                 count: int = 1) -> None:  # fmt: skip
        import inspect

        self.pipe, self.steps, self.seed = pipe, steps, seed
        self.reports: list[tuple[int, Any]] = []
        """The sizes and reports of the batches of the last call, if the pipeline is accelerated."""
        self.conditions = list(conditions)
        self.count = len(self.conditions) or count
        known = inspect.signature(pipe.__call__).parameters
        self.options: dict[str, Any] = {}
        if guidance is not None:
            if "guidance_scale" not in known:
                raise OptionError(f"{type(pipe).__name__} takes no guidance")
            self.options["guidance_scale"] = guidance
        self.kind = next((name for name in ("prompt", "class_labels") if name in known), "batch_size")
        if self.kind == "batch_size" and self.conditions:
            raise OptionError(f"{type(pipe).__name__} takes no prompt")
        if self.kind != "batch_size" and not self.conditions:
            raise OptionError(f"{type(pipe).__name__} needs a {self.kind.replace('class_labels', 'label')}")
        self.values = [self._label(text) for text in self.conditions] if self.kind == "class_labels" else (
            self.conditions)  # fmt: skip

    def _label(self, text: str) -> int:
        labels = getattr(self.pipe, "labels", {}) or {}
        if text in labels:
            return int(labels[text])
        if text.isdecimal() and (not labels or int(text) in labels.values()):
            return int(text)
        raise OptionError(f"no label {text!r}; {closest(text, labels)}")

    def __call__(self, steps: int | None = None, batch: int = 64) -> torch.Tensor:
        """Returns images (N, 3, H, W) in [0, 1], or the pipeline's own output as a tensor."""
        generator = torch.Generator().manual_seed(self.seed)
        images = []
        self.reports.clear()
        for start in range(0, self.count, batch):
            part: Any = self.values[start : start + batch] or min(batch, self.count - start)
            result = self.pipe(**{self.kind: part}, **self.options, generator=generator, output_type="np",
                               num_inference_steps=steps or self.steps)  # fmt: skip
            images.append(torch.as_tensor(result[0]))
            if hasattr(self.pipe, "accel"):
                self.reports.append((len(images[-1]), self.pipe.accel.report))
        return torch.cat(images).movedim(-1, 1)


def device_of(pipe: Any) -> torch.device:
    """Returns the device of a pipeline's denoiser."""
    return next(next(iter(denoisers_of(pipe).values())).parameters()).device


def default_conditions(model: str, pipe: Any, count: int) -> list[str]:
    """Returns conditions for a benchmark: those of the zoo, or the labels that a pipeline knows.

    Raises:
        OptionError: If there are none; a text-to-image model of one's own needs prompts of one's own.
    """
    from .. import zoo

    labels = getattr(pipe, "labels", None)
    if model in zoo.names():
        return [zoo.LABELS[n] for n in zoo.labels(count)] if labels else zoo.prompts(count)
    if labels:
        return random.Random(0).choices(sorted(labels), k=count)
    if "prompt" in type(pipe).__call__.__code__.co_varnames:
        raise OptionError("this model needs --prompts FILE, a text file with one prompt a line")
    return []

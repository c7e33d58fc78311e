"""Calls of a pipeline of any kind on fixed conditions and noise, image by image the same for every method."""

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import DiffaccelError, OptionError, closest
from ..pipelines.identity import GUIDANCE_KEY
from ..pipelines.run import denoisers_of

__all__ = ["Sampler", "default_conditions", "device_of", "refusals"]

_BAD_CALL = (ValueError, TypeError, AttributeError, NotImplementedError)


@contextlib.contextmanager
def refusals(pipe: Any) -> Iterator[None]:
    """Turns what a pipeline raises for a call that it does not take into our error.

    Raises:
        OptionError: If the pipeline refuses its arguments, with its words.
    """
    try:
        yield
    except DiffaccelError:
        raise
    except _BAD_CALL as error:
        raise OptionError(f"{type(pipe).__name__} refuses the call: {error}") from error


class Sampler:
    """Calls a pipeline of any kind on fixed conditions and noise.

    Arguments:
        pipe: The pipeline: prompted, class-conditional or unconditional.
        conditions: Prompts; class names or numbers; or for an unconditional pipeline nothing.
        steps: The number of inference steps.
        guidance: The guidance scale, or None for the pipeline's own: the one that a student was trained
            for, or the default of its call.
        seed: The seed of the first image's noise; the next image has the next one.
        count: The number of images of an unconditional pipeline.
        options: Further arguments of each call, as height and width.

    Raises:
        OptionError: If the conditions are not what the pipeline takes.
    """

    def __init__(self, pipe: Any, conditions: Sequence[str], steps: int, guidance: float | None, seed: int,
                 count: int = 1, options: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        self.pipe, self.steps, self.seed, self.options = pipe, steps, seed, dict(options or {})
        self.reports: list[tuple[int, Any]] = []
        """The sizes and reports of the batches of the last call, if the pipeline is accelerated."""
        self.conditions = list(conditions)
        self.count = len(self.conditions) or count
        known, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
        self.kind = next((kind for kind in ("prompt", "class_labels") if kind in known), "batch_size")
        if _needed(known) - {self.kind} or self.kind not in known or "num_inference_steps" not in known:
            raise OptionError(f"{name} needs more than prompts, labels or noise; call it from Python")
        if guidance is not None and "guidance_scale" not in known:
            raise OptionError(f"{name} takes no guidance")
        if guidance is None and "guidance_scale" in known:
            guidance = pipe.scheduler.config.get(GUIDANCE_KEY, known["guidance_scale"].default)
        self.guidance = guidance
        if self.kind == "batch_size" and self.conditions:
            raise OptionError(f"{name} takes no prompt; it is unconditional")
        if self.kind != "batch_size" and not self.conditions:
            raise OptionError(f"{name} needs a {self.kind.replace('class_labels', 'label')}")
        self.values: list[Any] = self.conditions
        if self.kind == "class_labels":
            self.values = [self._label(text) for text in self.conditions]

    def _label(self, text: str) -> int:
        labels: dict[str, int] = getattr(self.pipe, "labels", None) or {}
        if text in labels:
            return int(labels[text])
        if text.isdecimal() and (not labels or int(text) in labels.values()):
            return int(text)
        if not labels:
            raise OptionError(f"no label {text!r}; this model knows labels by number only")
        some = closest(text, labels) if len(labels) < 20 else (
            f"{closest(text, labels).partition('known:')[0]}known: {len(labels)} labels such as "
            f"{', '.join(map(repr, list(labels)[:4]))}, or their numbers"
        )  # fmt: skip
        raise OptionError(f"no label {text!r}; {some}")

    def __call__(
        self, steps: int | None = None, batch: int = 64, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Returns images (N, 3, H, W) in [0, 1]; the frames of a video side by side.

        Image n has the condition n and a generator with the seed ``seed + n`` of its own, so that it does not
        depend on the other images.

        Arguments:
            steps: The number of inference steps, if it is another one.
            batch: Images a call of the pipeline.
            start: The first image.
            stop: The end of the images, exclusive.

        Raises:
            OptionError: If the pipeline refuses its arguments, with its words.
        """
        options: dict[str, Any] = {"num_inference_steps": steps or self.steps, "output_type": "np"}
        if self.guidance is not None:
            options["guidance_scale"] = self.guidance
        images = []
        self.reports.clear()
        stop = self.count if stop is None else min(stop, self.count)
        for first in range(start, stop, batch):
            numbers = range(first, min(first + batch, stop))
            options["generator"] = [torch.Generator().manual_seed((self.seed + n) % 2**63) for n in numbers]
            part = self.values[numbers.start : numbers.stop] or len(numbers)
            result = self._call({self.kind: part, **options})
            images.append(torch.cat(result.unbind(1), 2) if result.ndim == 5 else result)
            if hasattr(self.pipe, "accel"):
                self.reports.append((len(result), self.pipe.accel.report))
        return torch.cat(images).movedim(-1, 1)

    def _call(self, arguments: dict[str, Any]) -> torch.Tensor:
        with refusals(self.pipe):
            return torch.as_tensor(self.pipe(**arguments, **self.options)[0])


def _needed(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    """Returns the names of the arguments that a call cannot do without."""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in optional
    }


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
    if "prompt" in inspect.signature(pipe.__call__).parameters:
        raise OptionError("this model needs --prompts FILE, a text file with one prompt a line")
    return []

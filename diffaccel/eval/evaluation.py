"""Generate and score: the plain pipeline and accelerated ones on the same conditions and noise.

The images are made and scored in parts (`parts`), each by all methods, so that every image is compared with
the plain pipeline's image of the same noise. Images are not kept, but for a few to be shown.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from ..files import whole
from ..pipelines import attached
from .classifier import labels_of_prompts, load_classifier, predict
from .fidelity import Pairs
from .images import digest, to_bytes
from .perceptual import SMALLEST, clip_available, load_clip, load_lpips, lpips_available, lpips_values
from .protocols import Extractor
from .sampler import Sampler

__all__ = ["SHOWN", "Evaluation", "Method", "labels_of"]

SHOWN = 12
"""The images of each method that are kept to be shown."""


@dataclass(frozen=True)
class Method:
    """One way to make the images.

    Arguments:
        name: The accelerator as the command names it, or "plain".
        steps: The inference steps.
        spec: The stack of accelerators; None for the plain pipeline.
    """

    name: str
    steps: int
    spec: Any = None

    @property
    def label(self) -> str:
        """The name, with the steps of a plain pipeline."""
        return f"{self.name}, {self.steps} steps" if self.spec is None else self.name


def labels_of(conditions: Sequence[str]) -> list[int] | None:
    """Returns the label numbers of tiny-fashion captions or label names; None for those of other models."""
    if not conditions:
        return None
    try:
        return labels_of_prompts(conditions)  # a label's name is the shortest of its captions
    except ValueError:
        return None


class Evaluation:
    """Makes the parts of an evaluation.

    Arguments:
        pipe: The pipeline, plain.
        sampler: Its conditions and seeds.
        methods: The methods; the first is the one that the others are compared with.
        extractor: The extractor of the protocol.
        images: A folder to write all images to; None writes none.
    """

    def __init__(self, pipe: Any, sampler: Sampler, methods: Sequence[Method], extractor: Extractor,
                 images: Path | None = None) -> None:  # fmt: skip
        self.pipe, self.sampler, self.methods, self.extractor = pipe, sampler, list(methods), extractor
        self.images = images
        self.classifier = None if labels_of(sampler.conditions) is None else load_classifier()
        self.lpips = load_lpips(extractor.device) if lpips_available() else None
        self.clip = (
            load_clip(device=extractor.device) if sampler.kind == "prompt" and clip_available() else None
        )

    @property
    def judges(self) -> list[str]:
        """What measures single images beside the extractor: those networks that are on this machine."""
        found = {"classifier": self.classifier, "lpips": self.lpips, "clip": self.clip}
        return [name for name, network in found.items() if network is not None]

    def part(self, numbers: range, advance: Callable[[int], None] = lambda count: None) -> dict[str, Tensor]:
        """Makes and measures some images by every method.

        Arguments:
            numbers: The images' numbers.
            advance: Told the number of images after each method.

        Returns:
            Tensors "METHOD/NAME" by the method's position.

        Raises:
            ImageError: If images are not finite.
        """
        result: dict[str, Tensor] = {}
        first: Tensor | None = None
        for position, method in enumerate(self.methods):
            began = time.perf_counter()
            images = self._sample(method, numbers)
            seconds = time.perf_counter() - began
            found = {**self._cost(numbers), **self._measure(images, method, numbers, first)}
            found["seconds"] = torch.tensor(seconds, dtype=torch.float64)
            result.update({f"{position}/{name}": value for name, value in found.items()})
            first = images if first is None else first
            advance(len(numbers))
        return result

    def _sample(self, method: Method, numbers: range) -> Tensor:
        with attached(self.pipe, [] if method.spec is None else method.spec):
            return self.sampler(method.steps, len(numbers), numbers.start, numbers.stop)

    def _cost(self, numbers: range) -> dict[str, Tensor]:
        """Returns evaluations asked for and run (the latter summed over the images)."""
        reports = self.sampler.reports
        run = sum(size * report.evaluated for size, report in reports)
        asked = reports[0][1].requested
        return {"cost": torch.tensor([asked * len(numbers), run], dtype=torch.float64)}

    def _measure(
        self, images: Tensor, method: Method, numbers: range, first: Tensor | None
    ) -> dict[str, Tensor]:
        images = images.clamp(0, 1) if bool(images.isfinite().all()) else images
        name = f"images {numbers.start} to {numbers.stop - 1} of {method.label}"
        pixels = to_bytes(images, self.extractor.protocol.quantizer, (0, 1), name)
        outputs = self.extractor(pixels)
        found = {key: value for key, value in outputs._asdict().items() if value is not None}
        found["digests"] = torch.stack(
            [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in digest(pixels)]
        )
        if numbers.start == 0:
            found["shown"] = pixels[:SHOWN]
        if first is not None:
            pairs = Pairs()
            pairs.update(images, first.clamp(0, 1))
            found.update(pairs.state_dict())
            if self.lpips is not None and min(images.shape[-2:]) >= SMALLEST:
                found["lpips"] = lpips_values(images, first.clamp(0, 1), self.lpips)
        if self.clip is not None:
            found["clip"] = 100 * self.clip.cosines(pixels, self.sampler.values[numbers.start : numbers.stop])
        if self.classifier is not None and pixels.shape[1:] == (3, 32, 32):
            prediction = predict(pixels / 255, self.classifier)
            found["classes"] = prediction.class_logits.argmax(1)
            found["colors"] = prediction.color_logits.argmax(1)
        if self.images is not None:
            self._write(pixels, method, numbers)
        return found

    def written(self, numbers: range) -> bool:
        """Returns whether all images that are to be written are."""
        return self.images is None or all(
            self._file(method, number).exists() for method in self.methods for number in numbers
        )

    def _file(self, method: Method, number: int) -> Path:
        assert self.images is not None
        name = method.label.replace("/", "_").replace(" ", "_").replace(",", "")
        return self.images / name / f"{number:06d}.png"

    def _write(self, pixels: Tensor, method: Method, numbers: range) -> None:
        for number, image in zip(numbers, pixels, strict=True):
            with whole(self._file(method, number)) as temporary:
                save_image(image / 255, temporary, format="png")

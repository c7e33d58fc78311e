"""What candidates cost, and how far their images are from the plain run's: measured once, kept in files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DiffaccelError
from ..eval.budget import Judge
from ..eval.cost import count_flops, timed
from ..eval.provenance import settings_digest
from ..eval.sampler import Sampler, device_of
from ..files import whole
from ..kept import kept_arrays
from ..pipelines import attached
from ..pipelines.accelerator import Accelerator, Proceed
from ..pipelines.run import Evaluation
from .auto import shape_of
from .candidate import Candidate

__all__ = ["Measured", "Measurements", "folder_of"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a candidate.

    Arguments:
        values: The values of each image (N) by name, as of `Judge`; empty where the candidate failed.
        flops: Floating-point operations an image: those an evaluation of the first image, times evaluations.
        evaluated: Evaluations of the denoisers an image.
        count: The images N.
        failure: Why it made no images; empty if it did.
    """

    values: dict[str, np.ndarray]
    flops: float
    evaluated: float
    count: int
    failure: str = ""

    def __add__(self, other: "Measured") -> "Measured":
        """Returns what is known of the images of both."""
        if self.failure or other.failure:
            return self if self.failure else other
        count = self.count + other.count
        mean = [(getattr(self, name) * self.count + getattr(other, name) * other.count) / count
                for name in ("flops", "evaluated")]  # fmt: skip
        values = {name: np.concatenate([self.values[name], other.values[name]]) for name in self.values}
        return Measured(values, mean[0], mean[1], count)


class _Shapes(Accelerator):
    """Notes the shape of one row of the denoiser's input, in a list that all copies share."""

    def __post_init__(self) -> None:
        self.seen: list[list[int]] = []

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Notes the shape."""
        self.seen.append(shape_of(call.sample))
        return proceed(call)


class Measurements:
    """Runs candidates on numbered images, each with a condition and a seed of its own.

    Arguments:
        pipe: The pipeline, plain.
        sampler: Conditions and seeds of all images, and the steps of the plain run.
        judge: What compares images.
        batch: Images a call.
        folder: Where results are kept; what is there already is not measured again.
        advance: Told after each candidate.
    """

    def __init__(self, pipe: Any, sampler: Sampler, judge: Judge, batch: int, folder: Path,
                 advance: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        self.pipe, self.sampler, self.judge, self.batch, self.folder = pipe, sampler, judge, batch, folder
        self.device = device_of(pipe)
        self.advance = advance

    def plain(self, numbers: range) -> Measured:
        """Returns what the plain run costs, which its own images are identical to."""
        found = self._reference(numbers)
        return Measured({}, float(found["flops"]), float(found["evaluated"]), len(numbers))

    def shape(self, numbers: range) -> list[int]:
        """Returns the shape of one row of the denoiser's input."""
        return [int(size) for size in self._reference(numbers)["shape"]]

    def _reference(self, numbers: range) -> dict[str, np.ndarray]:
        """Returns the images (N, 3, H, W) of the plain run, and what they cost."""

        def make() -> dict[str, Any]:
            shapes = _Shapes()
            images, evaluated = self._run([shapes], self.sampler.steps, numbers)
            rate = self._rate("plain", [], self.sampler.steps)
            return {"images": images.cpu().numpy(), "flops": rate * evaluated, "evaluated": evaluated,
                    "shape": shapes.seen[0]}  # fmt: skip

        return self._kept("plain", numbers, make)

    def __call__(self, candidate: Candidate, numbers: range) -> Measured:
        """Measures a candidate on some images.

        Arguments:
            candidate: The candidate.
            numbers: The images' numbers; those of one call are compared at once.
        """
        name = settings_digest(candidate.to_plain())[:24]

        def make() -> dict[str, Any]:
            reference = torch.from_numpy(self._reference(numbers)["images"])
            try:
                images, evaluated = self._run(candidate.spec, candidate.steps, numbers)
                values = self.judge(images.cpu(), reference)
                rate = self._rate(name, candidate.spec, candidate.steps)
            except torch.OutOfMemoryError:
                raise
            except (DiffaccelError, IndexError, RuntimeError) as error:  # diffusers' own, with few steps
                return {"failure": " ".join(f"{type(error).__name__}: {error}".split())}
            return {**values, "flops": rate * evaluated, "evaluated": evaluated}

        found = self._kept(name, numbers, make)
        self.advance()
        if "failure" in found:
            return Measured({}, np.inf, np.inf, len(numbers), str(found["failure"]))
        flops, evaluated = float(found.pop("flops")), float(found.pop("evaluated"))
        return Measured(found, flops, evaluated, len(numbers))

    def _run(self, stack: Any, steps: int, numbers: range) -> tuple[Tensor, float]:
        """Returns images, and evaluations an image."""
        with attached(self.pipe, stack):
            images = self.sampler(steps, self.batch, numbers.start, numbers.stop).clamp(0, 1)
        evaluated = sum(size * report.evaluated for size, report in self.sampler.reports) / len(numbers)
        return images, evaluated

    def _rate(self, name: str, stack: Any, steps: int) -> float:
        """Returns the operations an evaluation, all of the call's shared among them; of the first image.

        Counting takes about as long as computing, so that all images would be too many.
        """

        def make() -> dict[str, Any]:
            evaluated: list[float] = []
            flops = count_flops(lambda: evaluated.append(self._run(stack, steps, range(1))[1]))
            return {"rate": flops / evaluated[0]}

        return float(self._kept(f"{name}-rate", range(1), make)["rate"])

    def _kept(self, name: str, numbers: range, make: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
        """Returns what is kept under a name, made now if it is not."""
        return kept_arrays(self.folder / f"{name}-{numbers.start}-{numbers.stop}.npz", make)

    def seconds(self, candidate: Candidate | None, count: int) -> float:
        """Returns the wall-clock seconds of the first images, now; by the plain run without a candidate.

        Arguments:
            candidate: The candidate.
            count: The number of images.
        """
        steps = self.sampler.steps if candidate is None else candidate.steps
        with attached(self.pipe, None if candidate is None else candidate.spec):
            return timed(lambda: self.sampler(steps, self.batch, 0, count), self.device)[1]


def folder_of(root: Path, facts: dict[str, Any]) -> Path:
    """Returns the folder of the measurements that depend on some facts, which are written to it."""
    folder = root / settings_digest(facts)[:16]
    with whole(folder / "facts.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return folder

"""How good a network is in use: its images at the sampler and the steps of its deployment, by any metric.

There are three parts of images, with noise of their own: 0 for a search, always the same, and 1 and 2, five
times as many each, for scores that the search has not seen. The reference is split, too: one half for parts
0 and 1, the other for part 2.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, closest
from ..eval.estimate import Estimate
from ..eval.frechet import Reference
from ..eval.images import open_images
from ..eval.metrics import METRICS, needs_spatial, score
from ..eval.moments import Gaussian
from ..eval.protocols import Extractor
from ..eval.sampler import Sampler
from ..eval.statistics import Statistics, collect

__all__ = ["FRESH", "SCORES", "Deployment", "Judge", "groups_of", "halves", "images_needed"]

SEED = 900_000_000
"""The first seed of the noise: far from that of pairs and of validations."""

FRESH = 5
"""How many times as many images the second and the third part have."""

SCORES: Mapping[str, tuple[str, str, int]] = {
    "fd": ("fid", "fid", 1), "fid": ("fid", "fid", 1), "sfid": ("sfid", "sfid", 1),
    "fid_inf": ("fid_inf", "fid_inf", 1), "kid": ("kid", "kid", 1), "cmmd": ("cmmd", "cmmd", 1),
    "is": ("is", "is", -1), "precision": ("pr", "precision", -1), "recall": ("pr", "recall", -1),
    "density": ("prdc", "density", -1), "coverage": ("prdc", "coverage", -1),
}  # fmt: skip
"""By the name of a score, the metric of the harness, its key there, and -1 where more is better."""


class _Broken(Exception):
    """Images that are not finite."""


def images_needed(images: int) -> int:
    """Returns the images of all three parts."""
    return images * (1 + 2 * FRESH)


def groups_of(names: Sequence[str]) -> list[str]:
    """Returns the metrics of the harness that scores belong to.

    Raises:
        OptionError: If there is no such score.
    """
    for name in names:
        if name not in SCORES:
            raise OptionError(f"no metric {name!r}; {closest(name, SCORES)}")
    return list(dict.fromkeys(SCORES[name][0] for name in names))


def halves(statistics: Statistics, seed: int = 0) -> tuple[Statistics, Statistics]:
    """Returns the statistics of two random halves; of moments alone, twice the same.

    Arguments:
        statistics: The statistics, with features.
        seed: Decides the halves.
    """
    if statistics.features is None or statistics.spatial is not None:
        return statistics, statistics
    rows = np.asarray(statistics.features[0 : statistics.features.shape[0]])
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = (np.sort(order[: len(rows) // 2]), np.sort(order[len(rows) // 2 :]))
    first, second = (
        Statistics(Reference(Gaussian.of(rows[part])), {**statistics.meta, "part": name}, features=rows[part])
        for part, name in zip(parts, ("first half", "second half"), strict=True)
    )
    return first, second


class Judge:
    """Creates what scores images by metrics of the harness.

    Arguments:
        metric: The name of the score to search for, see `SCORES`.
        extractor: What makes features.
        reference: The reference of parts 0 and 1, and that of part 2.
        watch: Further scores, which are only reported.

    Raises:
        OptionError: If there is no such score.
    """

    def __init__(self, metric: str, extractor: Extractor, reference: tuple[Statistics, Statistics],
                 watch: Sequence[str] = ()) -> None:  # fmt: skip
        self.names = list(dict.fromkeys([metric, *watch]))
        groups_of(self.names)
        self.extractor, self.reference = extractor, reference

    def _scores(self, images: Iterator[Tensor], names: Sequence[str], part: int, errors: bool) -> Any:
        groups = groups_of(names)
        keep = set().union(*(METRICS[group].generated for group in groups))
        keep |= {"features"} if errors else set()
        found = collect(
            open_images(images, self.extractor.protocol.quantizer),
            self.extractor,
            keep,
            needs_spatial(groups),
        )
        return score(found, self.reference[part == 2], groups, self.extractor.protocol)

    def __call__(self, images: Iterator[Tensor], part: int) -> float:
        """Returns the score of batches of images, less being better."""
        _, key, sign = SCORES[self.names[0]]
        return sign * float(self._scores(images, self.names[:1], part, False)[key].value)

    def report(self, images: Iterator[Tensor], part: int) -> dict[str, Estimate]:
        """Returns all scores of batches of images as they are, with standard errors."""
        found = self._scores(images, self.names, part, True)
        return {name: found[SCORES[name][1]] for name in self.names}


class Deployment:
    """Creates the score of coefficients on a pipeline, whose network is written to.

    Arguments:
        pipe: The pipeline.
        write: What sets its network's weights for coefficients (G, K).
        judge: A `Judge`, or a function of images (N, 3, H, W) in [0, 1], less being better.
        steps: The number of inference steps.
        images: The images of part 0.
        conditions: Prompts or labels of all parts in turn, see `images_needed`; nothing for an unconditional
            pipeline.
        guidance: The guidance scale, None for the pipeline's own.
        seed: The seed of the first image's noise, from 0 on.
        batch: Images a call.
        options: Further arguments of each call.
    """

    def __init__(self, pipe: Any, write: Callable[[np.ndarray], None],
                 judge: Judge | Callable[[Tensor], float], steps: int, *, images: int = 1000,
                 conditions: Sequence[str] = (), guidance: float | None = None, seed: int = 0,
                 batch: int = 250, options: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        self.write, self.judge, self.batch = write, judge, batch
        total = images_needed(images)
        wanted = [conditions[n % len(conditions)] for n in range(total)] if conditions else []
        self.sampler = Sampler(pipe, wanted, steps, guidance, SEED + seed * total, total, options)
        self.parts = [range(images), range(images, (1 + FRESH) * images), range((1 + FRESH) * images, total)]

    def images(self, part: int) -> Iterator[Tensor]:
        """Yields the images of a part in batches (B, 3, H, W) in [0, 1]."""
        numbers = self.parts[part]
        for start in range(numbers.start, numbers.stop, self.batch):
            made = self.sampler(None, self.batch, start, min(start + self.batch, numbers.stop))
            if not bool(made.isfinite().all()):
                raise _Broken
            yield made.clamp(0, 1)

    def __call__(self, coefficients: np.ndarray, part: int = 0) -> float:
        """Returns the score of coefficients (G, K), less being better; infinite if images are not finite."""
        self.write(coefficients)
        return self.score(part)

    def score(self, part: int) -> float:
        """Returns the score of the weights as they are."""
        try:
            if isinstance(self.judge, Judge):
                return self.judge(self.images(part), part)
            return float(self.judge(torch.cat(list(self.images(part)))))
        except _Broken:
            return math.inf

    def report(self, coefficients: np.ndarray | None = None) -> dict[str, dict[str, float]]:
        """Returns all scores on part 2, with standard errors, as plain data.

        Arguments:
            coefficients: What to write first; None leaves the weights as they are.
        """
        if coefficients is not None:
            self.write(coefficients)
        if not isinstance(self.judge, Judge):
            return {"score": {"value": self.score(2)}}
        try:
            found = self.judge.report(self.images(2), 2)
        except _Broken:
            return {name: {"value": math.inf} for name in self.judge.names}
        return {name: estimate.to_dict() for name, estimate in found.items()}

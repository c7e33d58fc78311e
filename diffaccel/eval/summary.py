"""From the parts of an evaluation to its record: scores of each method, and differences from the first."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from .classifier import accuracy_of
from .estimate import Estimate
from .evaluation import Method
from .features import blocks
from .fidelity import Pairs, mean_estimate
from .kernels import kid_difference
from .metrics import check_metrics, kept_of_generated, named, needs_spatial, score
from .parts import Parts
from .protocols import Extractor
from .provenance import plain
from .statistics import Collector, Statistics

__all__ = ["MethodResult", "read_results", "summarize"]


@dataclass
class MethodResult:
    """What the parts tell of one method.

    Arguments:
        method: The method.
        statistics: The statistics of its images.
        requested: Evaluations of the denoisers that the pipeline asked for, per image.
        evaluated: Those that were run, per image.
        seconds: The wall-clock seconds of sampling, all parts together.
        pairs: The comparison with the first method's images; None for that one.
        classes: The predicted classes (N), where the classifier knows the conditions.
        colors: The predicted colors (N), likewise.
        lpips: The LPIPS to the first method's images (N), where the network is on this machine.
        clip: 100 times the cosines of images and prompts (N), likewise.
        shown: The first images, as bytes.
    """

    method: Method
    statistics: Statistics
    requested: float
    evaluated: float
    seconds: float
    pairs: Pairs | None
    classes: Tensor | None
    colors: Tensor | None
    lpips: Tensor | None
    clip: Tensor | None
    shown: Tensor = field(repr=False)


def read_results(
    parts: Parts, methods: Sequence[Method], extractor: Extractor, metrics: Sequence[str]
) -> list[MethodResult]:
    """Returns what the parts tell of each method, read in their order.

    Raises:
        PartsError: If a part is missing or damaged.
        OptionError: If there are fewer than two images.
    """
    keep, spatial = kept_of_generated(metrics), needs_spatial(metrics)
    readers = [_Reader(method, Collector(extractor.record, keep, spatial)) for method in methods]
    for part in parts:
        for position, reader in enumerate(readers):
            head = f"{position}/"
            reader.add(
                {name.removeprefix(head): value for name, value in part.items() if name.startswith(head)}
            )
    return [reader.result() for reader in readers]


LISTS = ("classes", "colors", "lpips", "clip", "shown")
"""What is kept image by image."""


class _Reader:
    """Gathers one method's results."""

    def __init__(self, method: Method, collector: Collector) -> None:
        self.method, self.collector = method, collector
        self.cost = np.zeros(2)
        self.seconds = 0.0
        self.count = 0
        self.pairs: Pairs | None = None
        self.lists: dict[str, list[Tensor]] = {name: [] for name in LISTS}

    def add(self, found: dict[str, Tensor]) -> None:
        """Adds the method's tensors of a part."""
        arrays = {name: found[name].numpy() for name in ("features", "logits", "spatial") if name in found}
        self.collector.add(**arrays, digests=[bytes(row.numpy()) for row in found["digests"]])
        self.cost += found["cost"].numpy()
        self.seconds += float(found["seconds"])
        self.count += len(found["features"])
        if "squares" in found:
            self.pairs = self.pairs or Pairs()
            self.pairs.load_state_dict(found)
        for name, values in self.lists.items():
            if name in found:
                values.append(found[name])

    def result(self) -> MethodResult:
        """Returns what was gathered."""
        joined = {name: torch.cat(values) if values else None for name, values in self.lists.items()}
        asked, run = self.cost / self.count
        shown = joined.pop("shown")
        assert shown is not None
        return MethodResult(self.method, self.collector.statistics(source=self.method.label), asked, run,
                            self.seconds, self.pairs, **joined, shown=shown)  # fmt: skip


def summarize(results: Sequence[MethodResult], reference: Statistics, extractor: Extractor,
              metrics: Sequence[str], labels: Sequence[int] | None) -> dict[str, Any]:  # fmt: skip
    """Returns the record of an evaluation.

    Arguments:
        results: What the parts tell of each method.
        reference: The reference's statistics.
        extractor: The extractor.
        metrics: Names of ``METRICS``.
        labels: The label numbers of the conditions, where the classifier knows them.

    Raises:
        DiffaccelError: If a metric cannot be computed.
    """
    names, first = check_metrics(metrics), results[0]
    rows = []
    for result in results:
        row = _row(result, reference, names, extractor)
        if result is not first:
            row["fidelity"] = _fidelity(result, first)
            row["difference"] = _difference(result, first, reference, names)
        if result.clip is not None:
            row["scores"]["clip"] = {
                "name": "CLIP score",
                **mean_estimate(result.clip.clamp(0).tolist()).to_dict(),
            }
        if labels is not None and result.classes is not None and result.colors is not None:
            accuracy = accuracy_of(result.classes, result.colors, labels)
            row["accuracy"] = {name: value.to_dict() for name, value in vars(accuracy).items()}
        rows.append(row)
    return plain({
        "protocol": extractor.protocol.name, "features": extractor.record, "n": first.statistics.count,
        "m": reference.count,
        "reference": reference.facts,
        "rows": rows,
    })  # fmt: skip


def _row(
    result: MethodResult, reference: Statistics, names: list[str], extractor: Extractor
) -> dict[str, Any]:
    statistics = result.statistics
    scores = score(statistics, reference, names, extractor.protocol)
    return {
        "name": result.method.name, "label": result.method.label, "steps": result.method.steps,
        "requested": result.requested, "evaluated": result.evaluated, "data": statistics.meta["data"],
        "scores": named(scores, statistics.count, extractor.protocol),
    }  # fmt: skip


def _fidelity(result: MethodResult, first: MethodResult) -> dict[str, Any]:
    """Returns how far the images are from those of the first method on the same noise."""
    assert result.pairs is not None
    fidelity = result.pairs.result()
    found = {name: value.to_dict() for name, value in fidelity.estimates().items()}
    distance = _feature_distance(result.statistics, first.statistics)
    if result.lpips is not None:
        found["lpips"] = mean_estimate(result.lpips.tolist()).to_dict()
    return {**found, "feature_distance": distance.to_dict(), "identical": fidelity.identical,
            "worst": fidelity.worst}  # fmt: skip


def _feature_distance(x: Statistics, y: Statistics) -> Estimate:
    """Returns the mean cosine distance between the features of images of the same noise."""
    if x.features is None or y.features is None:
        raise OptionError("feature distances need the features of each image")
    values = []
    for a, b in zip(blocks(x.features), blocks(y.features), strict=True):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        values.append(1 - (a * b).sum(1) / np.maximum(norms, 1e-12))
    return mean_estimate(np.concatenate(values).tolist())


def _difference(
    result: MethodResult, first: MethodResult, reference: Statistics, names: list[str]
) -> dict[str, Any]:
    """Returns score minus first score, with the error that the shared noise leaves."""
    found: dict[str, Estimate] = {}
    x, y = result.statistics, first.statistics
    if x.features is None or y.features is None:
        raise OptionError("paired differences need the features of each image")
    if "fid" in names:
        ours, theirs = (s.frechet(reference.reference) for s in (x, y))
        moved = ours.influence(x.features) - theirs.influence(y.features)
        found["fid"] = Estimate(ours.distance - theirs.distance, mean_estimate(moved.tolist()).se)
    if "kid" in names and reference.features is not None:
        found["kid"] = kid_difference(y.features, x.features, reference.features)
    return {name: value.to_dict() for name, value in found.items()}

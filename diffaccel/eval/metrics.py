"""The metrics of two sets of images by name, and what each needs to know of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, ProtocolMismatch, closest
from .estimate import Estimate
from .features import Rows
from .frechet import Reference, fid_infinity
from .inception_score import inception_score
from .kernels import cmmd, kid
from .neighbors import prdc
from .protocols import Protocol
from .statistics import Statistics, check_same

__all__ = [
    "METRICS",
    "Metric",
    "check_metrics",
    "kept_of_generated",
    "kept_of_reference",
    "named",
    "needs_spatial",
    "score",
    "shown_name",
]

Scores = dict[str, Estimate]
SHUFFLE = 2020
"""The seed of the order in which images are split for the inception score, as torch-fidelity's."""


@dataclass(frozen=True)
class Metric:
    """One metric, or several that come together.

    Arguments:
        title: What it is called in tables.
        compute: Its function of generated set, reference set and protocol.
        generated: What must be known of each generated image: "features" or "logits".
        reference: What must be known of each reference image.
        spatial: Whether it needs the spatial features.
    """

    title: str
    compute: Callable[[Statistics, Statistics, Protocol], Scores]
    generated: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    spatial: bool = False


def _fid(x: Statistics, y: Statistics, protocol: Protocol) -> Scores:
    if x.features is None:  # only moments: no standard error
        return {"fid": Estimate(y.reference.distance(x.gaussian))}
    result = x.frechet(y.reference)
    if y.count is None:  # of an unknown number the bias is not known either
        return {"fid": Estimate(result.distance, result.standard_error(x.features))}
    bias = result.bias(x.features, y.features)
    corrected = result.distance - bias if result.correctable else None
    return {"fid": Estimate(result.distance, result.standard_error(x.features), bias, corrected)}


def _sfid(x: Statistics, y: Statistics, protocol: Protocol) -> Scores:
    ours, theirs = _spatial(x), _spatial(y)
    return {"sfid": Estimate(theirs.distance(ours.gaussian))}


def _spatial(statistics: Statistics) -> Reference:
    if statistics.spatial is None:
        raise OptionError(
            f"{statistics.meta.get('source', 'the statistics')}: no spatial features, which sfid needs"
        )
    return statistics.spatial


def _infinity(x: Statistics, y: Statistics, protocol: Protocol) -> Scores:
    return {"fid_inf": fid_infinity(_rows(x, "features"), y.reference)}


def _kid(x: Statistics, y: Statistics, protocol: Protocol) -> Scores:
    return {"kid": kid(_rows(x, "features"), _rows(y, "features"))}


def _cmmd(x: Statistics, y: Statistics, protocol: Protocol) -> Scores:
    return {"cmmd": cmmd(_rows(x, "features"), _rows(y, "features"))}


def _inception(x: Statistics, y: Statistics, protocol: Protocol) -> Scores:
    seed = SHUFFLE if protocol.splits > 1 else None
    return {"is": inception_score(_rows(x, "logits"), protocol.splits, seed, protocol.split_size)}


def _neighbors(x: Statistics, y: Statistics, protocol: Protocol) -> Scores:
    return prdc(_rows(x, "features"), _rows(y, "features"), protocol.neighbors)


def _precision_recall(x: Statistics, y: Statistics, protocol: Protocol) -> Scores:
    return {
        name: value for name, value in _neighbors(x, y, protocol).items() if name in ("precision", "recall")
    }


def _rows(statistics: Statistics, name: str) -> Rows:
    rows: Rows | None = getattr(statistics, name)
    if rows is None:
        source = statistics.meta.get("file") or statistics.meta.get("source", "a set")
        raise OptionError(f"{source} has no {name} of each image; make it from images, or with --features")
    return rows


METRICS = {
    "fid": Metric("Fréchet distance", _fid),
    "sfid": Metric("spatial Fréchet distance", _sfid, spatial=True),
    "fid_inf": Metric("Fréchet distance of infinitely many images", _infinity, ("features",)),
    "kid": Metric("kernel distance, unbiased", _kid, ("features",), ("features",)),
    "cmmd": Metric("CLIP maximum mean discrepancy", _cmmd, ("features",), ("features",)),
    "is": Metric("inception score", _inception, ("logits",)),
    "pr": Metric("precision and recall", _precision_recall, ("features",), ("features",)),
    "prdc": Metric("precision, recall, density, coverage", _neighbors, ("features",), ("features",)),
}
"""The metrics by name."""


def check_metrics(names: Iterable[str]) -> list[str]:
    """Returns the names of metrics, each once.

    Raises:
        OptionError: If one is unknown, or there is none.
    """
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in METRICS:
            raise OptionError(f"no metric {name!r}; {closest(name, METRICS)}")
    if not chosen:
        raise OptionError(f"no metric is asked for; known: {', '.join(METRICS)}")
    return chosen


def kept_of_generated(names: Iterable[str]) -> set[str]:
    """Returns what has to be kept of each generated image; features always, for the standard errors."""
    return {"features"}.union(*(METRICS[name].generated for name in names))


def kept_of_reference(names: Iterable[str]) -> set[str]:
    """Returns what has to be kept of each reference image."""
    return set().union(*(METRICS[name].reference for name in names))


def needs_spatial(names: Iterable[str]) -> bool:
    """Returns whether one of the metrics needs the spatial features."""
    return any(METRICS[name].spatial for name in names)


def score(generated: Statistics, reference: Statistics, names: Iterable[str], protocol: Protocol) -> Scores:
    """Returns scores by name.

    Arguments:
        generated: The statistics of the generated images.
        reference: The statistics of the reference images.
        names: The metrics.
        protocol: The protocol, for what it fixes beside the features.

    Raises:
        ProtocolMismatch: If the features were made in different ways.
        OptionError: If something that a metric needs is not known.
    """
    names_of_sets = _called(generated, "the generated images"), _called(reference, "the reference")
    check_same(generated.protocol, reference.protocol, names_of_sets)
    lengths = generated.gaussian.dim, reference.gaussian.dim
    if lengths[0] != lengths[1]:
        told = (f"{name} of {length} numbers" for name, length in zip(names_of_sets, lengths, strict=True))
        raise ProtocolMismatch(f"features differ in length: those of {' and those of '.join(told)}")
    scores: Scores = {}
    for name in check_metrics(names):
        scores.update(METRICS[name].compute(generated, reference, protocol))
    return scores


def named(scores: Scores, count: int | None, protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Returns scores as plain data, each with its name in tables.

    Arguments:
        scores: The scores by name.
        count: The number of generated images.
        protocol: The protocol.
    """
    return {
        key: {"name": shown_name(key, count, protocol), **value.to_dict()} for key, value in scores.items()
    }


def _called(statistics: Statistics, name: str) -> str:
    file = statistics.meta.get("file")
    return f"{name} in {file!r}" if file else name


def shown_name(metric: str, count: int | None, protocol: Protocol) -> str:
    """Returns the name of a score in tables: FID-5k is not FID.

    Arguments:
        metric: The score's name.
        count: The number of generated images.
        protocol: The protocol, which tells the published number.
    """
    name = metric.upper() if metric in ("fid", "kid", "is", "cmmd") else metric
    name = {"sfid": "sFID", "fid_inf": "FID∞"}.get(metric, name)
    if "dinov2" in protocol.name:
        name = name.replace("FID", "FD-DINOv2").replace("KID", "KD-DINOv2")
    if count is None or count == protocol.images or metric == "fid_inf":
        return name
    return f"{name}-{count / 1000:g}k"

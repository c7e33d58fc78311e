"""From two sets of images to one record of scores, with everything that they depend on."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import MissingReference, OptionError, ProtocolMismatch
from .arrays import members
from .images import Images, open_images
from .metrics import check_metrics, kept_of_generated, kept_of_reference, named, needs_spatial, score
from .protocols import Extractor, Protocol
from .provenance import plain
from .statistics import Statistics, collect, load_statistics

__all__ = ["is_statistics", "measure", "record_of", "reference_of", "statistics_of"]


def is_statistics(path: Path) -> bool:
    """Returns whether a path is a file of statistics, not of images."""
    return path.suffix.lower() == ".npz" and path.is_file() and {"mu", "sigma"} <= set(members(path))


def statistics_of(data: Any, extractor: Extractor, keep: Iterable[str], spatial: bool, *,
                  count: int | None = None, batch: int = 64, mixed: bool = False,
                  advance: Callable[[int], None] = lambda count: None) -> Statistics:  # fmt: skip
    """Returns the statistics of images, or of a file of statistics.

    Arguments:
        data: What `open_images` takes, a path of statistics, or `Statistics`.
        extractor: The extractor.
        keep: Which outputs to keep image by image.
        spatial: Whether to collect spatial features.
        count: The number of images to use.
        batch: Images at once.
        mixed: Whether images may differ in size.
        advance: Told the size of each batch that is done.

    Raises:
        MissingReference: If there is no such file.
    """
    if isinstance(data, Statistics):
        return data
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.exists():
            raise MissingReference(f"no file or folder {str(path)!r}; expected images, or statistics as .npz")
        if is_statistics(path):
            statistics = load_statistics(path)
            _check_protocol(statistics, extractor.protocol)
            if count not in (None, statistics.count):
                raise OptionError(f"{str(path)!r} holds statistics of {statistics.count or 'some'} images; "
                                  f"expected images, to take {count} of them")  # fmt: skip
            if statistics.features is None and "features" in keep and "arr_0" in members(path):  # as ADM does
                some = collect(open_images(path), extractor, ["features"], False, None, batch, mixed, advance)
                statistics.features, statistics.folder = some.features, some.folder
            return statistics
    images = data if isinstance(data, Images) else open_images(data, extractor.protocol.quantizer)
    return collect(images, extractor, keep, spatial, count, batch, mixed, advance)


def reference_of(data: Any, extractor: Extractor, names: Iterable[str], **options: Any) -> Statistics:
    """Returns the statistics of a reference, with what some metrics need to know of it.

    Arguments:
        data: As of `statistics_of`.
        extractor: The extractor.
        names: The metrics.
        options: Further arguments of `statistics_of`.
    """
    names = check_metrics(names)
    keep = kept_of_reference(names)
    if not isinstance(data, (str, Path)) or not is_statistics(Path(data)):
        keep = {*keep, "features"}  # for the bias, which is not to depend on the other metrics
    return statistics_of(data, extractor, keep, needs_spatial(names), **options)


def _check_protocol(statistics: Statistics, protocol: Protocol) -> None:
    made = (statistics.protocol or {}).get("name", protocol.name)
    if made != protocol.name:
        raise ProtocolMismatch(
            f"{statistics.meta['file']!r} holds statistics of the protocol {made!r}, not {protocol.name!r}"
        )


def measure(generated: Any, reference: Any, extractor: Extractor, metrics: Iterable[str] = (), *,
            count: int | None = None, batch: int = 64, mixed: bool = False,
            advance: Callable[[int], None] = lambda count: None) -> dict[str, Any]:  # fmt: skip
    """Scores one set of images against another, and returns the record.

    Arguments:
        generated: Images (what `open_images` takes), a path of statistics, or `Statistics`.
        reference: The same of the reference.
        extractor: The extractor of the protocol.
        metrics: Names of ``METRICS``; those of the protocol by default.
        count: The number of generated images to use.
        batch: Images at once.
        mixed: Whether images may differ in size.
        advance: Told the size of each batch that is done.

    Raises:
        DiffaccelError: For anything that makes a score impossible or wrong.
    """
    names = check_metrics(metrics or extractor.protocol.metrics)
    options: dict[str, Any] = {"batch": batch, "mixed": mixed, "advance": advance}
    y = reference_of(reference, extractor, names, **options)
    x = statistics_of(
        generated, extractor, kept_of_generated(names), needs_spatial(names), count=count, **options
    )
    return record_of(x, y, names, extractor.protocol)


def record_of(
    generated: Statistics, reference: Statistics, names: Iterable[str], protocol: Protocol
) -> dict[str, Any]:
    """Returns the scores of two sets as plain data, with everything that they depend on.

    Arguments:
        generated: The statistics of the generated images.
        reference: The statistics of the reference images.
        names: The metrics.
        protocol: The protocol.
    """
    scores = score(generated, reference, names, protocol)
    return plain({
        "protocol": protocol.name,
        "features": generated.protocol or reference.protocol,
        "n": generated.count,
        "m": reference.count,
        "scores": named(scores, generated.count, protocol),
        "generated": generated.facts,
        "reference": reference.facts,
    })  # fmt: skip

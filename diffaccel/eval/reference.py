"""The statistics of the zoo's reference images, computed once on a machine."""

from collections.abc import Callable, Iterable

from .. import zoo
from . import weights
from .metrics import needs_spatial
from .protocols import Extractor
from .provenance import settings_digest, versions
from .scoring import reference_of
from .statistics import Statistics, load_statistics, save_statistics

__all__ = ["zoo_statistics"]


def zoo_statistics(
    extractor: Extractor, names: Iterable[str], advance: Callable[[int], None] = lambda count: None
) -> Statistics:
    """Returns the statistics of the test images of the zoo's models, from the cache or into it.

    Arguments:
        extractor: What makes their features.
        names: The metrics that they are for.
        advance: What is told of progress.
    """
    names = list(names)
    key = settings_digest({"features": extractor.record, "data": "fashion-mnist-test",
                           "spatial": needs_spatial(names), "versions": versions()})  # fmt: skip
    file = weights.cache_folder() / "statistics" / f"{key}.npz"
    if not file.is_file():
        found = reference_of(zoo.reference()[0], extractor, names, advance=advance)
        found.meta["source"] = "the test images of Fashion-MNIST in color (diffaccel.zoo.reference)"
        save_statistics(found, file)
    statistics = load_statistics(file)
    del statistics.meta["file"]
    return statistics

"""Statistics of a set of images under a protocol: made in one pass, saved, and never mixed with others.

The file is an ``.npz`` without pickled objects: ``mu`` and ``sigma`` (float64, as clean-fid, pytorch-fid, EDM
and ADM read them), ``n``, ``meta`` (a JSON text), and where they are asked for ``mu_s`` and ``sigma_s``
(spatial) and ``feats`` (float32).
"""

import json
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError, ProtocolMismatch
from ..files import whole
from .arrays import ArrayError, ArrayFile, members
from .features import ROWS, FeatureFile, Rows
from .frechet import Frechet, Reference
from .images import Images, digest
from .moments import Gaussian, Moments
from .protocols import Extractor
from .provenance import digest_of, versions
from .weights import sha256

__all__ = ["Collector", "Statistics", "check_same", "collect", "load_statistics", "save_statistics"]


@dataclass
class Statistics:
    """What is known of a set of images.

    Arguments:
        reference: Mean and covariance of the features, with their factor once it is needed.
        meta: The protocol, the weights, the data's digest and the versions.
        spatial: The same of the spatial features; None without them.
        features: The feature vectors (N, d); None where only moments were kept.
        logits: The class logits (N, C); None without them.
    """

    reference: Reference
    meta: dict[str, Any]
    spatial: Reference | None = None
    features: Rows | None = None
    logits: Rows | None = None
    folder: Any = field(default=None, repr=False)
    """The temporary folder of the feature files, which goes when the statistics go."""
    _frechet: Frechet | None = field(default=None, init=False, repr=False)

    def frechet(self, reference: Reference) -> Frechet:
        """Returns the distance from a reference with its eigenvectors, which are computed once."""
        if self._frechet is None or self._frechet.reference is not reference:
            self._frechet = Frechet(self.gaussian, reference)
        return self._frechet

    @property
    def facts(self) -> dict[str, Any]:
        """What is known beside the protocol."""
        return {key: value for key, value in self.meta.items() if key != "protocol"}

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance of the features."""
        return self.reference.gaussian

    @property
    def count(self) -> int | None:
        """The number of images; None where a file of others does not tell."""
        return self.gaussian.count

    @property
    def protocol(self) -> dict[str, Any] | None:
        """What the features depend on; None where a file of others does not tell."""
        return self.meta.get("protocol")


class Collector:
    """Takes outputs of an extractor, batch by batch.

    Features go to files when a metric needs each of them; moments are in memory.

    Arguments:
        record: What the features depend on (`Extractor.record`).
        keep: Which outputs to keep image by image: "features", "logits".
        spatial: Whether to collect moments of the spatial features.
        folder: Where the files are to be; a temporary folder by default.
    """

    def __init__(self, record: dict[str, Any], keep: Iterable[str] = (), spatial: bool = False,
                 folder: Path | None = None) -> None:  # fmt: skip
        self.record, self.keep, self.with_spatial = record, frozenset(keep), spatial
        self._temporary = tempfile.TemporaryDirectory(prefix="diffaccel-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else folder
        self.moments: Moments | None = None
        self.spatial: Moments | None = None
        self.files: dict[str, FeatureFile] = {}
        self.digests: list[bytes] = []

    def add(self, features: np.ndarray, logits: np.ndarray | None = None, spatial: np.ndarray | None = None,
            digests: Iterable[bytes] = ()) -> None:  # fmt: skip
        """Adds the outputs of a batch.

        Arguments:
            features: Vectors (B, d).
            logits: Class logits (B, C).
            spatial: Spatial features (B, s).
            digests: The SHA-256 of the images.

        Raises:
            OptionError: If a kept output is missing, or features are not finite.
        """
        self.moments = self.moments or Moments(features.shape[1])
        self.moments.update(features)
        if self.with_spatial:
            self.spatial = self.spatial or Moments(_needed(spatial, "spatial features").shape[1])
            self.spatial.update(_needed(spatial, "spatial features"))
        for name, values in (("features", features), ("logits", logits)):
            if name in self.keep:
                rows = _needed(values, name)
                if name not in self.files:
                    assert self.folder is not None
                    self.files[name] = FeatureFile(self.folder / f"{name}.f32", rows.shape[1])
                self.files[name].append(rows)
        self.digests.extend(digests)

    def statistics(self, **meta: Any) -> Statistics:
        """Returns the statistics of all that was added.

        Arguments:
            meta: Further entries of the record.

        Raises:
            OptionError: If fewer than two images were added, or a file holds rows of another run.
        """
        if self.moments is None:
            raise OptionError("no images; statistics need at least 2")
        for file in self.files.values():
            if file.count != self.moments.count:
                raise OptionError(
                    f"{str(file.path)!r} holds {file.count} rows for {self.moments.count} images; remove it"
                )
        record = {
            "protocol": self.record, "images": self.moments.count, "data": digest_of(self.digests),
            "versions": versions(), **meta,
        }  # fmt: skip
        spatial = None if self.spatial is None else Reference(self.spatial.gaussian())
        reference = Reference(self.moments.gaussian())
        files = {name: self.files.get(name) for name in ("features", "logits")}
        return Statistics(reference, record, spatial, **files, folder=self._temporary)


def _needed(values: np.ndarray | None, name: str) -> np.ndarray:
    if values is None:
        raise OptionError(f"this protocol's network has no {name}; choose another protocol or other metrics")
    return values


def collect(images: Images, extractor: Extractor, keep: Iterable[str] = (), with_spatial: bool = False,
            limit: int | None = None, batch: int = 64, mixed: bool = False,
            advance: Callable[[int], None] = lambda count: None) -> Statistics:  # fmt: skip
    """Returns the statistics of a set of images, read once.

    Arguments:
        images: The images.
        extractor: The extractor of the protocol.
        keep: Which outputs to keep image by image: "features", "logits".
        with_spatial: Whether to collect moments of the spatial features.
        limit: The number of images to use, the first by name; all by default.
        batch: Images at once.
        mixed: Whether images may differ in size.
        advance: Told the size of each batch that is done.

    Raises:
        ImageError: If an image cannot be used.
        OptionError: If there are fewer than two.
    """
    collector = Collector(extractor.record, keep, with_spatial)
    for part in images.batches(batch, limit, mixed):
        outputs = extractor(part.pixels)
        logits, spatial = (None if out is None else out.numpy() for out in outputs[1:])
        collector.add(outputs.features.numpy(), logits, spatial, digest(part.pixels))
        advance(len(part.names))
    return collector.statistics(source=images.source)


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Writes statistics as an ``.npz`` file, under a temporary name that is then changed.

    Arguments:
        statistics: The statistics; features are written if they have been kept.
        path: The file.

    Raises:
        OptionError: If the file cannot be written.
    """
    gaussian = statistics.gaussian
    arrays = {
        "mu": gaussian.mean, "sigma": gaussian.covariance,
        "n": np.array(-1 if gaussian.count is None else gaussian.count),
        "meta": np.array(json.dumps(statistics.meta)),
    }  # fmt: skip
    if statistics.spatial is not None:
        spatial = statistics.spatial.gaussian
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if statistics.features is not None:
        arrays["feats"] = np.asarray(statistics.features[0 : statistics.features.shape[0]])
    try:
        with whole(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise OptionError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def load_statistics(path: Path) -> Statistics:
    """Reads statistics of our own, or of clean-fid, pytorch-fid, EDM or ADM.

    Raises:
        ArrayError: If the file is damaged, or holds no statistics.
    """
    names = members(path)
    if not {"mu", "sigma"} <= set(names):
        raise ArrayError(f"{str(path)!r} has the arrays {', '.join(names)}; expected mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as file:
            small = {name: file[name] for name in names if name not in ("feats", "arr_0")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArrayError(f"cannot read {str(path)!r}: {error}") from None
    meta, count = _read_meta(small, path), _read_count(small, path)
    spatial = _read_gaussian(small, "mu_s", "sigma_s", count, path) if "mu_s" in small else None
    reference = _read_gaussian(small, "mu", "sigma", count, path)
    statistics = Statistics(reference, meta, spatial)
    if "feats" in names:
        array = ArrayFile(path, "feats")
        if array.shape[1:] != (reference.gaussian.dim,) or count not in (None, array.shape[0]):
            raise ArrayError(f"{str(path)!r}: feats {array.shape} do not fit n {count} and mu")
        statistics.folder = tempfile.TemporaryDirectory(prefix="diffaccel-")
        statistics.features = _spill(array, Path(statistics.folder.name) / "features.f32")
    return statistics


def _spill(array: ArrayFile, path: Path) -> FeatureFile:
    """Returns the rows of an array in a file of their own: a compressed one cannot be mapped."""
    file = FeatureFile(path, array.shape[1])
    for start in range(0, array.shape[0], ROWS):
        file.append(array[start : start + ROWS])
    return file


def _read_count(arrays: dict[str, np.ndarray], path: Path) -> int | None:
    found = arrays.get("n")
    if found is None:
        return None
    if found.size != 1 or found.dtype.kind not in "iu":
        raise ArrayError(
            f"{str(path)!r}: n has the shape {found.shape} and type {found.dtype}; expected a number"
        )
    count = int(found.item())
    return count if count >= 0 else None


def _read_meta(arrays: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    except ValueError as error:
        raise ArrayError(f"{str(path)!r}: its meta is no JSON: {error}") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("protocol", {}), dict):
        raise ArrayError(
            f"{str(path)!r}: its meta is no record of statistics; expected an object with a protocol"
        )
    if "data" not in meta:  # as in the files of others
        meta["data"] = f"file {sha256(path)}"
    if "protocol" not in meta:
        meta["unverified"] = True
    return {**meta, "file": str(path)}


def _read_gaussian(
    arrays: dict[str, np.ndarray], mean: str, cov: str, count: int | None, path: Path
) -> Reference:
    missing = [name for name in (mean, cov) if name not in arrays or arrays[name].dtype.kind not in "fiu"]
    if missing:
        raise ArrayError(f"{str(path)!r} has no numbers {missing[0]!r}; expected {mean} and {cov}")
    mu, sigma = (np.asarray(arrays[name], dtype=np.float64) for name in (mean, cov))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ArrayError(f"{str(path)!r}: {mean} {mu.shape} and {cov} {sigma.shape} do not fit together")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ArrayError(f"{str(path)!r}: {mean} or {cov} is not finite")
    return Reference(Gaussian(mu, sigma, count))


def check_same(first: dict[str, Any] | None, second: dict[str, Any] | None, names: tuple[str, str]) -> None:
    """Checks that two sets of features were made in the same way.

    Arguments:
        first: What the features of one depend on; None if it is not known, which passes.
        second: The same of the other.
        names: What they are called in the error.

    Raises:
        ProtocolMismatch: Naming what differs.
    """
    if first is None or second is None:
        return
    different = [key for key in sorted({*first, *second}) if first.get(key) != second.get(key)]
    if different:
        told = "; ".join(f"{key}: {first.get(key)!r} and {second.get(key)!r}" for key in different[:4])
        raise ProtocolMismatch(f"{names[0]} and {names[1]} were made in different ways ({told})")

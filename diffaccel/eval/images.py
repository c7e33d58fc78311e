"""Streams of images from a folder, a zip file, an ``.npz`` or ``.npy`` file, tensors, or PIL images.

Whatever they come from, images leave as batches of bytes (B, 3, H, W) with names, in the order of the names;
only a few batches are in memory. A wrong image is an error that names it.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DiffaccelError, OptionError
from .arrays import ArrayFile
from .pixels import quantize

__all__ = ["Batch", "ImageError", "Images", "digest", "open_images", "to_bytes"]

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
TOLERANCE = 0.01
"""Floats may be this far outside of their range, and are clamped; farther out it is another range."""
THREADS = 2


class ImageError(DiffaccelError, ValueError):
    """An image, or a set of images, that cannot be read or is not what was expected."""


@dataclass(frozen=True)
class Batch:
    """Images of one size.

    Arguments:
        names: What the images are called in errors.
        pixels: Bytes (B, 3, H, W).
    """

    names: list[str]
    pixels: Tensor


@dataclass(frozen=True)
class Images:
    """A set of images that can be read once or, but for iterators, again.

    Arguments:
        source: What the set is called.
        count: The number of images; None where an iterator tells only at its end.
        read: Returns the batches of at most so many images, all of one size unless ``mixed``.
    """

    source: str
    count: int | None
    read: Callable[[int], Iterator[Batch]]

    def batches(self, size: int, limit: int | None = None, mixed: bool = False) -> Iterator[Batch]:
        """Yields batches of images of one size.

        Arguments:
            size: The largest number of images in a batch.
            limit: The number of images to stop at.
            mixed: Whether later images may have another size.

        Raises:
            ImageError: If an image cannot be read, has another size or there are fewer than ``limit``.
            OptionError: If the size or the limit is not positive.
        """
        if min(size, size if limit is None else limit) < 1:
            raise OptionError(f"batches of {size} images and at most {limit}; expected positive numbers")
        if limit is not None and self.count is not None and self.count < limit:
            raise ImageError(f"{self.source} has only {self.count} images of the {limit} asked for")
        seen, first = 0, None
        for batch in self.read(size):
            shape = tuple(batch.pixels.shape[-2:])
            first = first or shape
            if shape != first and not mixed:
                raise ImageError(
                    f"{batch.names[0]!r} has {shape[1]}x{shape[0]} pixels and the images before it "
                    f"{first[1]}x{first[0]}; allow mixed sizes if they are meant to differ"
                )
            if limit is not None and seen + len(batch.names) > limit:
                batch = Batch(batch.names[: limit - seen], batch.pixels[: limit - seen])
            yield batch
            seen += len(batch.names)
            if seen == limit:
                return
        if not seen:
            raise ImageError(f"no images in {self.source}")
        if limit is not None:
            raise ImageError(f"{self.source} has only {seen} images of the {limit} asked for")


def open_images(data: Any, quantizer: str = "round", value_range: tuple[float, float] = (0, 1)) -> Images:
    """Returns a set of images.

    Arguments:
        data: A folder (searched through all levels), a zip file, an ``.npz`` (its array ``arr_0``) or
            ``.npy`` file of bytes or floats; a tensor or array (N, 3, H, W) or (N, H, W, 3); a sequence of
            PIL images; or an iterable of tensors (B, 3, H, W).
        quantizer: How floats become bytes, one of ``QUANTIZERS``.
        value_range: What black and white are in floats, (0, 1) or (-1, 1).

    Raises:
        ImageError: If there is no such file, or it holds no images.
    """
    if isinstance(data, Images):
        return data
    if isinstance(data, (str, Path)):
        return _open_path(Path(data), quantizer, value_range)

    def convert(part: Any, name: str) -> Tensor:
        return to_bytes(part, quantizer, value_range, name)

    if isinstance(data, (Tensor, np.ndarray)):
        return _array("a tensor", len(data), data.__getitem__, convert)
    if isinstance(data, Sequence) and data and isinstance(data[0], Image.Image):
        names = [f"image {n}" for n in range(len(data))]
        loaders = [(name, partial(_decode, image, name)) for name, image in zip(names, data, strict=True)]
        return Images("a list of images", len(data), lambda size: _read_all(loaders, size))
    if isinstance(data, Iterable):
        return Images("an iterator", None, lambda size: _read_stream(data, size, convert))
    raise ImageError(f"cannot read images from a {type(data).__name__}; give a path, tensors or PIL images")


def _open_path(path: Path, quantizer: str, value_range: tuple[float, float]) -> Images:
    shown = repr(str(path))
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file()]
        files.sort(key=lambda file: file.relative_to(path).as_posix())
        loaders = [(str(file), partial(_decode, file, str(file))) for file in files]
        return _listed(shown, loaders)
    if not path.is_file():
        raise ImageError(f"no folder or file {shown}; expected images")
    if path.suffix.lower() in (".npz", ".npy"):
        array = ArrayFile(path)
        return _array(shown, array.shape[0], array.__getitem__,
                      lambda part, name: to_bytes(part, quantizer, value_range, name))  # fmt: skip
    if zipfile.is_zipfile(path):
        return _open_zip(path)
    raise ImageError(f"{shown} is neither a folder, a zip file, nor an .npz or .npy file")


def _listed(shown: str, loaders: Sequence[tuple[str, Callable[[], Tensor]]]) -> Images:
    if not loaders:
        raise ImageError(f"no images in {shown}; looked for {', '.join(sorted(EXTENSIONS))} at all levels")
    return Images(shown, len(loaders), lambda size: _read_all(loaders, size))


def _open_zip(path: Path) -> Images:
    try:
        archive = zipfile.ZipFile(path)  # opened once: each opening reads the whole list of names
    except (OSError, zipfile.BadZipFile) as error:
        raise ImageError(f"cannot read {str(path)!r}: {error}") from None
    names = [n for n in archive.namelist() if PurePosixPath(n).suffix.lower() in EXTENSIONS]

    def load(name: str) -> Tensor:
        shown = f"{path}/{name}"
        try:
            content = archive.read(name)
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ImageError(f"cannot read {shown!r}: {error}") from None
        return _decode(io.BytesIO(content), shown)

    loaders = [(f"{path}/{name}", partial(load, name)) for name in sorted(names)]
    return _listed(repr(str(path)), loaders)


def _decode(source: Any, name: str) -> Tensor:
    """Returns one image as bytes (3, H, W)."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        deep = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))  # PIL drops half of it
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read the image {name!r}: {error}") from None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        raise ImageError(f"{name!r} has an alpha channel; give it a background first")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"{name!r} has {frames} frames; expected a single image")
    if deep or image.mode not in ("RGB", "L", "P", "1"):
        found = "16 bits" if deep else f"mode {image.mode}"
        raise ImageError(f"{name!r} has {found}; expected RGB or grey images of 8 bits")
    array = np.asarray(image.convert("RGB"))
    return torch.from_numpy(array.copy()).movedim(-1, 0)


def _read_all(loaders: Sequence[tuple[str, Callable[[], Tensor]]], size: int) -> Iterator[Batch]:
    """Decodes in threads, at most two batches ahead, and yields runs of one size."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = iter(loaders)
        ahead = [(name, pool.submit(load)) for name, load in islice(waiting, 2 * size)]
        names: list[str] = []
        images: list[Tensor] = []
        while ahead:
            name, future = ahead.pop(0)
            ahead += [(name, pool.submit(load)) for name, load in islice(waiting, 1)]
            image = future.result()
            if images and (len(images) == size or image.shape != images[0].shape):
                yield Batch(names, torch.stack(images))
                names, images = [], []
            names.append(name)
            images.append(image)
        if images:
            yield Batch(names, torch.stack(images))


def _array(
    source: str, count: int, read: Callable[[slice], Any], convert: Callable[[Any, str], Tensor]
) -> Images:
    def batches(size: int) -> Iterator[Batch]:
        for start in range(0, count, size):
            stop = min(start + size, count)
            pixels = convert(read(slice(start, stop)), f"{source}, images {start} to {stop - 1}")
            yield Batch([f"image {n} of {source}" for n in range(start, stop)], pixels)

    return Images(source, count, batches)


def _read_stream(parts: Iterable[Any], size: int, convert: Callable[[Any, str], Tensor]) -> Iterator[Batch]:
    start = 0
    for part in parts:
        pixels = convert(part, f"images from number {start} on")
        for piece in pixels.split(size):
            yield Batch([f"image {n}" for n in range(start, start + len(piece))], piece)
            start += len(piece)


def to_bytes(images: Any, quantizer: str, value_range: tuple[float, float], name: str) -> Tensor:
    """Returns images as bytes (B, 3, H, W).

    Arguments:
        images: A tensor or array of bytes or floats, (B, C, H, W) or (B, H, W, C) with 1 or 3 channels.
        quantizer: How floats become bytes.
        value_range: What black and white are in floats.
        name: What the images are called in errors.

    Raises:
        ImageError: If the shape, the type or the range is wrong, or a number is not finite.
    """
    try:
        tensor = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(f"{name}: no tensor or array of numbers: {error}") from None
    if tensor.ndim != 4 or not tensor.numel() or not {tensor.shape[1], tensor.shape[3]} & {1, 3}:
        raise ImageError(f"{name}: shape {tuple(tensor.shape)}; expected (N, 3, H, W) or (N, H, W, 3)")
    if tensor.shape[1] not in (1, 3):
        tensor = tensor.movedim(-1, 1)
    if tensor.is_floating_point():
        low, high = value_range
        tensor = (tensor.float() - low) / (high - low)
        if not bool(tensor.isfinite().all()):
            raise ImageError(f"{name}: some pixels are not finite")
        least, most = float(tensor.amin()), float(tensor.amax())
        if least < -TOLERANCE or most > 1 + TOLERANCE:
            found = [round(low + value * (high - low), 3) for value in (least, most)]
            raise ImageError(f"{name}: pixels from {found[0]} to {found[1]}; expected {low} to {high}")
        tensor = quantize(tensor, quantizer)
    elif tensor.dtype != torch.uint8:
        raise ImageError(f"{name}: type {tensor.dtype}; expected bytes, or floats from {value_range[0]} to 1")
    return tensor.expand(-1, 3, -1, -1)


def digest(pixels: Tensor) -> list[bytes]:
    """Returns the SHA-256 of each image (B, 3, H, W) with its shape."""
    head = repr(tuple(pixels.shape[1:])).encode()
    arrays = pixels.cpu().contiguous().numpy()
    return [hashlib.sha256(head + array.tobytes()).digest() for array in arrays]

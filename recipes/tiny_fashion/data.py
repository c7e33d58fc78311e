"""Fashion-MNIST from its IDX files, padded to 32x32, colored, and served in an endless shuffled stream."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffaccelError
from diffaccel.zoo.fashion import CLASSES, COLORS

__all__ = ["DEBIAN_FOLDER", "Batch", "DataError", "Fashion", "Stream", "held_out", "load", "paint"]

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801  # unsigned bytes in 3 dimensions, and in 1
SIDE, PADDING = 28, 2


class DataError(DiffaccelError, ValueError):
    """A data file that is missing, damaged, or not what was expected."""


@dataclass(frozen=True)
class Fashion:
    """One split: ``grey`` of shape (N, 32, 32) in bytes, and the class numbers ``kinds`` of shape (N)."""

    grey: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class Batch:
    """``images`` of shape (B, 3, 32, 32) in [-1, 1], with class and color numbers of shape (B)."""

    images: Tensor
    kinds: Tensor
    colors: Tensor

    @property
    def labels(self) -> Tensor:
        """The label numbers, of shape (B)."""
        return len(CLASSES) * self.colors + self.kinds


def load(split: str, folder: str | Path = DEBIAN_FOLDER) -> Fashion:
    """Reads the "train" or the "test" split.

    Raises:
        DataError: If a file is missing, or does not have the form of the data set.
    """
    prefix = Path(folder) / {"train": "train", "test": "t10k"}[split]
    images = _read(Path(f"{prefix}-images-idx3-ubyte.gz"), IMAGES_MAGIC, (SIDE, SIDE))
    kinds = _read(Path(f"{prefix}-labels-idx1-ubyte.gz"), LABELS_MAGIC, ())
    if len(images) != len(kinds) or not len(images):
        raise DataError(f"{len(images)} images but {len(kinds)} labels in {str(folder)!r}; expected as many")
    if kinds.max() >= len(CLASSES):
        raise DataError(
            f"label {kinds.max()} in {prefix}-labels-idx1-ubyte.gz; expected 0 to {len(CLASSES) - 1}"
        )
    padded = np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    return Fashion(torch.from_numpy(padded), torch.from_numpy(kinds.astype(np.int64)))


def _read(file: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file: big-endian magic number and sizes, then bytes."""
    try:
        content = gzip.decompress(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"no file {str(file)!r}; install the data set with 'apt-get install dataset-fashion-mnist', "
            "or give the folder of its four .gz files with --data"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {str(file)!r}: {error}; expected a complete gzip file") from error
    header = 4 * (2 + len(shape))
    fields = np.frombuffer(content[:header], ">u4").tolist() if len(content) >= header else [0]
    if fields[0] != magic or tuple(fields[2:]) != shape:
        raise DataError(f"{str(file)!r} begins with {fields}; expected [{magic}, number, {shape}]")
    if len(content) - header != fields[1] * int(np.prod(shape)):
        raise DataError(f"{str(file)!r} has {len(content) - header} bytes of data; its header gives {fields}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(fields[1], *shape)


def paint(grey: Tensor, colors: Tensor) -> Tensor:
    """Multiplies grey images of shape (B, 32, 32) in bytes by their colors; (B, 3, 32, 32) in [-1, 1]."""
    factors = torch.tensor([(1.0, 1.0, 1.0), *COLORS.values()])[colors]
    return grey[:, None].float() / 127.5 * factors[:, :, None, None] - 1


class Stream:
    """An endless stream of colored images, each once per pass over the data, in a new order every time.

    Arguments:
        data: The images.
        generator: The source of the orders and the colors.
        flip: Whether to mirror half of the images.
    """

    def __init__(self, data: Fashion, generator: torch.Generator, flip: bool = False) -> None:
        self.data, self.generator, self.flip = data, generator, flip
        self.order = torch.empty(0, dtype=torch.int64)  # what is left of this pass

    def next(self, n: int) -> Batch:
        """Draws ``n`` images; half of them keep their grey values, and name no color."""
        while len(self.order) < n:
            again = torch.randperm(len(self.data.grey), generator=self.generator)
            self.order = torch.cat([self.order, again])
        chosen, self.order = self.order[:n], self.order[n:]
        colors = torch.randint(1, 1 + len(COLORS), (n,), generator=self.generator)
        colors *= torch.rand(n, generator=self.generator) < 0.5
        images = paint(self.data.grey[chosen], colors)
        if self.flip:
            mirrored = torch.rand(n, generator=self.generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return Batch(images, self.data.kinds[chosen], colors)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the data; the generator is saved by its owner."""
        return {"order": self.order.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a saved position."""
        self.order = state["order"].clone()


def held_out(data: Fashion, n: int) -> Batch:
    """Returns the first ``n`` images of a split in fixed colors."""
    return Stream(Fashion(data.grey[:n], data.kinds[:n]), torch.Generator().manual_seed(0)).next(
        min(n, len(data.grey))
    )

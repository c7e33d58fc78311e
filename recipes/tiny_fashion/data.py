"""Fashion-MNIST from its IDX files, padded to 32x32, colored, and served in an endless shuffled stream."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffaccelError, ModelError
from diffaccel.zoo.fashion import CLASSES, COLORS
from diffaccel.zoo.reference import IMAGES_MAGIC, LABELS_MAGIC, PADDING, SIDE, paint, read_idx

__all__ = ["DEBIAN_FOLDER", "Batch", "DataError", "Fashion", "Stream", "held_out", "load", "paint"]

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"


class DataError(DiffaccelError, ValueError):
    """A data file that is missing, damaged, or not what was expected."""


@dataclass(frozen=True)
class Fashion:
    """One split: ``grey`` of shape (N, 32, 32) in bytes, and the class numbers ``kinds`` of shape (N)."""

    grey: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> "Fashion":
        """Returns the split on a device."""
        return Fashion(self.grey.to(device), self.kinds.to(device))


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
    if not file.exists():
        raise DataError(
            f"no file {str(file)!r}; install the data set with 'apt-get install dataset-fashion-mnist', "
            "or give the folder of its four .gz files with --data"
        )
    try:
        return read_idx(file, magic, shape)
    except ModelError as error:
        raise DataError(str(error)) from error


class Stream:
    """An endless stream of colored images, each once per pass over the data, in a new order every time.

    Arguments:
        data: The images.
        generator: The source of the orders and the colors.
        flip: Whether to mirror half of the images.
    """

    def __init__(self, data: Fashion, generator: torch.Generator, flip: bool = False) -> None:
        self.data, self.generator, self.flip = data, generator, flip
        self.order = torch.empty(0, dtype=torch.int64, device=data.grey.device)  # what is left of this pass

    def next(self, n: int) -> Batch:
        """Draws ``n`` images; half of them keep their grey values, and name no color."""
        while len(self.order) < n:
            again = torch.randperm(len(self.data.grey), generator=self.generator, device=self.order.device)
            self.order = torch.cat([self.order, again])
        chosen, self.order = self.order[:n], self.order[n:]
        device = self.order.device
        colors = torch.randint(1, 1 + len(COLORS), (n,), generator=self.generator, device=device)
        colors *= torch.rand(n, generator=self.generator, device=device) < 0.5
        images = paint(self.data.grey[chosen], colors)
        if self.flip:
            mirrored = torch.rand(n, generator=self.generator, device=device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return Batch(images, self.data.kinds[chosen], colors)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the data; the generator is saved by its owner."""
        return {"order": self.order.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a saved position."""
        self.order = state["order"].to(self.order.device, copy=True)


def held_out(data: Fashion, n: int) -> Batch:
    """Returns the first ``n`` images of a split in fixed colors."""
    few = Fashion(data.grey[:n], data.kinds[:n])
    return Stream(few, torch.Generator(data.grey.device).manual_seed(0)).next(min(n, len(data.grey)))

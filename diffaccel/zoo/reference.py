"""The reference images of the zoo's models: the test split of Fashion-MNIST, in color."""

import functools
import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import ModelError
from diffaccel.zoo.fashion import CLASSES, COLORS

__all__ = ["paint", "read_idx", "reference"]

FOLDER = Path(__file__).parent / "fashion-mnist-test"
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801  # unsigned bytes in 3 dimensions, and in 1
SIDE, PADDING = 28, 2


def read_idx(file: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file: big-endian magic number and sizes, then bytes.

    Arguments:
        file: The gzip file.
        magic: The number that it begins with.
        shape: The expected shape of one item.

    Returns:
        Bytes (N, *shape).

    Raises:
        ModelError: If the file is missing, damaged, or another one.
    """
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(f"cannot read {str(file)!r}: {error}; expected a complete gzip file") from error
    header = 4 * (2 + len(shape))
    fields = np.frombuffer(content[:header], ">u4").tolist() if len(content) >= header else [0]
    if fields[0] != magic or tuple(fields[2:]) != shape:
        raise ModelError(f"{str(file)!r} begins with {fields}; expected [{magic}, number, {shape}]")
    if len(content) - header != fields[1] * int(np.prod(shape)):
        raise ModelError(
            f"{str(file)!r} has {len(content) - header} bytes of data; its header gives {fields}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(fields[1], *shape)


def paint(grey: Tensor, colors: Tensor) -> Tensor:
    """Multiplies grey images of shape (B, 32, 32) in bytes by their colors; (B, 3, 32, 32) in [-1, 1]."""
    factors = torch.tensor([(1.0, 1.0, 1.0), *COLORS.values()], device=colors.device)[colors]
    return grey[:, None].float() / 127.5 * factors[:, :, None, None] - 1


@functools.cache
def reference() -> tuple[Tensor, Tensor]:
    """Returns the 10,000 reference images as bytes (N, 3, 32, 32), and their label numbers (N).

    They are the test images that the models never saw; half of them keep their grey values, the others have
    one of the colors, as in training.

    Raises:
        ModelError: If the files that ship with the package are damaged.
    """
    grey = read_idx(FOLDER / "t10k-images-idx3-ubyte.gz", IMAGES_MAGIC, (SIDE, SIDE))
    kinds = torch.from_numpy(
        read_idx(FOLDER / "t10k-labels-idx1-ubyte.gz", LABELS_MAGIC, ()).astype(np.int64)
    )
    padded = torch.from_numpy(np.pad(grey, ((0, 0), (PADDING, PADDING), (PADDING, PADDING))))
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(1, 1 + len(COLORS), (len(padded),), generator=generator)
    colors *= torch.rand(len(padded), generator=generator) < 0.5
    images = (127.5 * (paint(padded, colors) + 1)).round().clamp(0, 255).to(torch.uint8)
    return images, len(CLASSES) * colors + kinds

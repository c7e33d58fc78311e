"""Cells of latents: places about which accelerators decide one by one, such as a transformer's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedPipeline

__all__ = ["WHOLE", "Cells"]

_SHARE = 0.25  # of a coarse token's cells, from which on the token is wanted


@dataclass(frozen=True)
class Cells:
    """A partition of every sample of a batch into T cells, in raster order.

    Arguments:
        batch: The number of samples B; of no use for whole samples.
        grid: The rows and columns of cells; (1, 1) for whole samples, (1, T) for sequences of tokens.
        patch: The side of a cell in latent pixels; 0 where cells are no squares of an image.
    """

    batch: int = 0
    grid: tuple[int, int] = (1, 1)
    patch: int = 0

    @classmethod
    def of(cls, shape: Sequence[int], patch: int) -> "Cells":
        """Returns the cells of latents.

        Arguments:
            shape: Their shape: (B, C, H, W), or (B, T, C) for a sequence of tokens.
            patch: The side of a cell; 0 for a sequence.

        Raises:
            UnsupportedPipeline: If the latents are of another kind.
        """
        if len(shape) == 3 and not patch:
            return cls(shape[0], (1, shape[1]))
        if len(shape) != 4 or not patch or shape[2] % patch or shape[3] % patch:
            kind = f"squares of {patch} pixels" if patch else "a sequence of tokens"
            raise UnsupportedPipeline(f"latents of shape {tuple(shape)} are not {kind}")
        return cls(shape[0], (shape[2] // patch, shape[3] // patch), patch)

    @property
    def count(self) -> int:
        """The cells of a sample, T."""
        return self.grid[0] * self.grid[1]

    def split(self, x: Tensor) -> Tensor:
        """Returns the cells of latents as samples of their own, (B T, *)."""
        if not self.patch:
            return x if self.count == 1 else x.flatten(0, 1)
        (high, wide), side = self.grid, self.patch
        parts = x.reshape(self.batch, x.shape[1], high, side, wide, side)
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def join(self, parts: Tensor) -> Tensor:
        """Returns the latents whose cells these are: the inverse of `split`."""
        if not self.patch:
            return parts if self.count == 1 else parts.unflatten(0, (self.batch, self.count))
        (high, wide), side = self.grid, self.patch
        x = parts.unflatten(0, (self.batch, high, wide)).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(self.batch, x.shape[1], high * side, wide * side)

    def side(self, tokens: int) -> int:
        """Returns the side of the squares that so many tokens stand for: 1, 2, 4, ... latent pixels.

        Raises:
            UnsupportedPipeline: If there is no such side.
        """
        (high, wide), side = self.grid, 1
        high, wide = high * max(self.patch, 1), wide * max(self.patch, 1)
        while -(-high // side) * -(-wide // side) > tokens:
            side *= 2
        if -(-high // side) * -(-wide // side) != tokens:
            raise UnsupportedPipeline(
                f"its blocks have {tokens} tokens, not those of {high} x {wide} latents; use tokens=0"
            )
        return side

    def pool(self, wanted: np.ndarray, tokens: int) -> np.ndarray:
        """Returns which tokens are wanted, bool (S, tokens): those of which a quarter of the cells is.

        Arguments:
            wanted: The cells that are wanted, bool (S, T), for any number S of samples.
            tokens: The number of tokens, each of which stands for a square.
        """
        side, patch = self.side(tokens), max(self.patch, 1)
        if side == patch:
            return wanted
        area = torch.as_tensor(wanted).reshape(-1, 1, *self.grid).float()
        if side < patch:
            return F.interpolate(area, scale_factor=patch // side).bool().flatten(1).numpy()
        share = F.avg_pool2d(area, side // patch, ceil_mode=True, count_include_pad=False)
        return (share >= _SHARE).flatten(1).numpy()

    def lattice(self, step: int, window: int) -> np.ndarray:
        """Returns one cell of every square of ``window`` x ``window``, bool (T), another one at each step.

        After ``window``^2 steps each cell has had its turn.
        """
        y, x = np.divmod(np.arange(self.count), self.grid[1])
        return (x + window * y) % window**2 == step % window**2


WHOLE = Cells()
"""Samples that are one cell each."""

r"""Saved checkpoints as the rows of one matrix, of which a combination is one pass.

.. math::
    \theta(\alpha) = \sum_k \alpha_k \theta_k

The K x P matrix is not copied: its rows are the files themselves, mapped slice by slice, so that no more than
a few slices are in memory however many checkpoints there are. If it is small it is read once and kept in
float32 on the device of the network, where a combination is one product.

Tensors that are the same in all checkpoints (frozen weights, position tables, integer buffers) are no part of
the matrix. Running statistics of batch norms are refused: they would have to be estimated again, and
diffusers' denoisers have none.
"""

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import OptionError
from .checkpoint_files import Checkpoint
from .checkpoints import CheckpointError

__all__ = ["RESIDENT", "CheckpointMatrix", "as_rows", "group_numbers", "targets_of"]

RESIDENT = 2 << 30
"""The largest matrix, in bytes of float32, that is kept in memory by default."""

_SLICE = 1 << 20
"""Entries of a slice: 8 MiB of float64, which stay in the cache of a CPU."""

_RUNNING = ("running_mean", "running_var")


class CheckpointMatrix:
    """Creates the matrix of some checkpoints, all of which are read once and checked.

    Arguments:
        checkpoints: The checkpoints, in the order of training; at least 2.
        groups: Beginnings of names: the tensors whose name begins so are a group with coefficients of its
            own, those of none are one more group, the last.
        device: Where the matrix is kept, if it is.
        resident: The largest matrix that is kept in memory, in bytes; 0 leaves it on disk.

    Raises:
        CheckpointError: If there is one checkpoint only, or names or shapes differ, or a weight is not
            finite, or what differs are integers or running statistics, or nothing differs.
        OptionError: If a group has no tensor.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], groups: Sequence[str] = (),
                 device: torch.device | str = "cpu", resident: int = RESIDENT) -> None:  # fmt: skip
        if len(checkpoints) < 2:
            raise CheckpointError(f"{len(checkpoints)} checkpoint; a combination needs at least 2")
        self.checkpoints = list(checkpoints)
        _check_alike(self.checkpoints)
        digest = hashlib.sha256()
        moving = [name for name in sorted(self.checkpoints[-1].pieces) if self._moves(name, digest)]
        if not moving:
            raise CheckpointError("the checkpoints are all the same; there is nothing to combine")
        self.digest = digest.hexdigest()
        """The SHA-256 of what the checkpoints hold."""
        numbers = group_numbers(moving, groups)
        self.groups = max(numbers.values()) + 1
        """The number G of groups."""
        self.names = sorted(moving, key=numbers.__getitem__)
        """The tensors that differ, group by group."""
        self.fixed = [name for name in self.checkpoints[-1].pieces if name not in numbers]
        """The tensors that do not."""
        self._numbers = numbers
        self._kept: Tensor | None = None
        if 4 * self.count * self.size <= resident:
            self._kept = self._load(torch.device(device))

    @property
    def count(self) -> int:
        """The number K of checkpoints."""
        return len(self.checkpoints)

    @property
    def size(self) -> int:
        """The number P of weights that differ."""
        return sum(self._piece(name).numel for name in self.names)

    def _piece(self, name: str) -> Any:
        return self.checkpoints[-1].pieces[name]

    def _moves(self, name: str, digest: Any) -> bool:
        """Returns whether a tensor is not the same in all checkpoints, and checks that it can be combined."""
        piece, moves = self._piece(name), False
        sums = [0] * self.count
        for start, stop in _slices(piece.numel):
            first = self.checkpoints[0].read(name, start, stop)
            for place, checkpoint in enumerate(self.checkpoints):
                values = checkpoint.read(name, start, stop)
                sums[place] = zlib.crc32(values.view(torch.uint8).numpy().data, sums[place])
                if values.is_floating_point() and not bool(values.isfinite().all()):
                    raise CheckpointError(f"{name!r} in {checkpoint.label!r} is not finite")
                moves = moves or not torch.equal(values.to(first.dtype), first)
        digest.update(f"{name} {piece.shape} {sums}".encode())
        if moves and not piece.dtype.is_floating_point:
            raise CheckpointError(
                f"{name!r} holds integers that differ between the checkpoints and cannot be combined; leave "
                "it out of the files"
            )
        if moves and name.endswith(_RUNNING):
            raise CheckpointError(
                f"{name!r} are running statistics of a batch norm, which would have to be estimated again"
            )
        return moves

    def _load(self, device: torch.device) -> Tensor:
        kept = torch.empty(self.count, self.size, device=device)
        for place, checkpoint in enumerate(self.checkpoints):
            done = 0
            for name in self.names:
                size = self._piece(name).numel
                kept[place, done : done + size].copy_(checkpoint.read(name))
                done += size
        return kept

    def targets(self, network: nn.Module) -> dict[str, Tensor]:
        """Returns the tensors of a network that a combination is written to; the fixed ones are written now.

        Raises:
            CheckpointError: If the network has other names or shapes.
        """
        shapes = {name: self._piece(name).shape for name in self.checkpoints[-1].pieces}
        found = targets_of(network, shapes, self.checkpoints[-1].label)
        with torch.no_grad():
            for name in self.fixed:
                found[name].copy_(self.checkpoints[-1].read(name).view(found[name].shape))
        return {name: found[name] for name in self.names}

    @torch.no_grad()
    def write(self, coefficients: Any, targets: Mapping[str, Tensor]) -> None:
        """Writes a combination, computed in float32 or better, in one pass over the matrix.

        Arguments:
            coefficients: With shape (K), or (G, K) for each group.
            targets: The tensors to write to, contiguous, by the names of the matrix.

        Raises:
            OptionError: If the coefficients have another shape.
        """
        rows = as_rows(coefficients, self.groups, self.count)
        if self._kept is None:
            for name in self.names:
                self._stream(name, rows[self._numbers[name]], targets[name].view(-1))
            return
        done = 0
        for group, row in enumerate(rows):
            names = [name for name in self.names if self._numbers[name] == group]
            sizes = [self._piece(name).numel for name in names]
            flat = _product(self._kept[:, done : done + sum(sizes)], row)
            parts = [part.view(targets[name].shape) for name, part in zip(names, flat.split(sizes))]  # noqa: B905
            torch._foreach_copy_([targets[name] for name in names], parts)
            done += sum(sizes)

    def _stream(self, name: str, row: np.ndarray, flat: Tensor) -> None:
        """Writes the combination of one tensor, slice by slice, accumulated in float64."""
        used = np.flatnonzero(row)
        for start, stop in _slices(len(flat)):
            total = self.checkpoints[used[0]].read(name, start, stop).double() * row[used[0]]
            for place in used[1:]:
                total.add_(self.checkpoints[place].read(name, start, stop).double(), alpha=row[place])
            flat[start:stop].copy_(total)

    def combine(self, coefficients: Any) -> dict[str, Tensor]:
        """Returns a combination as float32 tensors by name, without those that are the same in all."""
        made = {name: torch.empty(self._piece(name).shape) for name in self.names}
        self.write(coefficients, made)
        return made


def _slices(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _SLICE):
        yield start, min(start + _SLICE, count)


def _product(rows: Tensor, row: np.ndarray) -> Tensor:
    """Returns the combination of rows (K, P); one row alone to the bit."""
    used = np.flatnonzero(row)
    if len(used) == 1 and row[used[0]] == 1:
        return rows[used[0]]
    return torch.mv(rows.T, torch.tensor(row, dtype=rows.dtype, device=rows.device))


def as_rows(coefficients: Any, groups: int, count: int) -> np.ndarray:
    """Returns coefficients as float64 of shape (G, K), those of shape (K) being the same for all groups.

    Raises:
        OptionError: If they have another shape, are not finite, or are all 0.
    """
    rows = np.asarray(coefficients, dtype=np.float64)
    if rows.shape == (count,):
        rows = np.broadcast_to(rows, (groups, count))
    if rows.shape != (groups, count) or not np.isfinite(rows).all() or not rows.any(1).all():
        raise OptionError(
            f"coefficients of shape {rows.shape}; expected ({count},) or ({groups}, {count}), finite, not 0"
        )
    return rows


def group_numbers(names: Sequence[str], groups: Sequence[str]) -> dict[str, int]:
    """Returns the number of the group of each name: that of the first beginning that it has, or the last.

    Raises:
        OptionError: If a group has no tensor.
    """
    found = {name: next((n for n, start in enumerate(groups) if name.startswith(start)), len(groups))
             for name in names}  # fmt: skip
    for number, start in enumerate(groups):
        if number not in found.values():
            raise OptionError(f"no tensor of the group {start!r}; names are such as {names[0]!r}")
    return found


def targets_of(network: nn.Module, shapes: Mapping[str, Sequence[int]], label: str) -> dict[str, Tensor]:
    """Returns the tensors of a network by the names of a checkpoint, tied ones once.

    Arguments:
        network: The network.
        shapes: The shapes in the checkpoint; they may lack buffers, and all names but one of tied weights.
        label: What the checkpoint is called.

    Raises:
        CheckpointError: If names or shapes are other ones.
    """
    own = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers())}
    remedy = f"is it a checkpoint of this {type(network).__name__}?"
    for name, shape in shapes.items():
        if name not in own:
            raise CheckpointError(f"{label!r} has {name!r}, which the network has not; {remedy}")
        if tuple(own[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{name!r} has shape {tuple(shape)} in {label!r}, {tuple(own[name].shape)} in the network; "
                f"{remedy}"
            )
    there = {own[name].data_ptr() for name in shapes}
    for name, parameter in network.named_parameters():
        if parameter.data_ptr() not in there:
            raise CheckpointError(f"{label!r} lacks {name!r} of the network; {remedy}")
    return {name: own[name].data for name in shapes}


def _check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for name in sorted({*first.pieces} ^ {*other.pieces}):
            has, lacks = (first, other) if name in first.pieces else (other, first)
            raise CheckpointError(f"{has.label!r} has {name!r}, which {lacks.label!r} has not")
        for name, piece in first.pieces.items():
            theirs = other.pieces[name]
            if piece.shape != theirs.shape:
                raise CheckpointError(
                    f"{name!r} has shape {piece.shape} in {first.label!r}, {theirs.shape} in {other.label!r}"
                )
            if piece.dtype.is_floating_point != theirs.dtype.is_floating_point:
                raise CheckpointError(
                    f"{name!r} is {piece.dtype} in {first.label!r} and {theirs.dtype} in {other.label!r}"
                )

"""Evaluating a network on some samples of a batch: rows of its arguments, and of its outputs.

Guidance stacks whole batches, so that row r of a network's input belongs to sample r mod B, whatever the
order of the branches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UnsupportedPipeline

__all__ = ["gather_rows", "join_rows", "merge_rows", "rows_of", "take_rows"]

_SHARED = {"freqs_cis", "image_rotary_emb", "img_ids", "latent_ids", "rope_interpolation_scale", "rotary_emb",
           "txt_ids"}  # fmt: skip
"""The arguments that all rows share, however long they happen to be."""


def rows_of(samples: Sequence[int], batch: int, rows: int) -> list[int]:
    """Returns the rows of a network's input that belong to some samples.

    Arguments:
        samples: Positions in the batch.
        batch: The number of samples B.
        rows: The rows of the network's input, a multiple of B.
    """
    return [start + sample for start in range(0, rows, batch) for sample in samples]


def take_rows(value: Any, index: Sequence[int], size: int, name: str = "") -> Any:
    """Returns an argument of a network for some rows of its batch.

    Arguments:
        value: A tensor, a list with one entry a row, or a container of these; anything else is shared.
        index: The rows.
        size: The number of all rows.
        name: The argument's name.
    """
    if name in _SHARED:
        return value
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and len(value) == size
        return value[torch.as_tensor(index, device=value.device)] if batched else value
    if isinstance(value, dict):
        return {key: take_rows(item, index, size, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        tensors = any(isinstance(item, Tensor) and item.ndim > 0 and len(item) == size for item in value)
        if len(value) == size and not tensors:
            return type(value)([value[row] for row in index])
        return type(value)([take_rows(item, index, size) for item in value])
    return value


def join_rows(first: Any, second: Any, sizes: tuple[int, int], name: str = "") -> Any:
    """Returns an argument of a network for the rows of two batches, one after the other.

    Arguments:
        first: The argument for the first batch.
        second: The argument for the second batch, of the same structure.
        sizes: The rows of both batches.
        name: The argument's name.

    Raises:
        RuntimeError: If rows of the two have different shapes.
    """
    if name in _SHARED:
        return first
    if isinstance(first, Tensor):
        batched = first.ndim > 0 and (len(first), len(second)) == sizes
        return torch.cat([first, second]) if batched else first
    if isinstance(first, dict):
        return {key: join_rows(item, second[key], sizes, str(key)) for key, item in first.items()}
    if isinstance(first, (list, tuple)):
        if (len(first), len(second)) == sizes and not any(isinstance(item, Tensor) for item in first):
            return type(first)([*first, *second])
        return type(first)([join_rows(a, b, sizes) for a, b in zip(first, second, strict=True)])
    return first


def merge_rows(whole: Any, part: Any, index: Sequence[int], size: int) -> Any:
    """Returns a network's output ``whole`` with the rows ``index`` replaced by those of ``part``.

    Both are packed as the network packs its output; ``whole`` is left as it is.
    """
    leaves, structure = pytree.tree_flatten(whole)
    fresh = pytree.tree_leaves(part)
    if isinstance(whole, tuple) and leaves and len(leaves) == size and len(fresh) == len(index):
        for row, leaf in zip(index, fresh, strict=True):  # one tensor a row
            leaves[row] = leaf
        return pytree.tree_unflatten(leaves, structure)
    return pytree.tree_unflatten(
        [_merge(old, new, index, size) for old, new in zip(leaves, fresh, strict=True)], structure
    )


def _merge(old: Any, new: Any, index: Sequence[int], size: int) -> Any:
    if isinstance(old, Tensor) and old.ndim > 0 and len(old) == size:
        return old.index_copy(0, torch.as_tensor(index, device=old.device), new)
    return new


def gather_rows(parts: Sequence[Any], order: Sequence[int]) -> Any:
    """Returns a network's outputs for some rows each as one, packed as the first of them.

    Arguments:
        parts: The outputs.
        order: The rows of all of them, one output after the other.

    Raises:
        UnsupportedPipeline: If the outputs have different shapes.
    """
    leaves = [pytree.tree_leaves(part) for part in parts]
    shapes = {tuple(leaf.shape[1:] for leaf in own if isinstance(leaf, Tensor)) for own in leaves}
    if len(shapes) > 1:
        raise UnsupportedPipeline(f"the networks of the experts have outputs of different shapes: {shapes}")
    inverse = torch.as_tensor(order).argsort()

    def gathered(same: tuple[Any, ...]) -> Any:
        first = same[0]
        if not isinstance(first, Tensor):
            return first
        return torch.cat([leaf.to(first) for leaf in same])[inverse.to(first.device)]

    return pytree.tree_unflatten(
        [gathered(same) for same in zip(*leaves, strict=True)], pytree.tree_structure(parts[0])
    )

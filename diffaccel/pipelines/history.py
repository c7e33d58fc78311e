"""The last computed predictions of every sample of a batch, and polynomials through them.

Coordinates, and the weights made of them, are numbers as long as all samples share them, which they do where
none was skipped on its own, and arrays (B) else: this is done at every step, mostly for shared ones.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["History", "Shared", "lagrange_weights", "mix", "select"]

Shared = float | np.ndarray
"""A number for all samples, or an array (B) with one for each."""

_SAME = 1e-9


def lagrange_weights(nodes: Sequence[Shared], at: float) -> list[Shared]:
    """Returns the weights w_j = prod_{k != j} (u - u_k) / (u_j - u_k) of the polynomial through some nodes.

    Arguments:
        nodes: The coordinates u_j; numbers for all samples are distinct and finite.
        at: The coordinate u.

    Returns:
        One weight a node; they sum to 1. In arrays those that would not be finite are 0: all of a sample
        with an infinite node, and those of its repeated nodes.
    """
    weights: list[Shared] = []
    arrays = any(isinstance(node, np.ndarray) for node in nodes)
    with np.errstate(divide="ignore", invalid="ignore") if arrays else nullcontext():
        for j, node in enumerate(nodes):
            others = (other for k, other in enumerate(nodes) if k != j)
            weights.append(math.prod((at - other) / (node - other) for other in others))
    return [np.where(np.isfinite(weight), weight, 0.0) for weight in weights] if arrays else weights


def mix(weights: Sequence[Shared], values: Sequence[Tensor]) -> Tensor:
    """Returns sum_j w_j v_j for every sample, with values of shape (B, *)."""
    total = _factor(weights[0], values[0]) * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        if isinstance(weight, np.ndarray):
            total += _factor(weight, value) * value
        else:
            total.add_(value, alpha=weight)
    return total


def _factor(weight: Shared, value: Tensor) -> Tensor | float:
    if not isinstance(weight, np.ndarray):
        return weight
    factor = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
    return factor.reshape((-1,) + (1,) * (value.ndim - 1))


def select(mask: np.ndarray, this: Tensor, other: Tensor) -> Tensor:
    """Returns the samples of ``this`` where the mask (B) is true, and those of ``other`` elsewhere."""
    if mask.all() or not mask.any():
        return this if mask.all() else other
    choose = torch.as_tensor(mask, device=this.device)
    return torch.where(choose.reshape((-1,) + (1,) * (this.ndim - 1)), this, other)


class History:
    """The last values of every sample, each sample at coordinates of its own, the newest last.

    Arguments:
        size: The number of values kept.

    Attributes:
        values: So many tensors (B, *), once there is one.
        nodes: Their coordinates; -inf where a sample has no value.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[Tensor] = []
        self.nodes: list[Shared] = [-math.inf] * size

    def count(self) -> Any:
        """Returns the number of values known of each sample."""
        nodes: list[Any] = self.nodes
        return sum(node > -math.inf for node in nodes)

    def push(self, value: Tensor, coordinate: float, rows: np.ndarray | None = None) -> None:
        """Adds the value of some samples; at the coordinate of the last one it takes its place.

        Arguments:
            value: With shape (B, *).
            coordinate: The coordinate u.
            rows: The samples concerned, bool (B); None for all.
        """
        values, nodes = self.values or [torch.zeros_like(value)] * self.size, self.nodes
        newest: Any = nodes[-1]
        again = abs(newest - coordinate) < _SAME  # two-stage solvers repeat a level
        if rows is None and (again is False or not np.any(again)):
            self.values, self.nodes = [*values[1:], value], [*nodes[1:], coordinate]
            return
        rows = np.ones(len(value), bool) if rows is None else rows
        fresh = rows & ~np.full(len(value), again)
        if fresh.any():
            older = zip(values[1:], values, strict=False)
            values = [*(select(fresh, later, earlier) for later, earlier in older), values[-1]]
            nodes = [*(np.where(fresh, u, v) for u, v in zip(nodes[1:], nodes, strict=False)), nodes[-1]]
        last = coordinate if rows.all() else np.where(rows, coordinate, newest)
        self.values, self.nodes = [*values[:-1], select(rows, value, values[-1])], [*nodes[:-1], last]

    def predict(self, coordinate: float, order: int) -> Tensor:
        """Returns the value of the polynomial through the last ``order`` values, (B, *)."""
        return mix(lagrange_weights(self.nodes[-order:], coordinate), self.values[-order:])

    def interpolate(self, coordinate: float, order: int, newest: Tensor, at: float) -> Tensor:
        """Returns the polynomial through the last ``order - 1`` values and one more, (B, *).

        Arguments:
            coordinate: Where the polynomial is wanted.
            order: The number of values.
            newest: The further value, with shape (B, *).
            at: Its coordinate.
        """
        nodes = [*self.nodes[1 - order :], np.full(len(newest), at)]
        return mix(lagrange_weights(nodes, coordinate), [*self.values[1 - order :], newest])

    def distance(self, coordinate: float, order: int) -> Shared:
        """Returns prod_j |u - u_j| over the last ``order`` nodes: the growth of an error."""
        product: Any = math.prod(coordinate - node for node in self.nodes[-order:])
        return abs(product)

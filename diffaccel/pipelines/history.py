"""The last computed predictions of every sample of a batch, and polynomials through them."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["History", "lagrange_weights", "mix", "select"]


def lagrange_weights(nodes: np.ndarray, at: float) -> np.ndarray:
    """Returns the weights w_j = prod_{k != j} (u - u_k) / (u_j - u_k) of the polynomial through some nodes.

    Arguments:
        nodes: The coordinates u_j, distinct, with shape (n, B).
        at: The coordinate u.

    Returns:
        The weights, with shape (n, B); they sum to 1.
    """
    weights = np.ones_like(nodes)
    with np.errstate(divide="ignore", invalid="ignore"):  # samples that nobody asks for may repeat a node
        for j in range(len(nodes)):
            for k in range(len(nodes)):
                if k != j:
                    weights[j] *= (at - nodes[k]) / (nodes[j] - nodes[k])
    return np.where(np.isfinite(weights), weights, 0.0)


def mix(weights: np.ndarray, values: Tensor) -> Tensor:
    """Returns sum_j w_j v_j for every sample; weights (n, B), values (n, B, *)."""
    factors = torch.as_tensor(weights, dtype=values.dtype, device=values.device)
    return (factors.reshape(factors.shape + (1,) * (values.ndim - 2)) * values).sum(0)


def select(mask: np.ndarray, this: Tensor, other: Tensor) -> Tensor:
    """Returns the samples of ``this`` where the mask (B) is true, and those of ``other`` elsewhere."""
    if mask.all() or not mask.any():
        return this if mask.all() else other
    choose = torch.as_tensor(mask, device=this.device)
    return torch.where(choose.reshape((-1,) + (1,) * (this.ndim - 1)), this, other)


class History:
    """The last ``size`` values of every sample, each sample at coordinates of its own, the newest last.

    Arguments:
        size: The number of values kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.values = torch.empty(0)
        self.nodes = np.empty((0, 0))

    def clear(self) -> None:
        """Forgets everything."""
        self.values, self.nodes = torch.empty(0), np.empty((0, 0))

    @property
    def count(self) -> np.ndarray:
        """The number of values known of each sample, with shape (B)."""
        return np.isfinite(self.nodes).sum(0)

    def push(self, value: Tensor, coordinate: float, rows: np.ndarray) -> None:
        """Adds the value of some samples; at the coordinate of the last one it takes its place.

        Arguments:
            value: With shape (B, *).
            coordinate: The coordinate u.
            rows: The samples concerned, bool (B).
        """
        if not self.nodes.size:
            self.nodes = np.full((self.size, len(value)), -np.inf)
            self.values = value.new_zeros((self.size, *value.shape))
        again = rows & (np.abs(self.nodes[-1] - coordinate) < 1e-9)  # two-stage solvers repeat a level
        fresh = rows & ~again
        if fresh.all():
            self.values = torch.cat([self.values[1:], value[None]])
            self.nodes[:-1] = self.nodes[1:]
        else:
            shifted = select(fresh, self.values.roll(-1, 0).transpose(0, 1), self.values.transpose(0, 1))
            self.values = shifted.transpose(0, 1).contiguous()
            self.values[-1] = select(rows, value, self.values[-1])
            self.nodes[:-1, fresh] = self.nodes[1:, fresh]
        self.nodes[-1, rows] = coordinate

    def predict(self, coordinate: float, order: int) -> Tensor:
        """Returns the value of the polynomial through the last ``order`` values, (B, *)."""
        return mix(lagrange_weights(self._last(order), coordinate), self.values[-order:])

    def interpolate(self, coordinate: float, order: int, newest: Tensor, at: float) -> Tensor:
        """Returns the polynomial through the last ``order - 1`` values and one more, (B, *).

        Arguments:
            coordinate: Where the polynomial is wanted.
            order: The number of values.
            newest: The further value, with shape (B, *).
            at: Its coordinate.
        """
        nodes = np.concatenate([self._last(order - 1), np.full((1, self.nodes.shape[1]), at)])
        values = torch.cat([self.values[1 - order :], newest[None]])
        return mix(lagrange_weights(nodes, coordinate), values)

    def distance(self, coordinate: float, order: int) -> np.ndarray:
        """Returns prod_j |u - u_j| over the last ``order`` nodes, (B): the growth of an error."""
        return np.abs(coordinate - self.nodes[-order:]).prod(0)

    def _last(self, order: int) -> np.ndarray:
        """Returns nodes that are distinct, where values are missing: such samples are not to be predicted."""
        nodes = self.nodes[-order:]
        return np.where(np.isfinite(nodes), nodes, -1e6 - np.arange(len(nodes))[::-1, None])

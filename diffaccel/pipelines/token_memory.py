"""What parts of a network gave for every token: the last two values, which are continued to the present."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["TokenMemory"]


class TokenMemory:
    """The values that a network's parts gave to all rows of a batch, for one branch of guidance.

    Tokens are computed at different times.  The value v of one that is missing now, at u, is continued
    linearly from the last two, v(u) = v_1 + (v_1 - v_0) (u - u_1) / (u_1 - u_0), or taken as it was.

    Arguments:
        linear: Whether values are continued.
    """

    def __init__(self, linear: bool) -> None:
        self.linear = linear
        self._values: dict[Any, list[Tensor]] = {}
        self._times: dict[int, list[Tensor]] = {}

    def begin(self, now: float, tokens: int, rows: Tensor | None, index: Tensor) -> Tensor | None:
        """Begins an evaluation in which some tokens are computed, and returns the weights of the others.

        Arguments:
            now: The coordinate u.
            tokens: The number of all tokens.
            rows: The rows that are evaluated; None for all.
            index: The tokens that are computed, (rows, n).

        Returns:
            The weights (u - u_1) / (u_1 - u_0), and 0 for tokens that are computed, (rows, tokens); None
            for 0 everywhere.
        """
        new, old = (_taken(times, rows) for times in self._times[tokens])
        last = new.gather(1, index)
        old.scatter_(1, index, last)
        new.scatter_(1, index, now)
        gap = new - old
        weights = ((now - new) / gap).where(gap.abs() > 1e-9, 0.0).scatter(1, index, 0.0)
        for times, fresh in zip(self._times[tokens], (new, old), strict=True):
            _put(times, fresh, rows)
        return weights.to(torch.float32) if self.linear else None

    def begin_whole(self, now: float, tokens: int, size: int, rows: Tensor | None, device: Any) -> None:
        """Begins an evaluation in which all tokens of some rows are computed.

        Arguments:
            now: The coordinate u.
            tokens: The number of all tokens.
            size: The number of rows that are evaluated.
            rows: These rows; None for all.
            device: Where the tokens are.
        """
        time = torch.full((size, tokens), now, dtype=torch.float64, device=device)
        self._times[tokens] = _pushed(self._times.get(tokens), time, rows)

    def remember(self, key: Any, value: Tensor, rows: Tensor | None) -> None:
        """Takes a value of all tokens.

        Arguments:
            key: What gave it.
            value: With the rows first.
            rows: The rows that were evaluated; None for all.
        """
        self._values[key] = _pushed(self._values.get(key), value, rows)

    def complete(
        self, key: Any, fresh: Tensor, dim: int, rows: Tensor | None, index: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Takes a value of some tokens, and returns that of all tokens.

        Arguments:
            key: What gave it.
            fresh: The value of the tokens that were computed.
            dim: The dimension of its tokens.
            rows: The rows that were evaluated; None for all.
            index: The tokens that were computed, (rows, n).
            weights: What `begin` has returned.
        """
        new, old = (_taken(values, rows) for values in self._values[key])
        place = _along(index, dim, fresh.ndim).expand_as(fresh)
        if self.linear:
            old.scatter_(dim, place, new.gather(dim, place))
        new.scatter_(dim, place, fresh)
        for values, changed in zip(self._values[key], (new, old), strict=True):
            _put(values, changed, rows)
        if weights is None:
            return new.clone()
        return torch.lerp(new, old, -_along(weights.to(new.dtype), dim, new.ndim))


def _pushed(known: list[Tensor] | None, newest: Tensor, rows: Tensor | None) -> list[Tensor]:
    """Returns the last two values, of which the newest is that of some rows, or of all of them."""
    if rows is None or known is None:
        usable = known is not None and known[0].shape == newest.shape
        return [newest, known[0] if known and usable else newest.clone()]
    known[1].index_copy_(0, rows, known[0][rows])
    known[0].index_copy_(0, rows, newest)
    return known


def _taken(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _put(tensor: Tensor, value: Tensor, rows: Tensor | None) -> None:
    if rows is not None:
        tensor.index_copy_(0, rows, value)


def _along(table: Tensor, dim: int, ndim: int) -> Tensor:
    """Returns a table (rows, tokens) with its second dimension in another place, and dimensions of 1 else."""
    shape = [1] * ndim
    shape[0], shape[dim] = table.shape
    return table.reshape(shape)

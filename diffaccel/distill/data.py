"""What a step of training is given: samples by number, the same ones however they are divided."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import OptionError
from .draws import Draws
from .host import Host, Inputs
from .pair_store import PairStore
from .shards import Condition

__all__ = ["Batch", "Data", "PairData"]

Wanted = Callable[[str], tuple[Condition, ...] | None]
"""The conditions of a turn, or None for all."""


@dataclass(frozen=True)
class Batch:
    """B samples of one turn.

    Arguments:
        x0: The clean samples (B, *).
        noise: The noise that each is coupled with (B, *).
        inputs: What the networks are given besides sample and time.
        draws: The random numbers of these samples.
        images: How many samples the turn's network had been trained on before this update.
        whole: What gives a batch of these numbers of all conditions, where this one is of some; else None.
    """

    x0: Tensor
    noise: Tensor
    inputs: Inputs
    draws: Draws
    images: int
    whole: "Callable[[], Batch] | None" = None

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def unfiltered(self) -> "Batch":
        """The batch of all conditions."""
        return self if self.whole is None else self.whole()


class Data(Protocol):
    """A source of batches; what it returns depends on nothing but its arguments."""

    def batch(self, numbers: Sequence[int], turn: str, images: int) -> Batch:
        """Returns the samples of these numbers, each at least 0 and without an upper end."""


class PairData:
    """Pairs of a store, each once in an epoch.

    Arguments:
        store: The store.
        host: The pipeline that encodes the conditions.
        seed: The seed of the order and of all draws.
        device: Where the batches shall be.
        wanted: The conditions of a turn, such as `Method.conditions`; None for all.
    """

    def __init__(self, store: PairStore, host: Host, seed: int, device: torch.device,
                 wanted: Wanted = lambda turn: None) -> None:  # fmt: skip
        self.store, self.host, self.seed, self.device = store, host, seed, device
        self._wanted = wanted
        self._places: dict[tuple[Condition, ...], list[int]] = {}

    def batch(self, numbers: Sequence[int], turn: str, images: int) -> Batch:
        """Returns pairs; turns of different networks see the same order, and draws of their own.

        Raises:
            OptionError: If there are no pairs of the conditions of the turn.
        """
        wanted = self._wanted(turn)
        if wanted is None:
            return self._made(numbers, None, turn, images)

        def whole() -> Batch:  # asked for within a step, whose mixed precision is for the networks alone
            kinds = {"cpu", self.device.type}
            with ExitStack() as stack:
                for kind in kinds:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                return self._made(numbers, None, turn, images)

        return replace(self._made(numbers, self._among(wanted), turn, images), whole=whole)

    def _made(self, numbers: Sequence[int], among: Sequence[int] | None, turn: str, images: int) -> Batch:
        x0, noise, conditions = self.store.rows([self.store.order(self.seed, n, among) for n in numbers])
        inputs: Any = self.host.encode(conditions)
        return Batch(
            x0.to(self.device), noise.to(self.device), inputs.to(self.device),
            Draws(self.seed, numbers, turn, self.device), images,
        )  # fmt: skip

    def _among(self, wanted: tuple[Condition, ...]) -> Sequence[int]:
        """Returns the pairs with some conditions."""
        if wanted not in self._places:
            own = set(wanted)
            known = [condition in own for condition in self.store.conditions]
            self._places[wanted] = [n for n in range(len(self.store)) if known[n % len(known)]]
        if not self._places[wanted]:
            raise OptionError(f"no pairs of the conditions {wanted[:8]}")
        return self._places[wanted]

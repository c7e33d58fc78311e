"""What a step of training is given: samples by number, the same ones however they are divided."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .draws import Draws
from .host import Host, Inputs
from .pair_store import PairStore

__all__ = ["Batch", "Data", "PairData"]


@dataclass(frozen=True)
class Batch:
    """B samples of one turn.

    Arguments:
        x0: The clean samples (B, *).
        noise: The noise that each is coupled with (B, *).
        inputs: What the networks are given besides sample and time.
        draws: The random numbers of these samples.
        images: How many samples the turn's network had been trained on before this update.
    """

    x0: Tensor
    noise: Tensor
    inputs: Inputs
    draws: Draws
    images: int

    def __len__(self) -> int:
        return len(self.x0)


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
    """

    def __init__(self, store: PairStore, host: Host, seed: int, device: torch.device) -> None:
        self.store, self.host, self.seed, self.device = store, host, seed, device

    def batch(self, numbers: Sequence[int], turn: str, images: int) -> Batch:
        """Returns pairs; turns of different networks see the same order, and draws of their own."""
        x0, noise, conditions = self.store.rows([self.store.order(self.seed, n) for n in numbers])
        inputs: Any = self.host.encode(conditions)
        return Batch(
            x0.to(self.device), noise.to(self.device), inputs.to(self.device),
            Draws(self.seed, numbers, turn, self.device), images,
        )  # fmt: skip

"""Random numbers that belong to samples: the same in any batch, on any number of processes, after a resume.

A generator for a whole batch ties a sample to its neighbors: with another number of processes, or another
size of the part of a batch that is computed at once, all draws change. Here each sample has its own
generator, whose seed is made from the run's seed, the sample's number and the purpose; so a run's state has
no random numbers in it, only a count of samples.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Draws", "seed_of"]


def seed_of(*parts: int | str) -> int:
    """Returns a seed in [0, 2^63) that all of the parts decide."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Draws:
    """The random numbers of some samples, in the order in which they are asked for.

    All are drawn on the CPU, in float32, so that they do not depend on the device.

    Arguments:
        seed: The seed of the run.
        numbers: The number of each of the B samples; samples of one number have the same draws.
        purpose: What the draws are for; draws for another purpose are independent.
        device: Where the numbers are needed.
    """

    def __init__(self, seed: int, numbers: Sequence[int], purpose: str = "",
                 device: torch.device | str = "cpu") -> None:  # fmt: skip
        self.numbers, self.device = tuple(numbers), torch.device(device)
        self._generators = [
            torch.Generator().manual_seed(seed_of(seed, number, purpose)) for number in self.numbers
        ]

    def __len__(self) -> int:
        return len(self.numbers)

    def uniform(self, *shape: int) -> Tensor:
        """Returns numbers in [0, 1), with shape (B, *shape)."""
        return self._stack([torch.rand(shape, generator=generator) for generator in self._generators])

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal numbers, with shape (B, *shape)."""
        return self._stack([torch.randn(shape, generator=generator) for generator in self._generators])

    def integers(self, high: int) -> Tensor:
        """Returns whole numbers in [0, high), with shape (B)."""
        drawn = [torch.randint(high, (), generator=generator) for generator in self._generators]
        return self._stack(drawn)

    def _stack(self, parts: list[Tensor]) -> Tensor:
        stacked = torch.stack(parts)
        if self.device.type == "cuda":  # a copy from pageable memory would wait for the device
            return stacked.pin_memory().to(self.device, non_blocking=True)
        return stacked.to(self.device)

"""The noise that a pipeline draws with one generator a sample, drawn again from the seeds alone.

Pipelines draw in the type of their networks or in float32, and some pack what they have drawn: patches of
latents become tokens. Packing moves numbers and computes none, so it is an order in which the flat noise is
read. Type and order are found by comparison, so that nothing is known about single pipelines.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["DTYPES", "ROWS", "NoiseSource", "is_scaled", "packed_source", "plain_source"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types in which noise is drawn, by name."""

ROWS = 8
"""The samples that tell an order: even in 16 bits, no two places have the same numbers in all of them."""


class NoiseSource:
    """Standard normal noise; that of sample n depends on the seed + n only.

    Arguments:
        seed: The seed of sample 0; as in `diffaccel.eval.Sampler` the next sample has the next one.
        shape: The shape of a sample, without the batch.
        dtype: The type in which it is drawn, on the CPU.
        order: Where in the flat drawn noise each number of a flat sample is, or None if it is not packed.
    """

    def __init__(self, seed: int, shape: Sequence[int], dtype: torch.dtype = torch.float32,
                 order: Tensor | None = None) -> None:  # fmt: skip
        self.seed, self.shape, self.dtype, self.order = seed, tuple(shape), dtype, order

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Returns the noise of some samples, with shape (B, *), in the type in which it is drawn."""
        size = math.prod(self.shape)
        generators = [torch.Generator().manual_seed((self.seed + n) % 2**63) for n in numbers]
        # what is drawn depends on how many numbers there are, and not on their shape
        drawn = [torch.randn(size, generator=generator, dtype=self.dtype) for generator in generators]
        flat = torch.stack(drawn)
        if self.order is not None:
            flat = flat[:, self.order.long()]
        return flat.view(len(numbers), *self.shape)


def is_scaled(noise: Tensor, sample: Tensor, scale: float) -> bool:
    """Returns whether a sample (B, *) is noise (B, *) times a scale, to the rounding of the sample's type."""
    expected = (noise.to(sample.dtype) * scale).double()
    rounding = 2 * torch.finfo(sample.dtype).eps
    return torch.allclose(expected, sample.cpu().double(), rtol=rounding, atol=0.0)


def plain_source(seed: int, samples: Tensor, scale: float) -> NoiseSource | None:
    """Returns the source of the samples 0 to R - 1 if they are not packed, or None.

    Arguments:
        seed: The seed of sample 0.
        samples: What a pipeline's solver starts from, with shape (R, *).
        scale: The standard deviation of what it starts from.
    """
    for dtype in dict.fromkeys((samples.dtype, *DTYPES.values())):
        source = NoiseSource(seed, samples.shape[1:], dtype)
        if is_scaled(source.rows(range(len(samples))), samples, scale):
            return source
    return None


def packed_source(seed: int, samples: Tensor, scale: float) -> NoiseSource | None:
    """Returns the source of the samples 0 to R - 1 if they are packed noise, or None; R is `ROWS`."""
    theirs = np.lexsort(samples.flatten(1).float().cpu().numpy())
    for dtype in dict.fromkeys((samples.dtype, *DTYPES.values())):
        source = NoiseSource(seed, samples.shape[1:], dtype)
        drawn = (source.rows(range(len(samples))).to(samples.dtype) * scale).flatten(1)
        order = torch.empty(drawn.shape[1], dtype=torch.int64)
        order[torch.from_numpy(theirs)] = torch.from_numpy(np.lexsort(drawn.float().numpy()))
        source.order = order.int()
        if is_scaled(source.rows(range(len(samples))), samples, scale):
            return source
    return None

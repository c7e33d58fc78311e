"""The objective of tiny-fashion-mar: the error of its token head at masked tokens of the zoo's latents.

References:
    | Autoregressive Image Generation without Vector Quantization (Li et al., 2024)
    | https://arxiv.org/abs/2406.11838
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffaccel.pipelines.mar_loss import draw_mask_ratio, draw_times, head_loss
from recipes.tiny_fashion.data import Batch
from recipes.tiny_fashion.models import Networks
from recipes.tiny_fashion.objectives import LEVELS, Latents

__all__ = ["MaskedTokens"]

KIND = "diffusion"
RATIOS = (1.0, 0.7, 0.4, 0.1)  # of masked tokens in the held-out loss


class MaskedTokens(Latents):
    """The squared error of the noise at masked tokens, with one part of masked tokens a batch."""

    repeat = 2  # noise levels a masked token: the head is cheaper than the trunk

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns the mean error at random times."""
        network = networks["transformer"]
        null = torch.rand(len(batch.images), generator=generator) < self.null
        tokens = network.patchify(self.encode(batch.images, generator))
        order = torch.rand(tokens.shape[:2], generator=generator).argsort(1)
        labels = batch.labels.masked_fill(null, network.null_label)
        rows, condition = self._masked(network, tokens, order, draw_mask_ratio(generator), labels)
        times = draw_times(KIND, len(rows), generator)
        return self._errors(network, rows, condition, times, generator).mean()

    @torch.no_grad()
    def held_out(self, networks: Networks, batch: Batch) -> dict[str, float]:
        """Returns the error at each of ``RATIOS`` and ``LEVELS``, with fixed noise, and their mean."""
        network = networks["transformer"]
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        tokens = network.patchify(self.encode(batch.images))
        order = torch.rand(tokens.shape[:2], generator=generator).argsort(1)
        result = {}
        for ratio in RATIOS:
            rows, condition = self._masked(network, tokens, order, ratio, batch.labels)
            for level in LEVELS:
                times = torch.full((len(rows),), round(1000 * level))
                errors = self._errors(network, rows, condition, times, generator)
                result[f"r={ratio} t={level}"] = errors.mean().item()
        return {**result, "mean": sum(result.values()) / len(result)}

    def _masked(
        self, network: Any, tokens: Tensor, order: Tensor, ratio: float, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns all masked tokens (R, c), ``repeat`` times, and their conditions (R, D)."""
        masked, known = order.tensor_split([math.ceil(ratio * order.shape[1])], dim=1)
        image = torch.arange(len(order))[:, None]
        with self._faster():
            condition = network(tokens, known, labels).sample[image, masked]
        rows = (part.flatten(0, 1).repeat(self.repeat, 1) for part in (tokens[image, masked], condition))
        return next(rows), next(rows)

    def _errors(
        self, network: Any, rows: Tensor, condition: Tensor, times: Tensor, generator: torch.Generator
    ) -> Tensor:
        noise = torch.randn(rows.shape, generator=generator)
        with self._faster():
            return head_loss(KIND, network.head, rows, condition, times, noise)

    @contextlib.contextmanager
    def _faster(self) -> Iterator[None]:
        """Computes in bfloat16, and without the fused attention, whose backward pass is slow on a CPU."""
        device = torch.get_default_device().type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16), sdpa_kernel(SDPBackend.MATH):
            yield

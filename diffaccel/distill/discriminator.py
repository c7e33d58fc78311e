"""A diffusion discriminator: a small head on the features in the middle of a network.

References:
    Improved Distribution Matching Distillation for Fast Image Synthesis (2024), arXiv 2405.14867
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedPipeline
from ..pipelines.routed import Routed

__all__ = ["Features", "Head", "middle_of"]


def middle_of(network: nn.Module) -> nn.Module:
    """Returns the block in the middle of a network: that of a U-Net, or of the longest list of blocks.

    Raises:
        UnsupportedPipeline: If it has neither, or is several networks in turn.
    """
    if isinstance(network, Routed):
        raise UnsupportedPipeline("a discriminator takes features of one network, not of several in turn")
    block = getattr(network, "mid_block", None)
    if isinstance(block, nn.Module):
        return block
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList) and len(child)]
    if not lists:
        raise UnsupportedPipeline(f"{type(network).__name__} has no list of blocks to take features from")
    longest = max(lists, key=len)
    return longest[len(longest) // 2]


class Features:
    """What the middle of a network made in its last call.

    Arguments:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._last: Tensor | None = None
        middle_of(network).register_forward_hook(self._note)

    def take(self) -> Tensor:
        """Returns the features of the last call, (B, C, L) for L positions, and forgets them."""
        last, self._last = self._last, None
        assert last is not None, "the network was not called"
        return last.transpose(1, 2) if last.ndim == 3 else last.flatten(2)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = output if isinstance(output, Tensor) else output[-1]


class Head(nn.Module):
    """Says of each position whether its features are those of real samples: above 0, or made ones.

    Arguments:
        channels: The number C of features.
        seed: Decides the weights; the global generator is left as it is.
        width: The number of hidden features.
    """

    def __init__(self, channels: int, seed: int = 0, width: int = 256) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.GroupNorm(1, channels), nn.Conv1d(channels, width, 1), nn.SiLU(), nn.Conv1d(width, 1, 1)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Returns a number for each position, (B, 1, L), of features (B, C, L)."""
        judged: Tensor = self.layers(features.to(next(self.parameters()).dtype))
        return judged

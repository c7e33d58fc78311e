r"""The token head of MAR: a small network that denoises single tokens, given what the trunk says of them.

References:
    | Autoregressive Image Generation without Vector Quantization (Li et al., 2024)
    | https://arxiv.org/abs/2406.11838
"""

from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

__all__ = ["FREQUENCIES", "MARHead"]

FREQUENCIES = 256
"""The width of the sinusoidal embedding of a timestep."""

EPS = 1e-6


class MARHead(nn.Module):
    r"""Predicts the noise (or velocity) of tokens, each on its own: no row sees another one.

    With the condition :math:`y = \mathrm{MLP}(t) + c` a block is
    :math:`h \leftarrow h + g(y) \, \mathrm{MLP}(\mathrm{LN}(h) (1 + s(y)) + b(y))` (arXiv 2406.11838, 4.2);
    modulations and output begin at zero, so that a new head predicts exactly 0.

    Arguments:
        channels: The channels c of a token.
        out_channels: The channels of the prediction: c, or 2 c with a learned variance.
        condition: The width D of the trunk's condition.
        width: The width W of the head.
        layers: The number of blocks.
    """

    def __init__(self, channels: int, out_channels: int, condition: int, width: int, layers: int) -> None:
        super().__init__()
        self.channels = channels
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(condition, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(layers))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.output = nn.Linear(width, out_channels)
        self._reset()

    def _reset(self) -> None:
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if name == "output" or "modulation" in name:
                nn.init.zeros_(module.weight)
            elif name.startswith("time"):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)

    def embed(self, condition: Tensor) -> Tensor:
        """Returns the trunk's condition (R, D) as `forward` takes it, (R, W); once for a loop of steps."""
        return self.condition(condition)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Evaluates the head.

        Arguments:
            sample: The noisy tokens, with shape (R, c).
            timestep: The times in 0 ... 1000, with shape (R), or (1) for one time of all rows.
            condition: What `embed` has made of the trunk's condition, with shape (R, W).

        Returns:
            The prediction, with shape (R, out_channels).
        """
        waves = get_timestep_embedding(timestep, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        given = self.time(waves.to(condition.dtype)) + condition
        hidden = self.input(sample)
        for block in self.blocks:
            hidden = block(hidden, given)
        shift, scale = self.modulation(given).chunk(2, dim=-1)
        hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=EPS)
        return self.output(hidden * (1 + scale) + shift)


class HeadBlock(nn.Module):
    """A residual block of the head, modulated by the time and the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        """Evaluates the block on rows (R, W)."""
        shift, scale, gate = self.modulation(given).chunk(3, dim=-1)
        return hidden + gate * self.mlp(self.norm(hidden) * (1 + scale) + shift)

r"""The masked autoregressive transformer: known tokens in, a condition for every other position out.

References:
    | Autoregressive Image Generation without Vector Quantization (Li et al., 2024)
    | https://arxiv.org/abs/2406.11838
    | Masked Autoencoders Are Scalable Vision Learners (He et al., 2022), https://arxiv.org/abs/2111.06377
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ..errors import OptionError
from .mar_head import EPS, MARHead

__all__ = ["MARBlock", "MARTransformer2DModel"]


class MARTransformer2DModel(ModelMixin, ConfigMixin):
    r"""The trunk of MAR, with the head that draws tokens as its part ``head``.

    An image or latent (B, C, H, W) is N = H W / p^2 tokens of c = C p^2 channels, rows first.  The encoder
    sees the known tokens and some buffer tokens that carry the class; the decoder sees these and a mask token
    at every other position, and gives a condition z for each of these (arXiv 2406.11838, 3.4).

    Arguments:
        sample_size: The height and width of the latent or image.
        patch_size: The side p of a token's patch.
        in_channels: The channels C.
        num_classes: The number of classes; the label ``num_classes`` is the learned "no class".
        num_attention_heads: The attention heads of a block.
        attention_head_dim: The width of one of them; the trunk's width D is their product.
        num_encoder_layers: The blocks of the encoder.
        num_decoder_layers: The blocks of the decoder.
        num_buffer_tokens: The buffer tokens Bf.
        mlp_ratio: The width of the blocks' hidden layers, in D.
        head_width: The width W of the head.
        head_layers: The blocks of the head.
        learned_variance: Whether the head predicts a variance beside the noise.
        mean: What is subtracted from latents or pixels to make tokens.
        std: What they are then divided by.

    Raises:
        OptionError: If the patches do not tile the sample.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MARBlock"]

    @register_to_config
    def __init__(
        self, sample_size: int = 16, patch_size: int = 1, in_channels: int = 16, num_classes: int = 1000,
        num_attention_heads: int = 12, attention_head_dim: int = 64, num_encoder_layers: int = 12,
        num_decoder_layers: int = 12, num_buffer_tokens: int = 64, mlp_ratio: float = 4.0,
        head_width: int = 1024, head_layers: int = 6, learned_variance: bool = True, mean: float = 0.0,
        std: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if sample_size % patch_size:
            raise OptionError(f"patches of side {patch_size} do not tile a sample of side {sample_size}")
        width, heads = num_attention_heads * attention_head_dim, num_attention_heads
        self.num_tokens = (sample_size // patch_size) ** 2
        self.channels = in_channels * patch_size**2
        self.null_label = num_classes
        length = num_buffer_tokens + self.num_tokens
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.input = nn.Linear(self.channels, width)
        self.input_norm = nn.LayerNorm(width, eps=EPS)
        self.encoder_positions = nn.Parameter(torch.empty(1, length, width))
        self.encoder = nn.ModuleList(MARBlock(width, heads, mlp_ratio) for _ in range(num_encoder_layers))
        self.encoder_norm = nn.LayerNorm(width, eps=EPS)
        self.decoder_input = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_positions = nn.Parameter(torch.empty(1, length, width))
        self.decoder = nn.ModuleList(MARBlock(width, heads, mlp_ratio) for _ in range(num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        self.output_positions = nn.Parameter(torch.empty(1, self.num_tokens, width))
        out_channels = (1 + learned_variance) * self.channels
        self.gradient_checkpointing = False
        self._reset()
        self.head = MARHead(self.channels, out_channels, width, head_width, head_layers)

    def _reset(self) -> None:
        for parameter in (self.class_embedding.weight, self.mask_token, self.encoder_positions,
                          self.decoder_positions, self.output_positions):  # fmt: skip
            nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patchify(self, sample: Tensor) -> Tensor:
        """Returns tokens (B, N, c) of a latent or image (B, C, H, W); a token's order is (C, row, column)."""
        side, grid = self.config.patch_size, self.config.sample_size // self.config.patch_size
        parts = sample.reshape(len(sample), -1, grid, side, grid, side)
        tokens = parts.permute(0, 2, 4, 1, 3, 5).reshape(len(sample), self.num_tokens, self.channels)
        return (tokens - self.config.mean) / self.config.std

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Returns the latent or image (B, C, H, W) of tokens (B, N, c)."""
        side, size = self.config.patch_size, self.config.sample_size
        parts = (tokens * self.config.std + self.config.mean).reshape(
            len(tokens), size // side, size // side, -1, side, side
        )
        return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, size, size)

    def forward(
        self, hidden_states: Tensor, known: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Any:
        """Returns the conditions z, as ``sample`` with shape (B, N, D); 0 at known positions.

        Arguments:
            hidden_states: The tokens, with shape (B, N, c); those at unknown positions are not looked at.
            known: The positions of the n known tokens, in any order, with shape (B, n).
            class_labels: The labels, with shape (B); ``num_classes`` stands for none.
            return_dict: Whether to return an output object, not a tuple.
        """
        buffer = self.class_embedding(class_labels)[:, None].expand(-1, self.config.num_buffer_tokens, -1)
        slots = self._slots(known)
        index = slots[:, :, None].expand(-1, -1, buffer.shape[-1])
        tokens = hidden_states.gather(1, known[:, :, None].expand(-1, -1, self.channels))
        hidden = torch.cat([buffer, self.input(tokens.to(buffer.dtype))], 1)
        hidden = self.input_norm(hidden + self.encoder_positions.expand(len(known), -1, -1).gather(1, index))
        hidden = self.decoder_input(self.encoder_norm(self._through(self.encoder, hidden)))
        full = self.mask_token.to(hidden.dtype).expand(len(known), self.decoder_positions.shape[1], -1)
        hidden = full.scatter(1, index, hidden) + self.decoder_positions
        free = torch.ones(hidden.shape[:2], device=known.device).scatter(1, slots, 0.0)
        free = free.argsort(dim=1, descending=True, stable=True)[:, : hidden.shape[1] - slots.shape[1]]
        hidden = self.decoder_norm(self._through(self.decoder, hidden, free))
        place = (free - self.config.num_buffer_tokens)[:, :, None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden + self.output_positions.expand(len(known), -1, -1).gather(1, place)
        z = hidden.new_zeros(len(known), self.num_tokens, hidden.shape[-1]).scatter(1, place, hidden)
        return Transformer2DModelOutput(sample=z) if return_dict else (z,)

    def _slots(self, known: Tensor) -> Tensor:
        """Returns the places (B, Bf + n) of buffer and known tokens in the decoder's sequence."""
        buffer = torch.arange(self.config.num_buffer_tokens, device=known.device).expand(len(known), -1)
        return torch.cat([buffer, self.config.num_buffer_tokens + known], 1)

    def _through(self, blocks: nn.ModuleList, hidden: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Evaluates blocks, the last one for the places ``wanted`` (B, n) only, if they are given."""
        saving = self.gradient_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(blocks, 1):
            inputs = (hidden, wanted if number == len(blocks) else None)
            hidden = self._gradient_checkpointing_func(block, *inputs) if saving else block(*inputs)
        return hidden


class MARBlock(nn.Module):
    """A pre-norm transformer block: self-attention without a mask, and a GELU network."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads, inner = heads, int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)  # fused, as in the official files
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, hidden: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Evaluates the block.

        Arguments:
            hidden: The sequences, with shape (B, L, D).
            wanted: The places whose output is wanted, with shape (B, n); all if not given.

        Returns:
            The sequences, with shape (B, L, D) or (B, n, D).
        """
        width, normed = hidden.shape[-1], self.norm1(hidden)
        if wanted is None:
            query, key, value = self.qkv(normed).chunk(3, dim=-1)
        else:  # all places are attended to, but few ask
            index = wanted[:, :, None].expand(-1, -1, width)
            hidden = hidden.gather(1, index)
            weight, bias = self.qkv.weight.split([width, 2 * width]), self.qkv.bias.split([width, 2 * width])
            query = linear(normed.gather(1, index), weight[0], bias[0])
            key, value = linear(normed, weight[1], bias[1]).chunk(2, dim=-1)
        parts = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        hidden = hidden + self.proj(scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norm2(hidden))

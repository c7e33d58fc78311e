"""Evaluating a denoiser on some of its tokens: what every block gave last, and what its attention looks at.

A transformer block that runs for some of the tokens of an image gets these alone.  In its self-attention
they look at all tokens: the keys and values of the others are continued from the last two times when they
were computed, and so is what the block gives of the others (`TokenMemory`).  A prompt's tokens are always
computed.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedPipeline
from .accelerator import Proceed
from .cells import Cells
from .gates import is_compiled
from .layers import image_tokens, with_image_tokens
from .rows import take_rows
from .run import BlockCall, denoisers_of
from .token_memory import TokenMemory

__all__ = ["Tokens", "why_no_tokens"]


class _Kind(NamedTuple):
    """A kind of blocks.

    Arguments:
        attentions: The names of the units in which tokens of the image look at each other.
        joint: Whether a prompt's tokens are among them there; else what has a prompt looks at nothing else.
        first: Whether a prompt's tokens come before those of the image there, else after them.
        rotary: The argument with the rotary embeddings of all tokens, if there is one.
    """

    attentions: tuple[str, ...]
    joint: bool = False
    first: bool = False
    rotary: str = ""


_BLOCKS: dict[type, _Kind] = {
    BasicTransformerBlock: _Kind(("attn1", "attn2")),
    JointTransformerBlock: _Kind(("attn", "attn2"), joint=True),
    FluxTransformerBlock: _Kind(("attn",), joint=True, first=True, rotary="image_rotary_emb"),
    FluxSingleTransformerBlock: _Kind(("attn",), joint=True, first=True, rotary="image_rotary_emb"),
}

_NETWORKS = ("UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel",
             "SD3Transformer2DModel", "FluxTransformer2DModel")  # fmt: skip

_PROCESSORS = (processors.AttnProcessor2_0, processors.FusedAttnProcessor2_0,
               processors.JointAttnProcessor2_0, FluxAttnProcessor)  # fmt: skip
"""Those that compute attention by ``torch.nn.functional.scaled_dot_product_attention``."""


def why_no_tokens(pipe: Any) -> str | None:
    """Returns why a pipeline's denoisers cannot be evaluated on some of their tokens, or None if they can."""
    # of diffusers' pipelines with these networks no other one appends tokens
    if any("Kontext" in cls.__name__ for cls in type(pipe).__mro__):
        return "the tokens of its input image follow those of the latents; use tokens=0"
    return next(filter(None, map(_why_no_tokens, denoisers_of(pipe).values())), None)


def _why_no_tokens(network: nn.Module) -> str | None:
    inner: Any = getattr(network, "_orig_mod", network)
    name = type(inner).__name__
    if name not in _NETWORKS:
        return f"the tokens of {name} are not known, only those of {', '.join(_NETWORKS)}; use tokens=0"
    if is_compiled(network):
        return f"its {name} is compiled, and would be again for each number of tokens; use tokens=0"
    blocks = known_blocks(inner)
    if not blocks:
        return f"its {name} has no transformer blocks; use tokens=0"
    for place, block in blocks.items():
        if reason := _why_not(block):
            return f"{place} of its {name} {reason}; use tokens=0"
    return None


def known_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the transformer blocks of a denoiser by name, of the kinds that are known here."""
    return {name: module for name, module in network.named_modules() if type(module) in _BLOCKS}


def _why_not(block: Any) -> str | None:
    """Returns why a block cannot run on some tokens alone, or None if it can."""
    if getattr(block, "pos_embed", None) is not None or hasattr(block, "fuser"):
        return "knows tokens by their places"
    if getattr(block, "_chunk_size", None) is not None:
        return "works in chunks"
    for attention in _attentions(block):
        if not isinstance(attention.processor, _PROCESSORS):
            return f"has an attention processor that is not known, {type(attention.processor).__name__}"
    return None


def _attentions(block: nn.Module) -> list[Any]:
    """Returns the units of a block in which the image's tokens look at each other."""
    units = (getattr(block, name, None) for name in _BLOCKS[type(block)].attentions)
    return [unit for unit in units if unit is not None]


def _patch_of(network: nn.Module, shape: Sequence[int], largest: int) -> int:
    """Returns the side of cells in latent pixels; 0 where latents are a sequence of tokens.

    In a U-Net, which has tokens of several sizes, it is the largest one of those that leave out any.
    """
    inner: Any = getattr(network, "_orig_mod", network)
    name = type(inner).__name__
    if name.startswith("Flux"):
        return 0
    if not name.startswith("UNet"):
        return int(inner.config.patch_size)
    sides = [2**power for power in range(largest.bit_length())]
    return max(side for side in sides if not any(length % side for length in shape[2:]))


class _Chosen(NamedTuple):
    """The tokens that blocks of one size compute.

    Arguments:
        tokens: All tokens of the image.
        rows: The rows that are evaluated; None for all.
        places: Those of the tokens that are computed, (rows, n); None for all.
        weights: Those of the others, see `TokenMemory.begin`.
    """

    tokens: int
    rows: Tensor | None
    places: Tensor | None = None
    weights: Tensor | None = None

    def row(self, number: int) -> "_Chosen":
        """Returns what concerns one of the rows."""
        assert self.places is not None
        one = slice(number, number + 1)
        rows = torch.arange(len(self.places), device=self.places.device) if self.rows is None else self.rows
        weights = None if self.weights is None else self.weights[one]
        return _Chosen(self.tokens, rows[one], self.places[one], weights)


@dataclass
class Part:
    """An evaluation of some rows, and some tokens, that is under way.

    Arguments:
        memory: The memory of all rows.
        now: The coordinate in which it is continued.
        rows: The rows that are evaluated; None for all.
        cells: The cells of the latents.
        wanted: The cells that are computed, bool (S, T), for the S samples of the rows; None for all.
        computed: The image's tokens that blocks have computed, a row.
        total: Those that they would have computed without the memory.
    """

    memory: TokenMemory
    now: float
    rows: list[int] | None
    cells: Cells
    wanted: np.ndarray | None
    computed: float = 0.0
    total: float = 0.0
    _chosen: dict[int, tuple[_Chosen, float]] = field(default_factory=dict)

    def chosen(self, tokens: int, size: int, device: torch.device) -> _Chosen:
        """Returns the tokens that a block computes, and counts them.

        A token that is computed several times, as in samples that want fewer than others, changes nothing.

        Arguments:
            tokens: The block's tokens of the image.
            size: The rows of its batch.
            device: Where they are.
        """
        if tokens not in self._chosen:
            rows = None if self.rows is None else torch.as_tensor(self.rows, device=device)
            if self.wanted is None:
                self.memory.begin_whole(self.now, tokens, size, rows, device)
                self._chosen[tokens] = _Chosen(tokens, rows), tokens
            else:
                wanted = self.cells.pool(self.wanted, tokens)
                places, mean = _places(wanted)
                index = torch.as_tensor(places, device=device).repeat(size // len(places), 1)
                weights = self.memory.begin(self.now, tokens, rows, index)
                self._chosen[tokens] = _Chosen(tokens, rows, index, weights), mean
        chosen, mean = self._chosen[tokens]
        self.computed, self.total = self.computed + mean, self.total + tokens
        return chosen


class Tokens:
    """The gates in a denoiser's blocks: all tokens are computed and remembered, or some of them are computed.

    Arguments:
        networks: The denoisers by name.
        max_downsample: The side, in latent pixels, of the largest tokens of a U-Net that are left out.
    """

    def __init__(self, networks: Mapping[str, nn.Module], max_downsample: int) -> None:
        self.networks, self.max_downsample = networks, max_downsample
        blocks = [block for network in networks.values() for block in known_blocks(network).values()]
        self._owner = {unit: block for block in blocks for unit in _attentions(block)}
        self.modules: list[nn.Module] = [*blocks, *self._owner]
        self._memory: dict[tuple[str, int], TokenMemory] = {}
        self._part: Part | None = None
        self._within: _Chosen | None = None

    def clear(self) -> None:
        """Forgets everything."""
        self._memory.clear()

    def cells(self, network: str, shape: Any) -> Cells:
        """Returns the cells of latents, which are tokens of a network.

        Arguments:
            network: The denoiser's name.
            shape: The shape of the latents, (B, C, H, W), or (B, T, C) for a sequence of tokens.
        """
        return Cells.of(shape, _patch_of(self.networks[network], shape, self.max_downsample))

    @contextmanager
    def part(
        self, key: tuple[str, int], now: float, linear: bool, cells: Cells, rows: list[int] | None,
        wanted: np.ndarray | None,
    ) -> Iterator[Part]:  # fmt: skip
        """While it is entered, blocks compute the wanted cells of some rows, or all of them.

        Arguments:
            key: The network and branch.
            now: The coordinate in which values of tokens are continued.
            linear: Whether they are, or taken as they were.
            cells: The cells of the latents.
            rows: The rows of the network's batch; None for all.
            wanted: The cells that are computed, bool (S, T), one row a sample; None for all.
        """
        memory = self._memory.setdefault(key, TokenMemory(linear))
        self._part = Part(memory, now, rows, cells, wanted)
        try:
            yield self._part
        finally:
            self._part = self._within = None

    def block(self, call: BlockCall, proceed: Proceed) -> Any:
        """Runs a block, or an attention unit of one."""
        part = self._part
        if part is None:
            return proceed(call)
        if call.module in self._owner:
            kind = _BLOCKS[type(self._owner[call.module])]
            alone = not kind.joint and call.kwargs.get("encoder_hidden_states") is not None
            within = None if alone else self._within
            return proceed(call) if within is None else self._attend(part, within, call, proceed)
        given = _bound(call)
        hidden, count = given["hidden_states"], given["hidden_states"].shape[1]
        if part.cells.side(count) > max(self.max_downsample, part.cells.patch):
            part.computed, part.total = part.computed + count, part.total + count
            return proceed(call)
        chosen = part.chosen(count, len(hidden), hidden.device)
        if chosen.places is None:
            output = self._inside(chosen, call, proceed)
            part.memory.remember(call.module, image_tokens(call.module, output), chosen.rows)
            return output
        given["hidden_states"] = hidden.gather(1, chosen.places[..., None].expand(-1, -1, hidden.shape[2]))
        output = self._thinned(chosen, call, given, proceed)
        fresh = image_tokens(call.module, output)
        whole = part.memory.complete(call.module, fresh, 1, chosen.rows, chosen.places, chosen.weights)
        return with_image_tokens(call.module, output, whole)

    def _thinned(self, chosen: _Chosen, call: BlockCall, given: dict[str, Any], proceed: Proceed) -> Any:
        """Runs a block on some tokens; row by row where their places are an argument that rows share."""
        kind = _BLOCKS[type(call.module)]
        assert chosen.places is not None
        if not kind.rotary or given.get(kind.rotary) is None:
            return self._inside(chosen, replace(call, args=(), kwargs=given), proceed)
        outputs, size = [], len(chosen.places)
        for row, index in enumerate(chosen.places):
            mine = {name: take_rows(value, [row], size, name) for name, value in given.items()}
            mine[kind.rotary] = _rotary(given[kind.rotary], index, chosen.tokens, kind.first)
            outputs.append(self._inside(chosen.row(row), replace(call, args=(), kwargs=mine), proceed))
        return tuple(torch.cat(same) for same in zip(*outputs, strict=True))

    def _inside(self, chosen: _Chosen, call: BlockCall, proceed: Proceed) -> Any:
        self._within = chosen
        try:
            return proceed(call)
        finally:
            self._within = None

    def _attend(self, part: Part, chosen: _Chosen, call: BlockCall, proceed: Proceed) -> Any:
        """Runs an attention unit, and gives it the keys and values of all tokens.

        Raises:
            UnsupportedPipeline: If it computes attention in another way than is known.
        """
        first, index, seen = _BLOCKS[type(self._owner[call.module])].first, chosen.places, []

        def completed(name: str, tensor: Tensor) -> Tensor:
            """Returns keys or values for all tokens, those of the prompt and of the image."""
            seen.append(name)
            own = chosen.tokens if index is None else index.shape[1]
            text = tensor.shape[2] - own
            begin = text if first else 0
            image = tensor.narrow(2, begin, own)
            if index is None:
                part.memory.remember((call.module, name), image, chosen.rows)
                return tensor
            key = (call.module, name)
            image = part.memory.complete(key, image, 2, chosen.rows, index, chosen.weights)
            if not text:
                return image
            prompt = tensor.narrow(2, 0 if first else own, text)
            return torch.cat([prompt, image] if first else [image, prompt], 2)

        with _Attending(completed):
            output = proceed(call)
        if len(seen) != 2:
            raise UnsupportedPipeline(
                f"{type(call.module).__name__} does not call scaled_dot_product_attention once; use tokens=0"
            )
        return output


class _Attending(TorchFunctionMode):
    """Changes the keys and values of ``scaled_dot_product_attention``, while it is entered."""

    def __init__(self, change: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function of torch."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs |= dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            if kwargs.get("attn_mask") is not None:
                raise UnsupportedPipeline("its self-attention has a mask; use tokens=0")
            query, key, value = (kwargs.pop(name) for name in ("query", "key", "value"))
            return func(query, self.change("key", key), self.change("value", value), **kwargs)
        return func(*args, **kwargs)


def _places(wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the places of tokens, (S, n), of at least one a sample, and their mean number.

    Samples that want fewer than others have one of theirs several times.
    """
    found = [np.flatnonzero(row) if row.any() else np.zeros(1, int) for row in wanted]
    most = max(map(len, found))
    places = [np.pad(row, (0, most - len(row)), constant_values=row[0]) for row in found]
    return np.stack(places), sum(map(len, found)) / len(found)


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _bound(call: BlockCall) -> dict[str, Any]:
    """Returns the arguments of a block's call by name."""
    kind: Any = type(call.module)
    given = _signature(kind).bind(call.module, *call.args, **call.kwargs).arguments
    return {name: value for name, value in given.items() if name != "self"}


def _rotary(embeddings: Any, index: Tensor, count: int, first: bool) -> tuple[Tensor, ...]:
    """Returns the rotary embeddings of a prompt's tokens and of some of the image's."""
    text = len(embeddings[0]) - count
    rest = torch.arange(text, device=index.device) + (0 if first else count)
    order = torch.cat([rest, index + text] if first else [index, rest])
    return tuple(part[order.to(part.device)] for part in embeddings)

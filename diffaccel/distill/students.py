"""Students that are made from a teacher: smaller networks that inherit its weights, or adapters on it.

Which channels of a wide tensor a narrow one inherits is a function of the two sizes alone,

    kept(k) = floor(k wide / narrow),    k = 0 .. narrow - 1,

so that whatever writes a channel and whatever reads it agree, all along the residual stream. The channels
are evenly spread for a reason: what is kept of joined chunks is, joined, what is kept of each chunk. So the
shifts and scales of adaptive norms, gated units, attention heads that become smaller, the groups of a group
norm, and the frequencies of sinusoidal embeddings are thinned within, and none is cut off. A choice by
importance would need one order for all layers that share the stream.

Where sizes do not tell enough, modules are known by what they are: attention whose heads are dropped, tables
of classes, and layers whose input is joined from parts that become narrower by different factors.

Layers are inherited from evenly spread places, the first and the last among them.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..errors import ModelError, OptionError, closest

__all__ = ["Inherited", "check_border", "prune", "student_like"]

_BORDER = ("in_channels", "out_channels", "patch_size")
_LEVELS = ("down_blocks", "up_blocks")
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_OUTPUTS = ("to_out.0", "to_add_out")
_SUMS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, ZeroDivisionError)

Rules = dict[str, dict[int, Tensor]]
"""For the names of tensors, by dimension, what is kept of the teacher's."""


def check_border(teacher: Any, student: Any) -> None:
    """Checks that a student takes and makes what its teacher does.

    Raises:
        OptionError: If not.
    """
    for key in _BORDER:
        theirs, own = (getattr(network.config, key, None) for network in (teacher, student))
        if theirs != own:
            raise OptionError(f"{key} is {own}, and {theirs} in the teacher; only inner sizes may differ")


def student_like(network: nn.Module, /, seed: int = 0, **changes: Any) -> Any:
    """Returns a network of the same class in float32, with random weights.

    Arguments:
        network: The network whose configuration is taken: a diffusers model.
        seed: Decides the weights; the global generator is left as it is.
        changes: What is different in the configuration.

    Raises:
        OptionError: If the configuration has no such key, or the class refuses the values.
    """
    kind: Any = type(network)
    config = dict(getattr(network, "config", {}))
    known = [name for name in inspect.signature(kind.__init__).parameters if name in config]
    config = {name: config[name] for name in known}  # diffusers' own notes in it would undo changes
    if not known:
        raise OptionError(f"{kind.__name__} has no configuration; expected a diffusers model")
    for key in changes:
        if key not in known:
            raise OptionError(f"{kind.__name__} has no {key!r}; {closest(key, known)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return kind.from_config({**config, **changes}).float()
        except _REFUSALS as error:
            raise OptionError(f"{kind.__name__} refuses {changes}: {error}") from error


@dataclass(frozen=True)
class Inherited:
    """What a student has from its teacher; ``str`` gives it in a few lines.

    Arguments:
        layers: By the name of a list of layers that became shorter, the teacher's layers that are kept.
        whole: The student's tensors that are the teacher's.
        sliced: The student's tensors that are parts of the teacher's.
        random: The student's tensors that the teacher has nothing for.
        dropped: The teacher's tensors that nothing was taken from.
        sizes: The numbers of entries of the student's tensors.
    """

    layers: Mapping[str, tuple[int, ...]]
    whole: tuple[str, ...]
    sliced: tuple[str, ...]
    random: tuple[str, ...]
    dropped: tuple[str, ...]
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        parts = {"whole": self.whole, "sliced": self.sliced, "random": self.random}
        counts = [f"{sum(self.sizes[name] for name in names):,} {what}" for what, names in parts.items()]
        lines = [f"{', '.join(counts)}; of the teacher {len(self.dropped)} tensors dropped"]
        lines += [f"{name}: layers {', '.join(map(str, kept))}" for name, kept in self.layers.items()]
        return "\n".join([*lines, *(f"random: {name}" for name in self.random)])


class _Pair(NamedTuple):
    """A module of the student and the one of the teacher that it inherits from, by name."""

    name: str
    new: Any
    source: str
    old: Any


@torch.no_grad()
def prune(
    teacher: nn.Module, student: nn.Module, layers: Mapping[str, Sequence[int]] | None = None
) -> Inherited:
    """Fills a student with the weights of its teacher, in depth and in width, and says what it has got.

    Heads are dropped whole where there are fewer of them; where they are smaller, each is thinned, which with
    rotary embeddings takes rotated pairs apart: rather drop heads. A table of classes keeps its first rows
    and, as its last one, the row of no class. A tensor that is larger than the teacher's in some dimension
    stays random. Weights that sum over fewer channels grow by the root of how many times fewer there are.

    Arguments:
        teacher: The teacher.
        student: A network of the same class, such as `student_like` makes.
        layers: By the name of a list of layers, as "transformer_blocks", the places of the teacher's layers
            that are kept, rising; the others are evenly spread.

    Raises:
        OptionError: If the student has more layers, other resolutions or other samples than its teacher, or
            ``layers`` does not fit.
        ModelError: If it is of another class, or nothing of the teacher fits.
    """
    if type(teacher) is not type(student):
        raise ModelError(f"a {type(student).__name__} cannot inherit from a {type(teacher).__name__}")
    check_border(teacher, student)
    wanted, kept = dict(layers or {}), dict[str, tuple[int, ...]]()
    pairs = list(_pairs(_Pair("", student, "", teacher), wanted, kept))
    for name in wanted:
        if name not in kept:
            known = [key for key in kept if not any(part.isdigit() for part in key.split("."))]
            raise OptionError(f"no list of layers {name!r}; {closest(name, known)}")
    sources = {_join(pair.name, key): _join(pair.source, key) for pair in pairs for key in _own(pair.new)}
    sums = {_join(pair.name, "weight") for pair in pairs if isinstance(pair.new, _SUMS)}
    found = _fill(student.state_dict(), teacher.state_dict(), sources, _rules(pairs, student, teacher), sums)
    if not found["whole"] and not found["sliced"]:
        raise ModelError(f"nothing of the teacher fits; is one of the two no plain {type(teacher).__name__}?")
    used = {sources[name] for what in ("whole", "sliced") for name in found[what]}
    shorter = {pair.name: kept[pair.name] for pair in pairs
               if pair.name in kept and len(pair.new) < len(pair.old)}  # fmt: skip
    return Inherited(
        shorter, tuple(found["whole"]), tuple(found["sliced"]), tuple(found["random"]),
        tuple(name for name in teacher.state_dict() if name not in used),
        {name: tensor.numel() for name, tensor in student.state_dict().items()},
    )  # fmt: skip


def _pairs(pair: _Pair, layers: Mapping[str, Sequence[int]],
           kept: dict[str, tuple[int, ...]]) -> Iterator[_Pair]:  # fmt: skip
    """Yields the modules of the student that have one of the teacher to inherit from; notes kept layers."""
    yield pair
    for key, new in pair.new.named_children():
        old, name = getattr(pair.old, key, None), _join(pair.name, key)
        if isinstance(new, nn.ModuleList) and isinstance(old, nn.ModuleList):
            kept[name] = places = _places(name, len(new), len(old), layers.get(name))
            yield _Pair(name, new, _join(pair.source, key), old)
            for number, place in enumerate(places):
                source = f"{_join(pair.source, key)}.{place}"
                yield from _pairs(_Pair(f"{name}.{number}", new[number], source, old[place]), layers, kept)
        elif isinstance(old, nn.Module):
            yield from _pairs(_Pair(name, new, _join(pair.source, key), old), layers, kept)


def _places(name: str, new: int, old: int, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Returns which layers are kept."""
    if wanted is not None:
        rising = list(wanted) == sorted(set(wanted)) and all(0 <= place < old for place in wanted)
        if len(wanted) != new or not rising:
            raise OptionError(f"{name} keeps {list(wanted)}; expected {new} rising numbers below {old}")
        return tuple(wanted)
    if new > old or (new != old and name in _LEVELS):
        raise OptionError(f"{name} has {new} members, and {old} in the teacher; " + (
            "a U-Net keeps its resolutions" if name in _LEVELS else "a student has no more than its teacher"
        ))  # fmt: skip
    return tuple(int(place * (old - 1) / max(new - 1, 1) + 0.5) for place in range(new))


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _own(module: nn.Module) -> list[str]:
    """Returns the names of the tensors that a module itself saves."""
    buffers = [key for key, _ in module.named_buffers(recurse=False)]
    kept = [key for key in buffers if key not in module._non_persistent_buffers_set]
    return [key for key, _ in module.named_parameters(recurse=False)] + kept


def _fill(new: Mapping[str, Tensor], old: Mapping[str, Tensor], sources: Mapping[str, str], rules: Rules,
          sums: set[str]) -> dict[str, list[str]]:  # fmt: skip
    """Copies what fits, and returns the names of the student's tensors by what happened to them.

    Where a weight of ``sums`` sums over fewer inputs, a factor keeps the variance of the sum.
    """
    found: dict[str, list[str]] = {"whole": [], "sliced": [], "random": []}
    for name, target in new.items():
        source = old.get(sources.get(name, ""))
        if source is None or not _fits(source.shape, target.shape):
            found["random"].append(name)
        elif source.shape == target.shape:
            found["whole"].append(name)
            target.copy_(source)
        else:
            found["sliced"].append(name)
            rule = rules.get(name, {})
            gain = math.sqrt(source.shape[1] / target.shape[1]) if name in sums else 1.0
            for axis, size in enumerate(target.shape):
                if size < source.shape[axis]:
                    index = rule[axis] if axis in rule else spread(source.shape[axis], size)
                    source = source.index_select(axis, index.to(source.device))
            target.copy_(source).mul_(gain)
    return found


def _fits(old: torch.Size, new: torch.Size) -> bool:
    """Returns whether a tensor can be a part of another one; kernels have to be as large."""
    smaller = len(old) == len(new) and all(a >= b for a, b in zip(old, new, strict=True))
    return smaller and (len(old) < 4 or old[2:] == new[2:])


def spread(old: int, new: int) -> Tensor:
    """Returns the places floor(k old / new) of ``new`` channels among ``old`` ones, with shape (new)."""
    return torch.arange(new) * old // new


def _rules(pairs: Sequence[_Pair], student: nn.Module, teacher: nn.Module) -> Rules:
    """Returns what is kept of dimensions that are not simply thinned."""
    rules: Rules = {}
    for pair in pairs:
        if isinstance(pair.new, LabelEmbedding):
            rules |= _label_rules(pair)
        elif isinstance(pair.new, nn.Embedding):
            rules = {f"{pair.name}.weight": {0: torch.arange(pair.new.num_embeddings)}, **rules}
        elif isinstance(pair.new, ResnetBlock2D) and pair.name.startswith("up_blocks."):
            rules |= _resnet_rules(pair, student, teacher)
        elif _is_attention(pair.new) and _is_attention(pair.old):
            rules |= _attention_rules(pair)
        elif _is_parallel(pair.new) and _is_parallel(pair.old):
            rules |= _parallel_rules(pair)
    return rules


def _is_attention(module: Any) -> bool:
    return isinstance(getattr(module, "to_q", None), nn.Linear) and isinstance(
        getattr(module, "heads", None), int
    )


def _is_parallel(module: Any) -> bool:
    """Returns whether a block joins the outputs of attention and of an MLP before one projection."""
    parts = (getattr(module, "proj_mlp", None), getattr(module, "proj_out", None))
    return all(isinstance(part, nn.Linear) for part in parts) and _is_attention(getattr(module, "attn", None))


def _heads(old: Any, new: Any, before: int, after: int) -> Tensor:
    """Returns which channels of attention are kept: those of whole heads, thinned if heads are smaller.

    Arguments:
        old: The attention of the teacher.
        new: The attention of the student.
        before: The teacher's channels, of one or more heads.
        after: The student's channels.
    """
    size, own = old.to_q.out_features // old.heads, new.to_q.out_features // new.heads
    if own > size or before % size or after % own or after // own > before // size:
        return spread(before, after)
    return (spread(before // size, after // own)[:, None] * size + spread(size, own)).flatten()


def _attention_rules(pair: _Pair) -> Rules:
    rules: Rules = {}
    layers = dict(pair.new.named_modules())
    others = dict(pair.old.named_modules())
    for key in (*_PROJECTIONS, *_NORMS, *_OUTPUTS):
        old, new = (getattr(found.get(key), "weight", None) for found in (others, layers))
        if old is None or new is None:
            continue
        axis = 1 if key in _OUTPUTS else 0
        index = _heads(pair.old, pair.new, old.shape[axis], new.shape[axis])
        rules[f"{pair.name}.{key}.weight"] = {axis: index}
        if not axis:
            rules[f"{pair.name}.{key}.bias"] = {0: index}
    return rules


def _parallel_rules(pair: _Pair) -> Rules:
    before, after = (block.attn.to_q.out_features for block in (pair.old, pair.new))
    rest = [block.proj_out.in_features - size for block, size in ((pair.old, before), (pair.new, after))]
    index = [_heads(pair.old.attn, pair.new.attn, before, after), before + spread(*rest)]
    return {f"{pair.name}.proj_out.weight": {1: torch.cat(index)}}


def _label_rules(pair: _Pair) -> Rules:
    """The rows of the first classes, and of no class, if there is a row for it."""
    old, new = (embedding.embedding_table.num_embeddings for embedding in (pair.old, pair.new))
    index = torch.arange(new)
    if pair.new.dropout_prob > 0:
        index[-1] = old - 1
    return {f"{pair.name}.embedding_table.weight": {0: index}}


def _resnet_rules(pair: _Pair, student: nn.Module, teacher: nn.Module) -> Rules:
    """The input of a block on a U-Net's way up: the stream, joined with the output of one on its way down."""
    stream = [_stream(teacher, pair.source), _stream(student, pair.name)]
    joined = [block.in_channels - size for block, size in zip((pair.old, pair.new), stream, strict=True)]
    if stream[1] > stream[0] or joined[1] > joined[0]:
        return {}
    index = torch.cat([spread(*stream), stream[0] + spread(*joined)])
    return {
        f"{pair.name}.norm1.weight": {0: index},
        f"{pair.name}.norm1.bias": {0: index},
        f"{pair.name}.conv1.weight": {1: index},
        f"{pair.name}.conv_shortcut.weight": {1: index},
    }


def _stream(network: Any, name: str) -> int:
    """Returns the channels of the stream at the residual block "up_blocks.LEVEL.resnets.PLACE"."""
    level, place = int(name.split(".")[1]), int(name.split(".")[3])
    if place:
        return int(network.up_blocks[level].resnets[place - 1].out_channels)
    before = network.up_blocks[level - 1] if level else network.mid_block or network.down_blocks[-1]
    return int(before.resnets[-1].out_channels)

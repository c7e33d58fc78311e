"""A partition of conditions into parts of equal mass, and the rule that knows the part of a new one.

References:
    Multi-student Diffusion Distillation for Better One-step Generators (2024), arXiv 2410.23274
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..pipelines.condition_experts import branch_of, pooled
from ..pipelines.unguided import condition_of
from .host import Host
from .shards import Condition

__all__ = ["Partition", "split_evenly", "tree_of"]

_POOLED = ("added_cond_kwargs.text_embeds", "pooled_projections", "encoder_hidden_states")
"""Where networks are given the embedding of a prompt, the pooled ones first."""


@dataclass(frozen=True)
class Partition:
    """K parts of the conditions, disjoint, with none left out.

    Arguments:
        parts: The conditions of each part, in the order in which they were given.
        router: The settings of a `ConditionExperts` that knows the part of any condition.
    """

    parts: tuple[tuple[Condition, ...], ...]
    router: Mapping[str, Any]

    @classmethod
    def of(cls, host: Host, conditions: Sequence[Condition], count: int) -> "Partition":
        """Returns a partition: of labels, consecutive ones; of prompts, by their embeddings.

        The mean embeddings are split at quantiles, medians if the count is a power of two, along the first
        principal axis and, within each part, along the next one. The paper's quadrants are of two axes that
        it does not name. Parts that are no nearer to each other do as well, by its own ablation.

        Arguments:
            host: The pipeline.
            conditions: Prompts or labels, all that are trained on.
            count: The number K of parts.

        Raises:
            OptionError: If the pipeline is unconditional, or there are fewer conditions than parts.
        """
        distinct = list(dict.fromkeys(conditions))
        if host.kind == "batch_size":
            raise OptionError(f"{type(host.pipe).__name__} is unconditional; nothing to divide")
        if len(distinct) < count:
            raise OptionError(f"{len(distinct)} conditions for {count} students; expected one each or more")
        if host.kind == "class_labels":
            numbers = {condition: int(condition_of(host.pipe, condition)) for condition in distinct}
            labels = split_evenly(sorted(set(numbers.values())), count)
            owners = {label: place for place, own in enumerate(labels) for label in own}
            places = [owners[numbers[condition]] for condition in distinct]
            router: dict[str, Any] = {"argument": "class_labels", "labels": labels}
        else:
            argument, embeddings = _embeddings(host, distinct)
            axes, tree = tree_of(embeddings, count)
            places = branch_of(embeddings, axes, tree)
            router = {"argument": argument, "axes": axes, "tree": tree}
        parts = tuple(
            tuple(condition for condition, own in zip(distinct, places, strict=True) if own == place)
            for place in range(count)
        )
        return cls(parts, router)


def split_evenly(values: Sequence[int], count: int) -> list[list[int]]:
    """Returns consecutive parts of some values, of sizes that differ by at most 1."""
    size = len(values)
    bounds = [size * place // count for place in range(count + 1)]
    return [list(values[start:stop]) for start, stop in pairwise(bounds)]


def tree_of(embeddings: Tensor, count: int) -> tuple[list[list[float]], Any]:
    """Returns principal axes (M, D) of embeddings (N, D), and a tree of thresholds with ``count`` leaves.

    Each leaf has N / count of the embeddings, or one more or less for each level, if no two are alike.

    Raises:
        OptionError: If too many embeddings are the same for a leaf each.
    """
    depth = (count - 1).bit_length()
    directions = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False).Vh[:depth]
    peak = directions.abs().argmax(1, keepdim=True)
    directions = directions * directions.gather(1, peak).sign()  # an axis has no sign of its own
    spread = embeddings @ directions.T

    def grow(rows: Tensor, first: int, leaves: int, level: int) -> Any:
        if leaves == 1:
            return first
        if level >= spread.shape[1]:
            raise OptionError(f"embeddings of {spread.shape[1]} dimensions do not divide into {count} parts")
        values, left = spread[rows, level].sort().values, leaves // 2
        cut = len(values) * left // leaves
        if not 0 < cut < len(values) or values[cut - 1] == values[cut]:
            raise OptionError(f"too many prompts have one embedding for {count} parts")
        threshold = float((values[cut - 1] + values[cut]) / 2)
        below = spread[rows, level] < threshold
        return [threshold, grow(rows[below], first, left, level + 1),
                grow(rows[~below], first + left, leaves - left, level + 1)]  # fmt: skip

    tree = grow(torch.arange(len(embeddings)), 0, count, 0)
    return directions.tolist(), tree


def _embeddings(host: Host, conditions: Sequence[Condition]) -> tuple[str, Tensor]:
    """Returns the argument that holds the embedding of a prompt, and the pooled ones (N, D)."""
    for argument in _POOLED:
        parts = []
        for start in range(0, len(conditions), 64):
            given: Any = host.encode(conditions[start : start + 64]).kwargs
            for name in argument.split("."):
                given = given.get(name) if isinstance(given, Mapping) else None
            if given is None:
                break
            parts.append(pooled(given))
        else:
            return argument, torch.cat(parts)
    raise OptionError(f"{type(host.pipe).__name__} gives its network no embedding of prompts by name")

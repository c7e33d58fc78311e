"""Experts by condition: one module that calls, for each row, the network of its class or prompt.

References:
    Multi-student Diffusion Distillation for Better One-step Generators (2024), arXiv 2410.23274
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..errors import OptionError, UnsupportedPipeline
from .routed import Routed

__all__ = ["ConditionExperts", "branch_of", "pooled"]


class ConditionExperts(Routed):
    """K networks of a class, or K adapters of one, each for a part of the conditions; see `Routed.of`.

    The condition is read from what the network is given. Labels are looked up; embeddings of prompts are
    pooled and projected on some axes, and a tree of thresholds, one axis a level, says whose they are. So the
    text encoder of the pipeline is the router's own. A condition costs one reading from the device.

    The networks have no branch without a condition: with guidance a pipeline would give them one, and an
    unknown label is an error. A negative prompt cannot be told from a prompt; leave guidance off.

    Arguments:
        networks: The classes and configurations of the networks.
        adapters: The networks' LoRA adapters.
        members: For each expert, the network's place and its adapter.
        argument: The argument with the condition; "added_cond_kwargs.text_embeds" for one within another.
        labels: The labels of each expert; none if they are chosen by ``tree``.
        axes: The directions (M, D) in the space of pooled embeddings (B, D).
        tree: Nested ``[threshold, below, from it on]``, with the experts' places as leaves.

    Raises:
        OptionError: If a label belongs to two experts.
    """

    @register_to_config
    def __init__(
        self, networks: Sequence[Mapping[str, Any]] = (), adapters: Sequence[Mapping[str, Any]] = (),
        members: Sequence[Sequence[Any]] = (), argument: str = "class_labels",
        labels: Sequence[Sequence[int]] = (), axes: Sequence[Sequence[float]] = (), tree: Any = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.owners = {label: place for place, own in enumerate(labels) for label in own}
        if len(self.owners) != sum(map(len, labels)):
            raise OptionError("a label belongs to two experts")
        self._build(networks, adapters, members)

    def summary(self) -> str:
        """Returns in words who does what."""
        what = "adapters of one network" if len(self.networks) == 1 else "networks"
        if self.owners:
            parts = [_ranges(own) for own in self.config["labels"]]
            return f"{len(self.members)} {what}, by class: {'; '.join(parts)}"
        return f"{len(self.members)} {what}, by the pooled embedding of the prompt"

    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
        """Returns the place of the expert for each row.

        Raises:
            UnsupportedPipeline: If the condition is not among the arguments by name.
            OptionError: If a label belongs to no expert.
        """
        given: Any = kwargs
        for name in str(self.config["argument"]).split("."):
            if not isinstance(given, Mapping) or given.get(name) is None:
                raise UnsupportedPipeline(f"experts by condition are chosen by {name!r}, which is not given")
            given = given[name]
        if not self.owners:
            return branch_of(pooled(given), self.config["axes"], self.config["tree"])
        found = torch.as_tensor(given).reshape(-1).tolist()
        for label in found:
            if label not in self.owners:
                raise OptionError(
                    f"the label {label} belongs to no expert; known: {len(self.owners)}, and none for no "
                    "class: call the pipeline with guidance_scale=1"
                )
        return [self.owners[label] for label in found]


def _ranges(labels: Sequence[int]) -> str:
    """Returns labels in words, neighbors as a range."""
    found: list[list[int]] = []
    for label in sorted(labels):
        if found and label == found[-1][-1] + 1:
            found[-1][1:] = [label]
        else:
            found.append([label])
    return ", ".join("-".join(map(str, ends)) for ends in found)


def pooled(embedding: Tensor) -> Tensor:
    """Returns embeddings (B, D) of embeddings (B, D), or (B, L, D) of L tokens, of which it is the mean."""
    wide = embedding.detach().to(torch.float32 if embedding.is_mps else torch.float64)
    return wide.mean(1) if wide.ndim == 3 else wide


def branch_of(embeddings: Tensor, axes: Sequence[Sequence[float]], tree: Any) -> list[int]:
    """Returns the leaf of a tree for each of some embeddings.

    Arguments:
        embeddings: Pooled embeddings, with shape (B, D).
        axes: The directions (M, D), one a level of the tree.
        tree: Nested ``[threshold, below, from it on]``, with numbers as leaves.
    """
    rows: list[list[float]] = (embeddings @ embeddings.new_tensor(axes).T).tolist() if axes else []
    found = []
    for row in rows or [[]] * len(embeddings):
        node, depth = tree, 0
        while not isinstance(node, int):
            node, depth = node[2 if row[depth] >= node[0] else 1], depth + 1
        found.append(node)
    return found

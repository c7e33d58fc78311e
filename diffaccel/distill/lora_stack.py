r"""Saved LoRA adapters, combined by what they change, not factor by factor.

.. math::
    \Delta W(\alpha) = \sum_k \alpha_k s_k B_k A_k = [\alpha_1 s_1 B_1, .., \alpha_K s_K B_K]\,[A_1; ..; A_K]

is an adapter of rank K r, exactly. `LoraStack.reduced` brings it back to rank r by a singular value
decomposition in the small space of the factors; that one loses something, and is to be scored again. To
combine A and B themselves would give products of one checkpoint's B with another one's A.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint_files import Checkpoint
from .checkpoint_matrix import as_rows, group_numbers
from .checkpoints import CheckpointError

__all__ = ["LoraStack", "is_lora"]

_FACTOR = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<a>[AB])|lora\.(?P<b>down|up))(?:\.[^.]+)?\.weight")
_METADATA = "lora_adapter_metadata"
_REFUSED = ("use_rslora", "use_dora", "alpha_pattern")


class _Factors(NamedTuple):
    """The adapter of one layer in one checkpoint: A (r, in, *), B (out, r, *), float32, B with its scale."""

    a: Tensor
    b: Tensor


def is_lora(checkpoint: Checkpoint) -> bool:
    """Returns whether a checkpoint is an adapter."""
    return any(".lora_" in name or ".lora." in name for name in checkpoint.pieces)


class LoraStack:
    """Creates the stack of some adapters of one network, which are small and kept in memory.

    Arguments:
        checkpoints: The adapters, in the order of training; at least 2.
        component: The name of the network in its pipeline, with which names in files may begin.
        groups: Beginnings of names of layers, as of `CheckpointMatrix`.
        device: Where combinations are computed.

    Raises:
        CheckpointError: If there is one only, or layers or shapes differ, or a weight is not finite, or a
            file has anything but plain LoRA weights of this network.
        OptionError: If a group has no layer.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], component: str = "", groups: Sequence[str] = (),
                 device: torch.device | str = "cpu") -> None:  # fmt: skip
        if len(checkpoints) < 2:
            raise CheckpointError(f"{len(checkpoints)} checkpoint; a combination needs at least 2")
        self.checkpoints, self.component = list(checkpoints), component
        found = [_layers(checkpoint, component) for checkpoint in checkpoints]
        for layers, checkpoint in zip(found[1:], checkpoints[1:], strict=True):
            first = {layer: _shape(factors) for layer, factors in found[0].items()}
            if first != {layer: _shape(factors) for layer, factors in layers.items()}:
                raise CheckpointError(
                    f"{checkpoint.label!r} and {checkpoints[0].label!r} adapt different layers or shapes"
                )
        self.layers = {layer: [_Factors(*(part.to(device) for part in one[layer])) for one in found]
                       for layer in sorted(found[0])}  # fmt: skip
        self._numbers = group_numbers(list(self.layers), groups)
        self.groups = max(self._numbers.values()) + 1
        """The number G of groups."""
        parts = [part.double().sum().item() for _, factors in self._each() for part in factors]
        self.digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        """The SHA-256 of what tells the adapters from others."""
        self._base: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """The number K of adapters."""
        return len(self.checkpoints)

    def _each(self) -> Iterator[tuple[str, _Factors]]:
        for layer, factors in self.layers.items():
            for one in factors:
                yield layer, one

    def targets(self, network: nn.Module) -> dict[str, Tensor]:
        """Returns the weights of a network that a combination is written to, and remembers them as they are.

        Raises:
            CheckpointError: If the network has no such layers, or of other shapes.
        """
        own = dict(network.named_parameters())
        shapes = {f"{layer}.weight": own[f"{layer}.weight"].shape for layer in self.layers
                  if f"{layer}.weight" in own}  # fmt: skip
        for layer, (one, *_) in self.layers.items():
            weight = shapes.get(f"{layer}.weight")
            if weight is None or weight != _shape_of_product(one):
                raise CheckpointError(
                    f"{self.checkpoints[0].label!r} adapts {layer!r} of shape {_shape_of_product(one)}; the "
                    f"network has {'no such layer' if weight is None else tuple(weight)}"
                )
        found = {name: own[name].data for name in shapes}
        self._base = {name: value.clone() for name, value in found.items()}
        return found

    @torch.no_grad()
    def write(self, coefficients: Any, targets: Mapping[str, Tensor]) -> None:
        """Writes the base weights with a combination of the adapters, exactly.

        Arguments:
            coefficients: With shape (K), or (G, K) for each group.
            targets: What `targets` has returned.

        Raises:
            OptionError: If the coefficients have another shape.
        """
        for layer, (a, b) in self._joined(coefficients):
            self._put(targets, layer, a, b)

    @torch.no_grad()
    def write_reduced(self, coefficients: Any, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Writes the combination at the adapters' rank, and returns it as diffusers saves an adapter."""
        saved = {}
        start = f"{self.component}." if self.component else ""
        for layer, (a, b) in self.reduced(coefficients).items():
            self._put(targets, layer, a, b)
            saved[f"{start}{layer}.lora_A.weight"] = a.cpu().contiguous()
            saved[f"{start}{layer}.lora_B.weight"] = b.cpu().contiguous()
        return saved

    def _put(self, targets: Mapping[str, Tensor], layer: str, a: Tensor, b: Tensor) -> None:
        target, base = targets[f"{layer}.weight"], self._base[f"{layer}.weight"]
        target.copy_(base.float() + (b.flatten(1) @ a.flatten(1)).view(base.shape))

    def _joined(self, coefficients: Any) -> Iterator[tuple[str, _Factors]]:
        """Yields the adapter of rank K r of each layer."""
        rows = as_rows(coefficients, self.groups, self.count)
        for layer, factors in self.layers.items():
            row: np.ndarray = rows[self._numbers[layer]]
            b = torch.cat([one.b * float(alpha) for alpha, one in zip(row, factors, strict=True)], 1)
            yield layer, _Factors(torch.cat([one.a for one in factors]), b)

    @torch.no_grad()
    def reduced(self, coefficients: Any) -> dict[str, _Factors]:
        """Returns by layer the adapter of rank r, of scale 1, that is nearest to a combination.

        Arguments:
            coefficients: With shape (K), or (G, K) for each group.
        """
        found = {}
        for layer, (a, b) in self._joined(coefficients):
            rank = len(self.layers[layer][0].a)
            left, upper = torch.linalg.qr(b.flatten(1).double())
            right, lower = torch.linalg.qr(a.flatten(1).double().T)
            u, s, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
            root = s[:rank].sqrt()
            new_a = (root[:, None] * (v[:rank] @ right.T)).float().view(-1, *a.shape[1:])
            new_b = ((left @ u[:, :rank]) * root).float().view(len(b), -1, *b.shape[2:])
            found[layer] = _Factors(new_a, new_b)
        return found


def _layers(checkpoint: Checkpoint, component: str) -> dict[str, _Factors]:
    """Returns the factors of a file by layer, B multiplied by the adapter's scale."""
    parts: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name in checkpoint.pieces:
        values = checkpoint.read(name).float().view(checkpoint.pieces[name].shape)
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{name!r} in {checkpoint.label!r} is not finite")
        match, own = _FACTOR.fullmatch(name), name.removeprefix(f"{component}." if component else "")
        if match is not None:
            which = {"down": "A", "up": "B"}.get(match["b"], match["a"])
            layer = match["layer"].removeprefix(f"{component}." if component else "")
            parts.setdefault(layer, {})[which] = values
        elif name.endswith(".alpha"):
            alphas[own.removesuffix(".alpha")] = float(values)
        else:
            raise CheckpointError(
                f"{name!r} in {checkpoint.label!r} is no LoRA weight NAME.lora_A.weight; load the file into "
                "a pipeline and save it with save_lora_weights"
            )
    settings = _settings(checkpoint, component)
    found = {}
    for layer, factors in parts.items():
        if set(factors) != {"A", "B"} or len(factors["A"]) != factors["B"].shape[1]:
            raise CheckpointError(f"{layer!r} in {checkpoint.label!r} has not both factors of one rank")
        rank = len(factors["A"])
        alpha = alphas.get(layer, settings.get("lora_alpha", rank))
        found[layer] = _Factors(factors["A"], factors["B"] * (alpha / rank))
    return found


def _settings(checkpoint: Checkpoint, component: str) -> dict[str, Any]:
    """Returns what diffusers has written of the adapter's settings.

    Raises:
        CheckpointError: If the adapter is of another kind, or has other scales for some layers.
    """
    try:
        found = json.loads(checkpoint.metadata.get(_METADATA, "{}"))
    except ValueError as error:
        raise CheckpointError(f"the settings in {checkpoint.label!r} are no JSON: {error}") from error
    start = f"{component}."
    settings = {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
    for name in _REFUSED:
        if settings.get(name):
            raise CheckpointError(f"{checkpoint.label!r} has {name}={settings[name]!r}, not combined here")
    return settings


def _shape(factors: _Factors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(factors.a.shape[1:]), (factors.b.shape[0], *factors.b.shape[2:])


def _shape_of_product(factors: _Factors) -> torch.Size:
    return torch.Size((factors.b.shape[0], *factors.a.shape[1:]))

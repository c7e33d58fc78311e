"""The modules of a denoiser that can inherit their outputs: blocks, layers and units, from outside to inside.

In a U-Net a block is one of its down-, mid- or up-blocks, and a layer a residual or attention layer in
one. In a transformer a block is a layer. A unit is an attention or a feed-forward network in a
transformer's block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .layers import is_transformer_block

__all__ = ["LEVELS", "Parts", "parts_of"]

LEVELS = ("block", "layer", "unit")

WAY_DOWN = ("down_blocks", "mid_block", "controlnet_down_blocks", "controlnet_mid_block")
"""The parts of a ControlNet for a U-Net, in the order of evaluation."""

UNITS = ("attn", "attn1", "attn2", "attention", "ff", "ff_context", "ffn", "feed_forward")
"""The names of units in blocks of transformers."""


@dataclass(frozen=True)
class Parts:
    """The modules of one network that can inherit, or be left out; in each group the order of evaluation.

    Arguments:
        blocks: The blocks.
        layers: The layers, and what changes sizes.
        units: The units.
        stages: For each level but "unit" the names from the innermost to the outermost part, in groups that
            inherit together: the way up of a U-Net, or a transformer's blocks from the last to the first.
        changes: Whether what a block adds to its input is inherited, rather than its output.
    """

    blocks: dict[str, nn.Module]
    layers: dict[str, nn.Module]
    units: dict[str, nn.Module]
    stages: dict[str, list[tuple[str, ...]]]
    changes: bool

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All of them."""
        return {**self.blocks, **self.layers, **self.units}

    def inside(self, level: str, outer: int) -> tuple[str, ...]:
        """Returns the names of a level's modules but for those of the outermost parts.

        Arguments:
            level: One of `LEVELS`.
            outer: The number of parts, blocks or layers, that are left out.
        """
        stages = self.stages["layer" if level == "unit" else level]
        count = max(len(stages) - outer, 0)
        if level != "unit":
            return tuple(name for stage in stages[:count] for name in stage)
        kept = [f"{name}." for stage in stages[count:] for name in stage]
        return tuple(name for name in self.units if not name.startswith(tuple(kept)))


def parts_of(network: nn.Module) -> Parts | None:
    """Returns the modules of a denoiser that can inherit, or None if it is of no kind that is known here."""
    inner: Any = getattr(network, "_orig_mod", network)
    ups = getattr(inner, "up_blocks", None)
    if isinstance(ups, nn.ModuleList) and not any(isinstance(up, nn.ModuleList) for up in ups):
        return _unet(inner)
    blocks = {
        f"{name}.{place}": block
        for name, group in inner.named_children()
        if isinstance(group, nn.ModuleList)
        for place, block in enumerate(group)
        if is_transformer_block(block)
    }
    if not blocks:
        return None
    stages: list[tuple[str, ...]] = [(name,) for name in reversed(blocks)]
    units = {name: unit for block in blocks for name, unit in _units(block, blocks[block])}
    return Parts(blocks, {}, units, {"block": stages, "layer": stages}, changes=True)


def encoder_parts(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks and layers of a network, or of several in one, that have only a U-Net's way down."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if isinstance(getattr(module, "down_blocks", None), nn.ModuleList):
            blocks, layers = _way(module, WAY_DOWN)
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{part}": value for part, value in {**blocks, **layers}.items()}
    return found


def _unet(network: nn.Module) -> Parts:
    blocks, layers = _way(network, ("down_blocks", "mid_block", "up_blocks"))
    ups = [name for name in blocks if not name.startswith("down_blocks.")]
    fine: list[tuple[str, ...]] = []
    for name in ups:
        fine += _stages(name, blocks[name]) if name.startswith("up_blocks.") else [(name,)]
    units = {
        unit: module
        for layer in layers
        for name, block in layers[layer].named_modules(prefix=layer)
        if is_transformer_block(block)
        for unit, module in _units(name, block)
    }
    return Parts(blocks, layers, units, {"block": [(name,) for name in ups], "layer": fine}, changes=False)


def _way(network: Any, names: tuple[str, ...]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Returns blocks and layers of a U-Net by name, in the order of evaluation."""
    blocks: dict[str, nn.Module] = {}
    for name in names:
        part = getattr(network, name, None)
        if isinstance(part, nn.ModuleList):
            blocks |= {f"{name}.{place}": block for place, block in enumerate(part)}
        elif part is not None:
            blocks[name] = part
    layers = {
        f"{block}.{name}.{place}": layer
        for block in blocks
        for name, group in blocks[block].named_children()
        if isinstance(group, nn.ModuleList)
        for place, layer in enumerate(group)
        if layer is not None
    }
    return blocks, layers


def _stages(name: str, block: nn.Module) -> list[tuple[str, ...]]:
    """Returns the layers of an up-block, those that take one skip connection together; or it as one."""
    lists = {key: group for key, group in block.named_children() if isinstance(group, nn.ModuleList)}
    count = len(lists.get("resnets", ()))
    if not count:
        return [(name,)]
    stages = [
        tuple(f"{name}.{key}.{place}" for key in _ordered(lists) if len(lists[key]) == count)
        for place in range(count)
    ]
    rest = [f"{name}.{key}.{place}" for key, group in lists.items() if len(group) != count
            for place in range(len(group))]  # fmt: skip
    return [*stages[:-1], (*stages[-1], *rest)]


def _ordered(lists: dict[str, nn.ModuleList]) -> list[str]:
    return sorted(lists, key=lambda key: key != "resnets")


def _units(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, unit in block.named_children():
        if key in UNITS:
            yield f"{name}.{key}", unit

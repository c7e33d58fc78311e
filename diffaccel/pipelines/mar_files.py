"""Foreign files of weights: reading them without running their code, and renaming their tensors."""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError

__all__ = ["count_layers", "fill", "read_weights", "rename"]


def read_weights(file: Path, entries: Sequence[str]) -> dict[str, Tensor]:
    """Returns the tensors in a file, or in the first of some entries of it; no code in it is run.

    Raises:
        ModelError: If the file cannot be read, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the training's arguments
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {str(file)!r}: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # torch raises nearly every kind of error for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{str(file)!r} is no file of weights that is safe to load: {reason}") from error
    inside = entries if isinstance(content, dict) else ()
    found = next((content[name] for name in inside if name in content), content)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(
            f"{str(file)!r} holds no weights; expected tensors, or an entry {' or '.join(entries)}"
        )
    return dict(found)


def rename(
    weights: Mapping[str, Tensor], table: Sequence[tuple[str, str]]
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns tensors under the names that a table of patterns gives, and the names that it does not know.

    Arguments:
        weights: The tensors by name.
        table: Patterns for the beginnings of names, with what takes their place; the first that fits counts.
    """
    renamed, unknown = {}, []
    for name, tensor in weights.items():
        for pattern, new in table:
            if re.match(pattern, name):
                renamed[re.sub(pattern, new, name, count=1)] = tensor
                break
        else:
            unknown.append(name)
    return renamed, unknown


def count_layers(names: Iterable[str], pattern: str) -> int:
    """Returns the number of layers: of the values of a group in names that begin with a pattern."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def fill(model: nn.Module, weights: Mapping[str, Tensor], unexpected: list[str], source: str) -> None:
    """Loads renamed weights; all of the model's, and no others.

    Raises:
        ModelError: Naming what is missing, left over, or of another shape.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted([*unexpected, *(weights.keys() - own.keys())])
    if missing or unexpected:
        parts = [f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                 for what, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise ModelError(f"{source!r} does not fit {type(model).__name__}; {'; '.join(parts)}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ModelError(
                f"{source!r} has {name} of shape {tuple(tensor.shape)}; expected {tuple(own[name].shape)}"
            )
    model.load_state_dict(dict(weights))

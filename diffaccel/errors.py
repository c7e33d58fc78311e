"""The errors that diffaccel raises for mistakes of its user; each says what is wrong and what to do."""

import difflib
from collections.abc import Iterable

__all__ = [
    "AcceleratorConflict",
    "DiffaccelError",
    "MissingReference",
    "MissingWeights",
    "ModelError",
    "OptionError",
    "ProtocolMismatch",
    "UnknownAccelerator",
    "UnsupportedPipeline",
    "UnsupportedScheduler",
]


class DiffaccelError(Exception):
    """Base of all errors raised by diffaccel."""


class UnknownAccelerator(DiffaccelError, ValueError):
    """An accelerator or preset name that is not registered."""


class UnsupportedPipeline(DiffaccelError, ValueError):
    """A pipeline (or a component or call argument of it) that an accelerator cannot serve."""


class UnsupportedScheduler(UnsupportedPipeline):
    """A scheduler whose noise levels are unknown, or whose updates an accelerator cannot serve."""


class AcceleratorConflict(DiffaccelError, ValueError):
    """Two accelerators of one exclusive kind in the same stack."""


class OptionError(DiffaccelError, ValueError, TypeError):
    """An option that is unknown, of the wrong type, or out of range."""


class ModelError(DiffaccelError, ValueError):
    """A model folder or file that is missing, damaged, or not what was expected."""


class MissingWeights(DiffaccelError, FileNotFoundError):
    """The weights of an evaluation network, which are not on this machine or not what they should be."""


class MissingReference(DiffaccelError, FileNotFoundError):
    """Reference images or statistics that are not on this machine."""


class ProtocolMismatch(DiffaccelError, ValueError):
    """Results, or statistics, that were made in different ways and cannot be compared."""


def closest(name: str, known: Iterable[str]) -> str:
    """Returns a hint listing the known names, led by the closest match to ``name``."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}known: {', '.join(names) or 'none'}"

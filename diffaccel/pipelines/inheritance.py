"""Which modules inherit at which updates: patterns as data, and those made of a few numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError, OptionError
from ..files import read_object

__all__ = ["Inheritance", "computed_steps"]

VERSION = 1


@dataclass(frozen=True)
class Inheritance:
    """The modules that inherit at each solver update.

    Arguments:
        inherited: For each update the sorted names of the denoiser's modules that inherit; none in the first.
        order: 0 if outputs are inherited as they were, 1 if they are extrapolated from the last two.
        facts: What is known of it, such as the model that it was searched for.
    """

    inherited: tuple[tuple[str, ...], ...]
    order: int = 0
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Checks the pattern.

        Raises:
            ModelError: If something inherits before there is anything to inherit, or the data are no names.
        """
        if not all(isinstance(name, str) for names in self.inherited for name in names):
            raise ModelError("the modules of a pattern of inheritance are names")
        object.__setattr__(self, "inherited", tuple(tuple(sorted(set(names))) for names in self.inherited))
        if not self.inherited or self.inherited[0] or self.order not in (0, 1):
            raise ModelError("a pattern of inheritance begins with an update where nothing inherits")

    @property
    def names(self) -> frozenset[str]:
        """The modules that inherit at some update."""
        return frozenset(name for names in self.inherited for name in names)

    @property
    def sets(self) -> list[tuple[str, ...]]:
        """The different sets of modules that inherit together."""
        return sorted({names for names in self.inherited if names})

    def to_dict(self) -> dict[str, Any]:
        """Returns the pattern as plain data; each set of modules is written once."""
        sets = [(), *self.sets]
        return {"version": VERSION, "sets": [list(names) for names in sets],
                "steps": [sets.index(names) for names in self.inherited], "order": self.order,
                "facts": self.facts}  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> "Inheritance":
        """Returns a pattern from plain data.

        Raises:
            ModelError: If it is of another version, or no such pattern.
        """
        if not isinstance(data, Mapping) or data.get("version") != VERSION or "sets" not in data:
            raise ModelError(f"no pattern of `diffaccel search inherit`, version {VERSION}")
        try:
            sets = [tuple(names) for names in data["sets"]]
            steps = [sets[int(number)] for number in data["steps"]]
            return cls(tuple(steps), int(data["order"]), dict(data["facts"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ModelError(f"no pattern of inheritance: {error}") from None

    @classmethod
    def load(cls, file: Path) -> "Inheritance":
        """Reads a pattern from a JSON file.

        Raises:
            ModelError: If the file cannot be read, or holds something else.
        """
        try:
            return cls.from_dict(
                read_object(file, ModelError, "`diffaccel search inherit` writes such files")
            )
        except ModelError as error:
            raise ModelError(f"{str(file)!r}: {error}") from None


def computed_steps(total: int, every: int, power: float = 1.0, center: float = 0.0) -> list[int]:
    """Returns the updates that are computed in full: ceil(total / every) of them, the first among them.

    They are every ``every``-th one for power 1. Else, as DeepCache has it, they are denser around a center c:
    with k of them, k + 1 points are spaced evenly from -c^(1/p) to (T - c)^(1/p), raised to the power p with
    their signs kept, rounded towards 0, and moved by c. p falls by 0.02 until all are different.

    References:
        DeepCache: Accelerating Diffusion Models for Free (2023), arXiv 2312.00858.

    Arguments:
        total: The number of updates T.
        every: The updates for each one that is computed, at least 1.
        power: The power p, at least 1.
        center: The center c as a part of T, in [0, 1].

    Raises:
        OptionError: If an argument is out of range.
    """
    if total < 1 or every < 1 or power < 1 or not 0 <= center <= 1:
        raise OptionError(f"{total=}, {every=}, {power=}, {center=} are no steps of inheritance")
    count, middle = math.ceil(total / every), round(center * total)
    while power > 1:
        ends = -(middle ** (1 / power)), (total - middle) ** (1 / power)
        points = np.linspace(*ends, count + 1)[1:-1]
        raised = np.sign(points) * np.abs(points) ** power
        steps = sorted({0, *(middle + int(step) for step in raised)})
        if len(steps) == count:
            return steps
        power -= 0.02
    return list(range(0, total, every))

"""What is tried: a stack of accelerators with options, one of a kind, and a number of inference steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pipelines.accelerator import registry, resolve, tag

__all__ = ["KINDS", "Candidate", "Gene", "label_of"]

KINDS = ("solver", "skip")
"""The kinds of accelerators that are tried; guidance changes what is sampled, and what blocks do has no few
values that suit all models."""


def label_of(stack: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Returns a stack and its steps, as a command line takes them."""
    tags = [tag(accelerator) for accelerator in resolve(list(stack))]
    return f"{'+'.join(tags) or 'plain'}@{steps}"


@dataclass(frozen=True, order=True)
class Gene:
    """One accelerator with its options.

    Arguments:
        name: Its name.
        options: Names and values of the options that are tried.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def kind(self) -> str:
        """The accelerator's kind."""
        return registry()[self.name].exclusive


@dataclass(frozen=True)
class Candidate:
    """A stack and its steps.

    Arguments:
        steps: The inference steps.
        genes: The accelerators, at most one of a kind.
    """

    steps: int
    genes: tuple[Gene, ...] = ()

    @property
    def spec(self) -> list[dict[str, Any]]:
        """The stack as `accelerate` takes it."""
        return [{gene.name: dict(gene.options)} for gene in self.genes]

    @property
    def label(self) -> str:
        """The stack and its steps, as a command line takes them."""
        return label_of(self.spec, self.steps)

    def gene(self, kind: str) -> Gene | None:
        """Returns the accelerator of a kind, if there is one."""
        return next((gene for gene in self.genes if gene.kind == kind), None)

    def to_plain(self) -> dict[str, Any]:
        """Returns the candidate as plain data."""
        return {"steps": self.steps, "stack": self.spec}

    @classmethod
    def from_plain(cls, data: Any) -> "Candidate":
        """Returns a candidate from plain data."""
        parts = [item for part in data["stack"] for item in part.items()]
        return cls(data["steps"], tuple(Gene(name, tuple(options.items())) for name, options in parts))

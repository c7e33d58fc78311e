"""``diffaccel list``."""

import dataclasses

from rich.console import Console
from rich.table import Table

from .. import zoo
from ..pipelines import Accelerator, registry

__all__ = ["show"]


def show() -> None:
    """Prints the models and the accelerators."""
    models = Table("model", "folder", title="zoo")
    for name in zoo.names():
        models.add_row(name, str(zoo.path(name)))
    accelerators = Table("accelerator", "kind", "what it does", "presets", "options", title="accelerators")
    for name, cls in registry().items():
        first = (cls.__doc__ or "").strip().splitlines()[0]
        presets = "\n".join(f"{name}:{preset}" for preset in cls.presets)
        accelerators.add_row(name, cls.exclusive, first, presets, "\n".join(_options(cls)))
    console = Console()
    console.print(models)
    console.print(accelerators)


def _options(cls: type[Accelerator]) -> list[str]:
    lines = []
    for field in dataclasses.fields(cls):
        low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
        allowed = " | ".join(map(str, choices)) if choices else ""
        if low is not None or high is not None:
            allowed = f"{low if low is not None else '-inf'} to {high if high is not None else 'inf'}"
        lines.append(f"{field.name} = {field.default}" + (f"  ({allowed})" if allowed else ""))
    return lines

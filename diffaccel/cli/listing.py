"""``diffaccel list``."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import zoo
from ..pipelines import Accelerator, registry
from ..zoo.adapted import ADAPTED

__all__ = ["show"]


def show() -> None:
    """Prints the models and the accelerators."""
    models = Table(title="zoo", show_lines=True)
    for header in ("model", "pipeline", "takes", "scheduler", "size"):
        models.add_column(header, overflow="fold", no_wrap=header == "model")
    for name in zoo.names():
        models.add_row(name, *_model(zoo.path(name)))
    accelerators = Table(
        "accelerator", "kind", "what it does", "presets", title="accelerators", show_lines=True
    )
    options = Table("accelerator", "option", "default", "allowed", title="options")
    for name, cls in registry().items():
        first = (cls.__doc__ or "").strip().split("\n\n")[0].replace("``", "")
        accelerators.add_row(name, cls.exclusive, " ".join(first.split()), "\n".join(_presets(cls)))
        for field in dataclasses.fields(cls):
            options.add_row(name, field.name, str(field.default), _allowed(field))
        options.add_section()
    console = Console()
    for table in (models, accelerators, options):
        console.print(table)


def _model(folder: Path) -> tuple[str, str, str, str]:
    base = _read(folder / ADAPTED).get("base")
    index = _read((zoo.path(base) if base in zoo.names() else folder) / "model_index.json")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
    labels = index.get("id2label")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    takes = f"{len(labels)} labels, such as {next(iter(labels.values()))!r}" if labels else "prompts"
    kind = index.get("_class_name", "") if base is None else f"adapters on {base}"
    return kind, takes, scheduler, f"{size / 1e6:.0f} MB"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _presets(cls: type[Accelerator]) -> list[str]:
    return [
        f"{cls.name}:{preset}  {', '.join(f'{key}={value}' for key, value in options.items())}"
        for preset, options in cls.presets.items()
    ]


def _allowed(field: dataclasses.Field[Any]) -> str:
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    if choices:
        return " | ".join(map(str, choices))
    if low is not None and high is not None:
        return f"{low} to {high}"
    if low is not None or high is not None:
        return f"at least {low}" if high is None else f"at most {high}"
    return "True | False" if isinstance(field.default, bool) else f"any {type(field.default).__name__}"

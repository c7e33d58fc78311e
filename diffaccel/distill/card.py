"""The model card of a student: what it is made of and by, and how it must be called."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..errors import OptionError, closest
from .grid import Grid

__all__ = ["Card", "call_code", "card_text"]

_SAMPLERS = {
    "flow": "Euler's method on the velocity",
    "vp-ode": "the deterministic steps of DDIM",
    "x0-jump": "jumps to x0, with fresh noise between them",
}


@dataclass(frozen=True)
class Card:
    """What the maker of a student says of it.

    Arguments:
        teacher: The teacher: a name or hub id.
        method: The method of distillation.
        data: What it was trained on.
        licence: The licence of the weights.
        images: The length of the training in images.
        hours: Its length in hours, and on what, as "3.5 of one CPU core".
        figures: Measured numbers by what they are.
        limits: What it cannot do.
    """

    teacher: str
    method: str
    data: str
    licence: str
    images: int
    hours: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    limits: str = ""

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> "Card":
        """Returns the card with these entries.

        Raises:
            OptionError: If one is unknown, or one that a card needs is absent.
        """
        known = [entry.name for entry in fields(cls)]
        for name in entries:
            if name not in known:
                raise OptionError(f"a card has no {name!r}; {closest(name, known)}")
        needed = [entry.name for entry in fields(cls)
                  if entry.default is MISSING and entry.default_factory is MISSING]  # fmt: skip
        if missing := [name for name in needed if name not in entries]:
            raise OptionError(f"the card says nothing of: {', '.join(missing)}")
        return cls(**entries)


def card_text(
    card: Card, name: str, pipe: Any, grids: Sequence[Grid], guidance: float | None, fixed: bool,
    code: Sequence[str], facts: Mapping[str, str],
) -> str:  # fmt: skip
    """Returns a model card in Markdown.

    Arguments:
        card: What its maker says.
        name: The name of the student.
        pipe: Its pipeline.
        grids: Its grids.
        guidance: The guidance scale that it must be called with, or None if the pipeline takes none.
        fixed: Whether the pipeline makes the same images for every guidance scale.
        code: The code that loads it and makes an image.
        facts: Further rows of its table.
    """
    steps = ", ".join(str(len(grid)) for grid in grids)
    rows = {
        "teacher": card.teacher,
        "method": card.method,
        "trained on": f"{card.images:,} images in {card.hours} hours",
        "num_inference_steps": f"{steps}; it was trained for no other number",
        "guidance_scale": _guidance(pipe, guidance, fixed),
        "scheduler": f"`{type(pipe.scheduler).__name__}`, {_SAMPLERS[grids[0].kind]}",
        **{f"times of {len(grid)}": ", ".join(f"{time:.6g}" for time in grid.times) for grid in grids},
        **facts,
    }
    parts = [
        f"# {name}", f"A few-step student of {card.teacher}: a stock `{type(pipe).__name__}`.",
        "\n".join(["```python", *code, "```"]), _table(("what", "value"), rows),
        "A time t is that of x_t = (1 - t) x0 + t n, with noise at 1; on another path it is the level with "
        "the same ratio of noise to signal.",
        f"## Data\n\n{card.data}",
    ]  # fmt: skip
    if card.figures:
        parts.append(f"## Figures\n\n{_table(('what', 'value'), card.figures)}")
    if card.limits:
        parts.append(f"## Limits\n\n{card.limits}")
    return "\n\n".join([*parts, f"## Licence\n\n{card.licence}"]) + "\n"


def call_code(pipe: Any, conditions: Sequence[str], steps: int, guidance: float | None) -> str:
    """Returns a line that calls a pipeline.

    Arguments:
        pipe: The pipeline.
        conditions: Conditions, of which the first is taken.
        steps: The number of steps.
        guidance: The guidance scale, or None if none need be given.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    what = "batch_size=1"
    if "class_labels" in known:
        named = conditions[0] in (getattr(pipe, "labels", None) or {})
        what = f'pipe.get_label_ids(["{conditions[0]}"])' if named else f"[{conditions[0]}]"
    elif "prompt" in known:
        what = f'"{conditions[0]}"'
    scale = "" if guidance is None else f", guidance_scale={guidance:g}"
    return f"images = pipe({what}, num_inference_steps={steps}{scale})[0]"


def _guidance(pipe: Any, guidance: float | None, fixed: bool) -> str:
    if guidance is None:
        return "this pipeline has none"
    if fixed:
        return "any: the network predicts once, and does not use it"
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    off = " (off)" if guidance == 1 else ""
    return f"**{guidance:g}**{off}, as it was trained; give it, for the pipeline's default is {default}"


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows.items()}
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in shown.items())])

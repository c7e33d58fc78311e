"""Plans: what ``diffaccel tune`` has chosen for a model, what it promises, and what it was measured on."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DiffaccelError
from ..eval.provenance import model_digest, plain, versions
from ..files import read_object, whole
from ..pipelines.accelerator import resolve
from .candidate import label_of

__all__ = ["STORED", "Plan", "PlanError", "facts_of", "stored_file"]

FORMAT = 1
STORED = "diffaccel_plan.json"
"""The name of a plan in a model's folder."""
MATCHED = {"pipeline", "weights", "scheduler", "versions", "steps", "guidance", "shape"}
"""The names of what a plan is for."""
VERSIONED = ("diffaccel", "diffusers", "torch")
"""The packages whose versions must be those of the tuning."""


class PlanError(DiffaccelError, ValueError):
    """A file that is no plan, or a model that none is stored with."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stack of accelerators and a number of steps, for one model, scheduler, number of steps and guidance.

    Arguments:
        steps: The inference steps that are run.
        stack: The accelerators, as mappings of a name to options.
        match: What it was measured on (`facts_of`, and the call's steps, guidance and shape).
        promise: What was shown: metric, limit, bound, coverage, confidence, images.
        cost: Evaluations and speed-up.
        facts: Settings, machine and date of the tuning.
    """

    steps: int
    stack: tuple[Mapping[str, Any], ...]
    match: Mapping[str, Any]
    promise: Mapping[str, Any]
    cost: Mapping[str, Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The stack and its steps, as a command line takes them."""
        return label_of(self.stack, self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data."""
        content = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": "plan", "format": FORMAT, "label": self.label, **content}

    @property
    def text(self) -> str:
        """The content of the plan's file."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, file: Path) -> None:
        """Writes the plan as JSON.

        Raises:
            OSError: If the file cannot be written.
        """
        with whole(file) as temporary:
            temporary.write_text(self.text, encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> "Plan":
        """Reads a plan.

        Raises:
            PlanError: If the file is missing, damaged, or of another version.
            DiffaccelError: If its accelerators are unknown, or have other options now.
        """
        content = read_object(file, PlanError, "expected a plan written by diffaccel tune")
        if content.get("kind") != "plan" or content.get("format") != FORMAT:
            raise PlanError(f"{str(file)!r} is no plan of format {FORMAT}; make one with diffaccel tune")
        try:
            found = cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
            parts = [found.match, found.promise, found.cost, found.facts, *found.stack]
        except (KeyError, TypeError) as error:
            raise PlanError(f"{str(file)!r} is a damaged plan: {error}") from None
        sound = type(found.steps) is int and found.steps > 0 and all(isinstance(part, dict) for part in parts)
        if not sound or not MATCHED <= set(found.match):
            raise PlanError(f"{str(file)!r} is a damaged plan: its entries are not those of one")
        resolve(list(found.stack))
        return cls(found.steps, tuple(found.stack), found.match, found.promise, found.cost, found.facts)

    def mismatch(self, pipe: Any) -> str | None:
        """Returns why the plan is not for a pipeline as it is now, but for its weights; None if it is."""
        now = _light_facts(pipe)
        for name in ("versions", "pipeline"):
            if (then := self.match[name]) != now[name]:
                return f"the plan was tuned with {_different(then, now[name])}; tune again"
        if (then := self.match["scheduler"]) != now["scheduler"]:
            return (f"the plan was tuned for the scheduler {_different(then, now['scheduler'])}; set this "
                    "scheduler, or tune again")  # fmt: skip
        return None

    def other_weights(self, pipe: Any) -> str | None:
        """Returns that the weights, or their type, are not those that were tuned; None if they are."""
        if model_digest(pipe) == self.match["weights"]:
            return None
        return "the plan was tuned for other weights, or other types of weights; tune again"


def facts_of(pipe: Any) -> dict[str, Any]:
    """Returns what a plan's measurements depend on: versions, pipeline, weights and scheduler."""
    return {**_light_facts(pipe), "weights": model_digest(pipe)}


@functools.cache
def _releases() -> dict[str, str]:
    """Returns the versions of the packages, without the names of builds."""
    installed = versions()
    return {name: installed.get(name, "").partition("+")[0] for name in VERSIONED}


def _light_facts(pipe: Any) -> dict[str, Any]:
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    scheduler = {"class": type(pipe.scheduler).__name__, **plain(config)}
    return {"versions": _releases(), "pipeline": type(pipe).__name__, "scheduler": scheduler}


def _different(then: Any, now: Any) -> str:
    """Returns the first difference of two facts in words."""
    if not isinstance(then, Mapping):
        return f"{then}, this is {now}"
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            return f"{name}={then.get(name)}, this is {now.get(name)}"
    return f"{then}, this is {now}"


def stored_file(pipe: Any) -> Path:
    """Returns where the plan of a pipeline's model is, or would be, stored: in the folder it was loaded from.

    Raises:
        PlanError: If the pipeline was not loaded from a folder.
    """
    name = getattr(pipe, "name_or_path", None)
    folder = Path(name) if name else None
    if folder is None or not folder.is_dir():
        where = f"from {str(name)!r}" if name else "made in memory"
        raise PlanError(
            f"a plan is stored in a model's folder, and this pipeline is {where}; give a plan's file: "
            "accel='plan.json'"
        )
    return folder / STORED

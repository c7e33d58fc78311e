"""What the words of a command line mean: stacks of accelerators, schedulers, prompts; checked early."""

import ast
import inspect
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import OptionError, closest
from ..pipelines import attached, resolve
from ..zoo.folders import quiet

__all__ = [
    "DTYPES",
    "SCHEDULERS",
    "check_options",
    "check_stacks",
    "read_accel",
    "read_prompts",
    "read_steps",
    "set_scheduler",
]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++1s": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Short names of schedulers; any class name of diffusers is understood as well."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The types of weights, by name."""

_PARTS = re.compile(r"\+(?![^(]*\))")  # a plus sign outside of parentheses
_BAD_CONFIG = (ValueError, TypeError, AttributeError, NotImplementedError)


def read_accel(text: str) -> Any:
    """Reads a stack: ``name``, ``name:preset``, ``name(option=value, ...)``, ``a+b``, or JSON.

    Raises:
        OptionError: If the text has none of these forms.
    """
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"--accel {text!r} is not valid JSON: {error}") from None
    return [_read_one(part.strip()) for part in _PARTS.split(text)]


def read_steps(text: str, steps: int) -> tuple[str, int]:
    """Returns a stack and its inference steps: those after a last "@", as in ``s3@5``, or the default.

    Arguments:
        text: What stands after ``--accel``.
        steps: The default.

    Raises:
        OptionError: If the steps are 0.
    """
    stack, at, number = text.rpartition("@")
    if not at or not number.isdecimal():
        return text, steps
    if not int(number):
        raise OptionError(f"--accel {text!r} asks for 0 steps")
    return stack, int(number)


def check_stacks(texts: Sequence[str], pipe: Any = None) -> None:
    """Checks what stands after each ``--accel``, and on a pipeline also whether it can have it.

    Arguments:
        texts: Stacks, with or without steps.
        pipe: The pipeline, which is left as it is.

    Raises:
        DiffaccelError: If a stack is unknown, impossible, or not for this pipeline.
    """
    for text in texts:
        spec = read_accel(read_steps(text, 1)[0])
        if pipe is None:
            resolve(spec)
        else:
            with attached(pipe, spec):
                pass


def _read_one(text: str, what: str = "--accel") -> Any:
    if "(" not in text:
        return text
    name, _, rest = text.partition("(")
    form = OptionError(f"{what} {text!r} is not of the form name(option=value, ...)")
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise form
        return {name.strip(): {str(word.arg): _value(word.value) for word in call.keywords}}
    except (SyntaxError, ValueError):
        raise form from None


def _value(node: ast.expr) -> Any:
    """Returns a literal; a bare word is a string, as in the tags of accelerators."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def check_options(device: str, dtype: str, guidance: float | None, scheduler: str | None) -> None:
    """Checks what can be checked before a model is loaded.

    Raises:
        OptionError: Naming the option at fault.
    """
    if dtype not in DTYPES:
        raise OptionError(f"no dtype {dtype!r}; {closest(dtype, DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(":", 1)[0].split(". ", 1)[0]
        raise OptionError(f"no device {device!r} on this machine: {reason}") from None
    if guidance is not None and not math.isfinite(guidance):
        raise OptionError(f"guidance {guidance} is not a finite number")
    if scheduler is not None:
        _scheduler_class(_read_scheduler(scheduler)[0])


def _read_scheduler(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name of a scheduler, and the options in its parentheses."""
    found = _read_one(text, "--scheduler")
    if isinstance(found, str):
        return found, {}
    ((name, options),) = found.items()
    return name, options


def _scheduler_class(name: str) -> Any:
    cls: Any = getattr(diffusers, SCHEDULERS.get(name, name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise OptionError(f"no scheduler {name!r}; {closest(name, SCHEDULERS)}, or a class name of diffusers")
    return cls


def set_scheduler(pipe: Any, name: str | None) -> None:
    """Gives a pipeline another scheduler, made from the configuration of the one it has.

    A model of flow matching gets the flow variant of the scheduler; where there is none, or where a flow
    scheduler is asked for a model of another kind, the images would be noise, and it is refused.

    Raises:
        OptionError: If there is no such scheduler, or it does not take the configuration.
    """
    if name is None:
        return
    name, given = _read_scheduler(name)
    cls, config = _scheduler_class(name), pipe.scheduler.config
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    for key in given:
        if key not in known:
            raise OptionError(f"{cls.__name__} has no option {key!r}; {closest(key, known)}")
    flow = _is_flow_class(type(pipe.scheduler)) or config.get("prediction_type") == "flow_prediction"
    options: dict[str, Any] = {}
    if flow and not _is_flow_class(cls):
        if "use_flow_sigmas" not in known:
            raise OptionError(f"{cls.__name__} cannot sample this model of flow matching; try dpm++ or unipc")
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        if "shift" in config:
            options["flow_shift"] = config["shift"]
    elif _is_flow_class(cls) and not flow:
        raise OptionError(f"{cls.__name__} is for models of flow matching, and this is none; try dpm++")
    try:
        with quiet([]):
            pipe.scheduler = cls.from_config(config, **{**options, **given})
    except _BAD_CONFIG as error:
        raise OptionError(f"{cls.__name__} does not fit this model: {error}") from error


def _is_flow_class(cls: type) -> bool:
    return cls.__name__.startswith("FlowMatch")


def read_prompts(file: Path) -> list[str]:
    """Returns the lines of a text file that are not empty.

    Raises:
        OptionError: If it cannot be read, or has no line.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise OptionError(f"cannot read --prompts {str(file)!r}: {reason}") from None
    if not any(lines):
        raise OptionError(f"--prompts {str(file)!r} is empty; expected one prompt a line")
    return [line for line in lines if line]

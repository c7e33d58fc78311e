"""What the commands share: reading options, writing whole files, calling a pipeline."""

import ast
import contextlib
import inspect
import json
import math
import os
import platform
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from ..errors import DiffaccelError, OptionError, closest
from ..pipelines.run import denoisers_of
from ..zoo.folders import quiet

__all__ = [
    "DTYPES",
    "SCHEDULERS",
    "OutputError",
    "Sampler",
    "StepBar",
    "check_options",
    "check_output",
    "default_conditions",
    "device_of",
    "machine",
    "plain",
    "progress_bar",
    "read_accel",
    "read_prompts",
    "set_scheduler",
    "versions",
    "write_files",
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
_BAD_CALL = (ValueError, TypeError, AttributeError, NotImplementedError)


class OutputError(DiffaccelError, OSError):
    """An output folder that cannot be written."""


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


def _read_one(text: str) -> Any:
    if "(" not in text:
        return text
    name, _, rest = text.partition("(")
    form = OptionError(f"--accel {text!r} is not of the form name(option=value, ...)")
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
        _scheduler_class(scheduler)


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
    cls, config = _scheduler_class(name), pipe.scheduler.config
    flow = _is_flow_class(type(pipe.scheduler)) or config.get("prediction_type") == "flow_prediction"
    options: dict[str, Any] = {}
    if flow and not _is_flow_class(cls):
        if "use_flow_sigmas" not in inspect.signature(cls.__init__).parameters:
            raise OptionError(f"{cls.__name__} cannot sample this model of flow matching; try dpm++ or unipc")
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        if "shift" in config:
            options["flow_shift"] = config["shift"]
    elif _is_flow_class(cls) and not flow:
        raise OptionError(f"{cls.__name__} is for models of flow matching, and this is none; try dpm++")
    try:
        with quiet([]):
            pipe.scheduler = cls.from_config(config, **options)
    except _BAD_CALL as error:
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


def check_output(folder: Path) -> None:
    """Checks that files can be written to a folder, which need not exist yet and is not made.

    Raises:
        OutputError: If they cannot.
    """
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    """Writes files to a folder: all under temporary names first, and then each gets its own.

    Whatever goes wrong, there is no half-written file, and no folder that was not there before.

    Returns:
        The files' paths.

    Raises:
        OutputError: If the folder cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    staged: list[tuple[str, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
            staged.append((temporary, folder / name))
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(temporary, 0o644)
        for temporary, path in staged:
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        for path in missing:  # innermost first; those with files in them stay
            with contextlib.suppress(OSError):
                path.rmdir()
    return [path for _, path in staged]


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    from .. import __version__

    return {
        "diffaccel": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what times depend on: processor, cores, threads, device."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = found[1] if found else name
    used = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": used}


def plain(value: Any) -> Any:
    """Returns a value as plain data for strict JSON; what JSON does not have becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def progress_bar() -> Progress:
    """Returns a progress bar on stderr, which is silent where that is no terminal."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, transient=True, console=console, disable=not console.is_terminal)


class StepBar:
    """Stands for the progress bar of a pipeline, and tells how many of how many steps are done."""

    def __init__(self, tell: Callable[[int, int], None], iterable: Any = None, total: Any = None) -> None:
        self.tell, self.iterable, self.done = tell, iterable, 0
        self.total = int(total) if total is not None else len(iterable)

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        """Counts steps."""
        self.done += n
        self.tell(self.done, self.total)

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """Takes what some pipelines would show."""


class Sampler:
    """Calls a pipeline of any kind on fixed conditions and noise.

    Arguments:
        pipe: The pipeline: prompted, class-conditional or unconditional.
        conditions: Prompts; class names or numbers; or for an unconditional pipeline nothing.
        steps: The number of inference steps.
        guidance: The guidance scale, or None for the pipeline's own.
        seed: The seed of the one generator that decides all noise.
        count: The number of images of an unconditional pipeline.

    Raises:
        OptionError: If the conditions are not what the pipeline takes.
    """

    def __init__(self, pipe: Any, conditions: Sequence[str], steps: int, guidance: float | None, seed: int,
                 count: int = 1) -> None:  # fmt: skip
        self.pipe, self.steps, self.seed = pipe, steps, seed
        self.reports: list[tuple[int, Any]] = []
        """The sizes and reports of the batches of the last call, if the pipeline is accelerated."""
        self.conditions = list(conditions)
        self.count = len(self.conditions) or count
        known, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
        self.kind = next((kind for kind in ("prompt", "class_labels") if kind in known), "batch_size")
        if _needed(known) - {self.kind} or self.kind not in known or "num_inference_steps" not in known:
            raise OptionError(f"{name} needs more than prompts, labels or noise; call it from Python")
        if guidance is not None and "guidance_scale" not in known:
            raise OptionError(f"{name} takes no guidance")
        if guidance is None and "guidance_scale" in known:
            guidance = known["guidance_scale"].default
        self.guidance = guidance
        if self.kind == "batch_size" and self.conditions:
            raise OptionError(f"{name} takes no prompt; it is unconditional")
        if self.kind != "batch_size" and not self.conditions:
            raise OptionError(f"{name} needs a {self.kind.replace('class_labels', 'label')}")
        self.values: list[Any] = self.conditions
        if self.kind == "class_labels":
            self.values = [self._label(text) for text in self.conditions]

    def _label(self, text: str) -> int:
        labels: dict[str, int] = getattr(self.pipe, "labels", None) or {}
        if text in labels:
            return int(labels[text])
        if text.isdecimal() and (not labels or int(text) in labels.values()):
            return int(text)
        if not labels:
            raise OptionError(f"no label {text!r}; this model knows labels by number only")
        some = closest(text, labels) if len(labels) < 20 else (
            f"{closest(text, labels).partition('known:')[0]}known: {len(labels)} labels such as "
            f"{', '.join(map(repr, list(labels)[:4]))}, or their numbers"
        )  # fmt: skip
        raise OptionError(f"no label {text!r}; {some}")

    def __call__(self, steps: int | None = None, batch: int = 64) -> torch.Tensor:
        """Returns images (N, 3, H, W) in [0, 1]; the frames of a video side by side.

        Raises:
            OptionError: If the pipeline refuses its arguments, with its words.
        """
        generator = torch.Generator().manual_seed(self.seed)
        options = {"num_inference_steps": steps or self.steps, "generator": generator, "output_type": "np"}
        if self.guidance is not None:
            options["guidance_scale"] = self.guidance
        images = []
        self.reports.clear()
        for start in range(0, self.count, batch):
            size = min(batch, self.count - start)
            part = self.values[start : start + batch] or size
            try:
                result = torch.as_tensor(self.pipe(**{self.kind: part}, **options)[0])
            except DiffaccelError:
                raise
            except _BAD_CALL as error:
                raise OptionError(f"{type(self.pipe).__name__} refuses the call: {error}") from error
            images.append(torch.cat(result.unbind(1), 2) if result.ndim == 5 else result)
            if hasattr(self.pipe, "accel"):
                self.reports.append((len(result), self.pipe.accel.report))
        return torch.cat(images).movedim(-1, 1)


def _needed(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    """Returns the names of the arguments that a call cannot do without."""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in optional
    }


def device_of(pipe: Any) -> torch.device:
    """Returns the device of a pipeline's denoiser."""
    return next(next(iter(denoisers_of(pipe).values())).parameters()).device


def default_conditions(model: str, pipe: Any, count: int) -> list[str]:
    """Returns conditions for a benchmark: those of the zoo, or the labels that a pipeline knows.

    Raises:
        OptionError: If there are none; a text-to-image model of one's own needs prompts of one's own.
    """
    from .. import zoo

    labels = getattr(pipe, "labels", None)
    if model in zoo.names():
        return [zoo.LABELS[n] for n in zoo.labels(count)] if labels else zoo.prompts(count)
    if labels:
        return random.Random(0).choices(sorted(labels), k=count)
    if "prompt" in inspect.signature(pipe.__call__).parameters:
        raise OptionError("this model needs --prompts FILE, a text file with one prompt a line")
    return []

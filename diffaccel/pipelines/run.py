"""One accelerated call of a pipeline: its gates, counters and report, and the calls that pass the seams."""

import copy
import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn

from ..errors import UnsupportedPipeline
from ..noise import Path, path_of
from .accelerator import Accelerator, tag
from .gates import CURRENT, Gate, close_gate, open_gate, seam
from .loops import why_unusual
from .report import Action, Count, Report, Stopwatch
from .rows import rows_of, take_rows

__all__ = [
    "AUXILIARY",
    "DENOISERS",
    "BlockCall",
    "Evaluation",
    "Run",
    "Update",
    "denoisers_of",
    "first_input",
    "own_index",
    "parameters_of",
]

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
"""The components that predict, by name."""

UNUSUAL_DENOISERS = ("decoder", "image_unet")
"""Those that predict where there is none of the others: Stable Cascade, Wuerstchen, Versatile Diffusion."""

AUXILIARY = ("controlnet",)
"""The components that feed a denoiser at every step."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a network, as the pipeline asks for it; change it with `dataclasses.replace`.

    Arguments:
        run: The run that it belongs to.
        network: The component's name.
        module: The component.
        args: The positional arguments.
        kwargs: The keyword arguments.
        step: The solver update that it leads to.
        branch: The call of this network within the step.
        share: The part of the batch that is evaluated.
    """

    run: "Run"
    network: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int
    branch: int
    share: float = 1.0

    @property
    def sample(self) -> Any:
        """The noisy input, as the network takes it: a tensor (rows, *), or a list with one entry a row."""
        return first_input(self.module, self.args, self.kwargs)

    @property
    def timestep(self) -> Any:
        """The timestep in the network's units, or None."""
        return self.kwargs.get("timestep", self.args[1] if len(self.args) > 1 else None)

    @property
    def rows(self) -> int:
        """The rows of the network's batch: the samples times the stacked guidance branches."""
        return len(self.sample)

    @property
    def index(self) -> int:
        """The index in ``run.path`` of the update that the evaluation leads to."""
        return self.run.coming(self.timestep)

    def select(self, samples: Sequence[int], batch: int) -> "Evaluation":
        """Returns the evaluation for some of the ``batch`` samples only."""
        index, size = rows_of(samples, batch, self.rows), self.rows
        args = tuple(take_rows(value, index, size) for value in self.args)
        kwargs = {name: take_rows(value, index, size, name) for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs, share=self.share * len(samples) / batch)

    def log(self, accelerator: Accelerator, what: str, samples: Sequence[int]) -> None:
        """Enters an intervention into the report, such as ``"skip"``."""
        action = Action(self.step, self.branch, self.network, accelerator.name, what, tuple(samples))
        self.run.report.actions.append(action)


@dataclass(frozen=True)
class Update:
    """One update of the solver; change it with `dataclasses.replace`.

    Arguments:
        run: The run that it belongs to.
        output: What the pipeline made of the networks' predictions (guided), with shape (B, *).
        timestep: The scheduler's timestep.
        sample: The noisy sample x_t in the scheduler's coordinates, with shape (B, *).
        options: The other arguments of ``scheduler.step``.
        step: The update, counted from 0 in its sampling loop.
        index: Its index in ``run.path``; larger than ``step`` where a loop begins in mid-schedule.
    """

    run: "Run"
    output: Tensor
    timestep: Any
    sample: Tensor
    options: dict[str, Any]
    step: int
    index: int


@dataclass(frozen=True)
class BlockCall:
    """One call of a denoiser's sub-module, within the evaluation ``branch`` of a ``step``."""

    run: "Run"
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int
    branch: int


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the first argument of a network's call, given by position or by name: the noisy input."""
    if args:
        return args[0]
    return next(kwargs[name] for name in parameters_of(module) if name in kwargs)


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a network's call; where it is several in one, those of the first."""
    inner: Any = getattr(module, "_orig_mod", module)
    return inspect.signature(type(getattr(inner, "leading", inner)).forward).parameters


def own_index(scheduler: Any) -> int | None:
    """Returns the index of the next update that a scheduler knows by itself, or None."""
    for name in ("step_index", "begin_index"):
        # not by a default: diffusers' classes are slow to find that they lack a name
        known = hasattr(type(scheduler), name) or name in vars(scheduler)
        if known and (index := getattr(scheduler, name)) is not None:
            return int(index)
    return None


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Returns the denoisers of a pipeline by name."""
    for names in (DENOISERS, UNUSUAL_DENOISERS):
        found = {name: getattr(pipe, name, None) for name in names}
        if networks := {name: module for name, module in found.items() if isinstance(module, nn.Module)}:
            return networks
    return {}


class Run:
    """The context of one pipeline call; opens the gates when entered and closes them when left.

    Arguments:
        pipe: The pipeline.
        stack: The user's accelerators, outermost first; the run works on copies.
        arguments: The arguments of the call by name.

    Raises:
        UnsupportedPipeline: On entering, if an accelerator cannot serve the pipeline as it is now.
    """

    def __init__(self, pipe: Any, stack: Sequence[Accelerator], arguments: dict[str, Any]) -> None:
        self.pipe, self.arguments = pipe, arguments
        self.stack = [copy.copy(accelerator) for accelerator in stack]
        self.report = Report(tuple(tag(accelerator) for accelerator in stack), auxiliary=AUXILIARY)
        self.scheduler = pipe.scheduler
        self.networks = denoisers_of(pipe)
        self.replaced: str | None = None
        """The accelerator whose scheduler stands in the place of the pipeline's."""
        self.step, self.first_index = 0, 0
        self.batch = 0
        """The number of samples B, known from the first update on."""
        self._index = -1
        self._branches: dict[str, int] = {}
        self._path: Path | None = None
        self._known: tuple[Any, list[float]] = (None, [])
        self._started = False
        self._watch = Stopwatch()
        self._handlers: dict[int, Callable[[Gate, tuple[Any, ...], dict[str, Any]], Any]] = {}
        self._close = ExitStack()

    @property
    def path(self) -> Path:
        """The noise levels of the loop, by `Update.index`."""
        if self._path is None:
            self._path = path_of(self.scheduler)
        return self._path

    @property
    def num_updates(self) -> int:
        """The solver updates of the loop; a pipeline may leave out the first or the last of the path."""
        left = len(self.path) - self.first_index
        announced = vars(self.pipe).get("_num_timesteps")
        return min(left, announced) if isinstance(announced, int) and announced > 0 else left

    def __enter__(self) -> Self:
        check_stack(self.pipe, self.stack)
        self._begin = time.perf_counter()
        with ExitStack() as undo:
            self._replace_scheduler(undo)
            for name in AUXILIARY:
                if isinstance(module := getattr(self.pipe, name, None), nn.Module):
                    self.networks[name] = module
            for name, module in self.networks.items():
                self._open(undo, module, seam(module), functools.partial(self._network, name))
                self.report.counts[name] = Count()
            self._open(undo, self.scheduler, "set_timesteps", self._set_timesteps)
            self._open(undo, self.scheduler, "step", self._update)
            for accelerator in self.stack:
                for module in accelerator.blocks(self.pipe):
                    self._open(undo, module, seam(module), self._block)
            self._open_clocks(undo)
            token = CURRENT.set(self)
            undo.callback(CURRENT.reset, token)
            self._close = undo.pop_all()
        return self

    def _replace_scheduler(self, undo: ExitStack) -> None:
        """Puts an accelerator's scheduler in the place of the pipeline's; not through its own bookkeeping."""
        for accelerator in self.stack:
            if (other := accelerator.scheduler(self.pipe, self.arguments)) is not None:
                undo.callback(self.pipe.__dict__.__setitem__, "scheduler", self.pipe.scheduler)
                self.pipe.__dict__["scheduler"] = self.scheduler = other
                self.replaced = accelerator.name

    def __exit__(self, *exc: object) -> None:
        self._close.close()
        self.report.seconds = {**self._watch.finish(), "total": time.perf_counter() - self._begin}
        self.stack.clear()

    def owns(self, gate: Gate) -> bool:
        """Returns whether the run has opened this gate."""
        return id(gate) in self._handlers

    def enter(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handles a call that has reached one of the run's gates."""
        return self._handlers[id(gate)](gate, args, kwargs)

    def _open(self, undo: ExitStack, owner: Any, attribute: str, handler: Callable[..., Any]) -> None:
        gate = open_gate(owner, attribute)
        undo.callback(close_gate, gate)
        self._handlers.setdefault(id(gate), handler)

    def _open_clocks(self, undo: ExitStack) -> None:
        for name in sorted(getattr(self.pipe, "components", {})):
            module = getattr(self.pipe, name, None)
            if not isinstance(module, nn.Module):
                continue
            if name.startswith("text_encoder"):
                clock = functools.partial(self._clock, "text_encoder")
                self._open(undo, module, seam(module), clock)
            elif name.startswith("vae") and hasattr(module, "decode"):
                for attribute in ("encode", "decode"):
                    self._open(undo, module, attribute, functools.partial(self._clock, "vae"))

    def _clock(self, part: str, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next((value.device for value in given), None)
        return self._watch.time(part, functools.partial(gate.original, *args, **kwargs), device)

    def _chain(self, name: str, last: Callable[[Any], Any]) -> Callable[[Any], Any]:
        for accelerator in reversed(self.stack):
            last = functools.partial(getattr(accelerator, name), proceed=last)
        return last

    def _restart(self) -> None:
        self.step, self._index, self._branches, self._path = 0, -1, {}, None
        self._known = (None, [])
        self._started = True
        for accelerator in self.stack:
            accelerator.start(self)

    def _bound(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a scheduler's method by name; some are only for the pipeline's own."""
        try:
            return gate.bind(args, kwargs)
        except TypeError as error:
            if self.replaced is None:
                raise
            name = type(self.pipe).__name__
            reason = f"it calls {gate.attribute}() as only its own scheduler takes it: {error}"
            raise UnsupportedPipeline(f"{self.replaced} cannot accelerate this {name}: {reason}") from error

    def _set_timesteps(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._bound(gate, args, kwargs)
        result = gate.original(*args, **kwargs)
        self._restart()
        return result

    def _network(self, name: str, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._started:
            return gate.original(*args, **kwargs)
        branch = self._branches.get(name, 0)
        self._branches[name] = branch + 1
        count = self.report.counts[name]
        count.requested += 1

        def compute(call: Evaluation) -> Any:
            count.evaluated += call.share
            count.rows += call.rows
            sample = call.sample
            device = sample.device if isinstance(sample, Tensor) else None
            function = functools.partial(gate.original, *call.args, **call.kwargs)
            return self._watch.time("denoiser", function, device)

        call = Evaluation(self, name, self.networks[name], args, kwargs, self.step, branch)
        return self._chain("evaluate", compute)(call)

    def _update(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._started:
            self._restart()
        given = self._bound(gate, args, kwargs)
        names = (next(iter(given)), "timestep", "sample")  # of the prediction, which comes first; others may
        given.update(given.pop("kwargs", {}))  # stand between the two
        output, timestep, sample = (given.pop(name) for name in names)
        self._index = self._locate(timestep)
        if self.step == 0:
            self.first_index = self._index
        self.batch = self.report.batch = len(sample)

        def solve(call: Update) -> Any:
            main = dict(zip(names, (call.output, call.timestep, call.sample), strict=True))
            return gate.original(**main, **call.options)

        call = Update(self, output, timestep, sample, given, self.step, self._index)
        result = self._chain("update", solve)(call)
        self.step += 1
        self.report.updates += 1
        self._branches.clear()
        return result

    def _block(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._started:
            return gate.original(*args, **kwargs)

        def compute(call: BlockCall) -> Any:
            return gate.original(*call.args, **call.kwargs)

        branch = max(self._branches.values(), default=1) - 1
        call = BlockCall(self, gate.owner, args, kwargs, self.step, branch)
        return self._chain("block", compute)(call)

    def coming(self, timestep: Any) -> int:
        """Returns the index of the next update, from the timestep that a network sees: any unit, or None."""
        if (index := own_index(self.scheduler)) is not None:
            return index
        if self.step or timestep is None:
            return self._index + 1
        value, known = _number(timestep), self._timesteps()
        return known.index(value) if value in known else 0

    def _timesteps(self) -> list[float]:
        """Returns the scheduler's timesteps, read from the device once."""
        source = self.scheduler.timesteps
        if self._known[0] is not source:
            self._known = (source, source.tolist())
        return self._known[1]

    def _locate(self, timestep: Any) -> int:
        """Returns the index of an update in the path: the scheduler's own, else that of the timestep."""
        if (index := own_index(self.scheduler)) is not None:
            return index
        if hasattr(type(self.scheduler), "index_for_timestep"):
            return int(self.scheduler.index_for_timestep(timestep))
        value, timesteps = _number(timestep), self._timesteps()
        if self._index + 1 < len(timesteps) and timesteps[self._index + 1] == value:
            return self._index + 1
        matches = [i for i, known in enumerate(timesteps) if known == value]
        later = [index for index in matches if index > self._index]  # PNDM repeats a timestep
        return (later or matches or [self._index + 1])[0]


def _number(timestep: Any) -> float:
    """Returns a timestep, the first one of a tensor."""
    if isinstance(timestep, Tensor) and timestep.ndim:
        timestep = timestep.flatten()[0]
    return float(timestep)


def check_stack(pipe: Any, stack: Sequence[Accelerator]) -> None:
    """Checks that a pipeline has what accelerators need.

    Raises:
        UnsupportedPipeline: With the reason, if it has not.
    """
    name = type(pipe).__name__
    step = getattr(getattr(pipe, "scheduler", None), "step", None)
    if not callable(step):
        raise UnsupportedPipeline(f"{name} has no scheduler with a step(); accelerate its parts")
    if not {"timestep", "sample"} <= inspect.signature(step).parameters.keys():
        raise UnsupportedPipeline(f"the step() of {name}'s scheduler takes no timestep and sample")
    if not denoisers_of(pipe):
        names = ", ".join([*DENOISERS, *UNUSUAL_DENOISERS])
        raise UnsupportedPipeline(f"{name} has no denoiser; looked for {names}")
    for accelerator in stack:
        if reason := why_unusual(pipe, accelerator.exclusive) or accelerator.check(pipe):
            raise UnsupportedPipeline(f"{accelerator.name} cannot accelerate this {name}: {reason}")

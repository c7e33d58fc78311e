"""Feature inheritance: at most steps the inner modules of the denoiser give what they gave before.

References:
    | DeepCache: Accelerating Diffusion Models for Free (2023), https://arxiv.org/abs/2312.00858

    | A-SDM: Accelerating Stable Diffusion through Model Assembly and Feature Inheritance Strategies (2024)
    | https://arxiv.org/abs/2406.00210
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ..errors import DiffaccelError, OptionError, UnsupportedPipeline, UnsupportedScheduler
from ..noise import probe
from .accelerator import Accelerator, Proceed, option
from .dataflow import Trace
from .features import Features, signature_of
from .gates import is_compiled_whole
from .identity import differs_from
from .inheritance import Inheritance, computed_steps
from .levels import LEVELS, Parts, encoder_parts, parts_of
from .run import AUXILIARY, BlockCall, Evaluation, Run, denoisers_of

__all__ = ["Inherit"]


@dataclass
class Inherit(Accelerator):
    """Computes the outermost modules of the denoiser at each step, and the inner ones at every ``every``-th.

    At the other steps the inner modules inherit: in a U-Net they give what they gave at the last step that
    was computed in full, in a transformer they add to their input what they added then. What feeds only
    modules that inherit is not evaluated at all; that is found by following the data through the first
    evaluation, a U-Net's ControlNet included. DeepCache is the case of a U-Net with ``level="layer"``,
    ``outer`` being its branch plus 1. The solver and its number of updates are the pipeline's own.

    Of A-SDM only the abstract was at hand: levels and patterns are defined here. Its other half, which trains
    assembled models, is no part of it. Reduces to the plain pipeline, bit for bit, for ``every=1``.

    References:
        | DeepCache: Accelerating Diffusion Models for Free (2023), https://arxiv.org/abs/2312.00858

        | A-SDM: Accelerating Stable Diffusion through Model Assembly and Feature Inheritance Strategies
        | (2024), https://arxiv.org/abs/2406.00210

    Arguments:
        every: Steps for each one that is computed in full.
        level: What inherits: "block", "layer" or "unit" (see `levels`).
        outer: The outermost blocks or layers, which are always computed: those of a U-Net's way up, with
            what they need of its way down, or the first blocks of a transformer.
        modules: Patterns of names of modules that inherit, separated by spaces, instead of ``level`` and
            ``outer``; such as ``"mid_block up_blocks.0"`` or ``"*.attn2"``.
        order: 0 to inherit outputs as they were, 1 to extrapolate them linearly in the step from two.
        warmup: The number of full steps at the beginning.
        cooldown: The number of full steps at the end.
        power: How much denser than uniform the full steps are around ``center``; 1 for uniform ones.
        center: A part of the steps, in [0, 1].
        file: What ``diffaccel search inherit`` has written, instead of all other options.
    """

    name: ClassVar[str] = "inherit"
    exclusive: ClassVar[str] = "blocks"
    shorthand: ClassVar[str] = "file"

    every: int = option(3, low=1)
    level: str = option("layer", choices=LEVELS)
    outer: int = option(1, low=0)
    modules: str = option("")
    order: int = option(0, low=0, high=1)
    warmup: int = option(3, low=1)
    cooldown: int = option(1, low=0)
    power: float = option(1.0, low=1.0)
    center: float = option(0.3, low=0.0, high=1.0)
    file: str = option("")

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            OptionError: If one has a wrong type or value, or there are others beside a file.
        """
        super().__post_init__()
        self._given: Inheritance | None = None
        changed = [field.name for field in dataclasses.fields(self)
                   if field.name != "file" and getattr(self, field.name) != field.default]  # fmt: skip
        if self.file and changed:
            raise OptionError(f"inherit: the file {self.file!r} has the steps and modules; drop {changed[0]}")

    @classmethod
    def of(cls, pattern: Inheritance) -> Self:
        """Returns the accelerator of a pattern that is in no file."""
        made = cls()
        made._given = pattern
        return made

    def _pattern(self) -> Inheritance | None:
        """Returns the pattern that was given, or that is in the file, if there is one."""
        if self._given is None and self.file:
            self._given = Inheritance.load(Path(self.file).expanduser())
        return self._given

    def check(self, pipe: Any) -> str | None:
        """Refuses denoisers that are not known, or have nothing that could inherit."""
        try:
            self._wanted(pipe)
            if self._counts:
                probe(pipe.scheduler)
        except UnsupportedScheduler as error:
            return f"{error}; without a file, with cooldown=0 and power=1 it need not be known"
        except DiffaccelError as error:
            return str(error)
        return None

    @property
    def _counts(self) -> bool:
        """Whether the number of updates matters."""
        return self.power > 1 or self.cooldown > 0 or self._pattern() is not None

    def _wanted(self, pipe: Any) -> frozenset[str]:
        """Returns the modules that inherit at some step.

        Raises:
            UnsupportedPipeline: If there are none, or they cannot.
        """
        pattern, found = self._pattern(), set[str]()
        if pattern is not None and (reason := differs_from(pipe, pattern.facts.get("family", {}))):
            raise UnsupportedPipeline(reason)
        for name, network in denoisers_of(pipe).items():
            parts = _known_parts(name, network)
            mine = self._names_of(parts) if pattern is None else pattern.names
            if unknown := sorted(mine - set(parts.modules)):
                raise UnsupportedPipeline(f"the {name} has no module {unknown[0]!r} that can inherit")
            if hidden := sorted(mine - set(_reachable(network, parts.modules))):
                raise UnsupportedPipeline(f"{hidden[0]} of the {name} is inside of compiled code")
            found |= mine
        return frozenset(found)

    def _names_of(self, parts: Parts) -> set[str]:
        if not self.modules:
            names = set(parts.inside(self.level, self.outer))
            what = f"level={self.level!r}, outer={self.outer}"
        else:
            patterns = self.modules.split()
            names = {name for name in parts.modules if any(fnmatchcase(name, text) for text in patterns)}
            what = f"modules={self.modules!r}"
        if not names:
            known = ", ".join(list(parts.blocks)[:3])
            raise UnsupportedPipeline(f"nothing is left that could inherit with {what}; it has {known}, ...")
        return names

    def blocks(self, pipe: Any) -> list[nn.Module]:
        """Returns the modules that may inherit or be left out."""
        self._names: dict[nn.Module, str] = {}
        self._all, changes = self._wanted(pipe), set[str]()
        if self.every == 1 and self._pattern() is None:
            return []
        for name, network in denoisers_of(pipe).items():
            parts = _known_parts(name, network)
            units = parts.units if self._all & set(parts.units) else {}
            reachable = _reachable(network, {**parts.blocks, **parts.layers, **units})
            self._names |= {module: part for part, module in reachable.items()}
            changes |= set(parts.blocks) if parts.changes else set()
        self._changes = frozenset(changes)
        for auxiliary in AUXILIARY:
            if isinstance(control := getattr(pipe, auxiliary, None), nn.Module):
                reachable = _reachable(control, encoder_parts(control))
                self._names |= {module: f"{auxiliary}.{part}" for part, module in reachable.items()}
        pattern = self._pattern()
        self._order = self.order if pattern is None else pattern.order
        self._sets = [self._all] if pattern is None else [frozenset(names) for names in pattern.sets]
        return list(self._names)

    def start(self, run: Run) -> None:
        """Forgets the features of the last loop."""
        known = set(self._names.values())
        parents = {name[:place] for name in known for place, letter in enumerate(name) if letter == "."}
        self._holding = known & parents
        self._full: set[int] | None = None
        self._end: float | None = None  # the last step at which something inherits
        self._memory: dict[tuple[str, int], Features] = {}
        self._upstream: tuple[Trace, Features] | None = None
        self._now: Callable[[str, BlockCall, Proceed], Any] | None = None

    def _inherited(self, call: Evaluation) -> frozenset[str]:
        """Returns the modules that inherit at this step."""
        if (pattern := self._pattern()) is not None:
            return frozenset(pattern.inherited[call.index])
        return frozenset() if self._is_full(call.run, call.step) else self._all

    def _is_full(self, run: Run, step: int) -> bool:
        """Returns whether a step is computed in full, where no pattern says it."""
        begin = self.warmup - 1  # the last step of the warm-up is the first of the pattern
        if not self._counts:
            return step <= begin or not (step - begin) % self.every
        if self._full is None:
            total = max(run.num_updates - begin, 1)
            steps = computed_steps(total, self.every, self.power, self.center)
            self._full = {begin + step for step in steps}
        return step <= begin or step in self._full or step >= run.num_updates - self.cooldown

    def _is_over(self, call: Evaluation) -> bool:
        """Returns whether nothing inherits from this step on, so that nothing has to be kept."""
        pattern, run = self._pattern(), call.run
        if self._end is None:
            if pattern is not None:
                _check_length(pattern, run)
                self._end = max((n for n, names in enumerate(pattern.inherited) if names), default=-1)
            elif self._counts:
                steps = range(run.num_updates)
                self._end = max((step for step in steps if not self._is_full(run, step)), default=-1)
            else:
                self._end = math.inf
        return (call.step if pattern is None else call.index) > self._end

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Chooses the modules that inherit; a first evaluation, or one of other shapes, is watched."""
        if not self._names or self._is_over(call):
            return proceed(call)
        if torch.is_grad_enabled():
            raise UnsupportedPipeline("inherit cannot accelerate a call that computes gradients")
        key = (call.network, call.branch)
        if call.share != 1:  # a part of the samples: what is known is of all of them
            self._memory.pop(key, None)
            return proceed(call)
        signature, features = signature_of(call.args, call.kwargs), self._memory.get(key)
        if features is None or features.signature != signature:
            self._memory[key] = features = Features(signature, self._all, self._changes, self._order)
            return self._watched(features, call, proceed)
        self._upstream = None
        names = self._inherited(call) if features.flow is not None else frozenset()
        if names:
            call.log(self, "inherit", range(call.run.batch))
            features.thinned = call.step
        count = call.run.report.counts[call.network]
        return self._with(partial(features.block, names, count), call, proceed)

    def _with(self, now: Callable[[str, BlockCall, Proceed], Any], call: Evaluation, proceed: Proceed) -> Any:
        self._now = now
        try:
            return proceed(call)
        finally:
            self._now = None

    def _watched(self, features: Features, call: Evaluation, proceed: Proceed) -> Any:
        """Runs an evaluation in full, and learns from it what depends on what."""
        upstream, self._upstream = self._upstream, None
        auxiliary = call.network in AUXILIARY
        if upstream is None or auxiliary:
            trace = Trace()
        else:
            trace = upstream[0]
        if upstream is None and not auxiliary:
            self._keep_whole(call)
        trace.begin(call.sample, (call.args, call.kwargs))
        with trace:
            output = self._with(partial(features.watch, trace, self._holding), call, proceed)
        if auxiliary:
            trace.leave(output)
            self._upstream = trace, features
            return output
        flow = trace.finish(output)
        features.learn(flow, self._sets)
        if upstream is not None:
            upstream[1].learn(flow, self._sets)
        return output

    def _keep_whole(self, call: Evaluation) -> None:
        """Has ControlNets run in full from now on, since a denoiser beside the watched one takes from them.

        Raises:
            UnsupportedPipeline: If one has already left out at this step what the denoiser needs.
        """
        for (name, _), features in self._memory.items():
            if name in AUXILIARY:
                if features.thinned == call.step:
                    raise UnsupportedPipeline(
                        f"the {call.network} changed its shapes at step {call.step}, its {name} did not"
                    )
                features.flow = None

    def block(self, call: BlockCall, proceed: Proceed) -> Any:
        """Lets a module inherit, leaves it out, or runs it."""
        if self._now is None:
            return proceed(call)
        return self._now(self._names[call.module], call, proceed)


def _check_length(pattern: Inheritance, run: Run) -> None:
    if len(run.path) != len(pattern.inherited):
        raise UnsupportedPipeline(
            f"the pattern is for {len(pattern.inherited)} solver updates, this call has {len(run.path)}; "
            "choose num_inference_steps accordingly"
        )


def _known_parts(name: str, network: nn.Module) -> Parts:
    """Returns the modules of a denoiser that can inherit.

    Raises:
        UnsupportedPipeline: If they are not known, or out of reach.
    """
    if (parts := parts_of(network)) is None:
        inner: Any = getattr(network, "_orig_mod", network)
        raise UnsupportedPipeline(
            f"{type(inner).__name__} is no U-Net, and has no transformer blocks that are known"
        )
    if is_compiled_whole(network):
        raise UnsupportedPipeline(
            f"its {name} is compiled as a whole, and runs as such; use {name}.compile_repeated_blocks()"
        )
    return parts


def _reachable(network: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns those of a network's modules that are not inside of compiled code."""
    compiled = tuple(
        f"{name}." if name else "" for name, module in network.named_modules() if is_compiled_whole(module)
    )
    return {name: module for name, module in modules.items() if not name.startswith(compiled)}

"""What an accelerator is, the registry of all of them, and how a user's specification becomes a stack."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn

from ..errors import AcceleratorConflict, OptionError, UnknownAccelerator, closest
from ..options import check_names, check_options, option

if TYPE_CHECKING:
    from .run import BlockCall, Evaluation, Run, Update

__all__ = ["Accelerator", "Proceed", "option", "ordered", "registry", "resolve", "tag"]

Proceed = Callable[[Any], Any]

_REGISTRY: dict[str, type["Accelerator"]] = {}
_ORDER = {"guidance": 0, "skip": 1, "": 2, "solver": 2, "blocks": 3}  # outermost first


@dataclasses.dataclass
class Accelerator:
    """Base of all accelerators: wraps network evaluations, solver updates and blocks of a pipeline.

    The fields of a subclass are its options, made by `option` and checked when an object is created.  The
    user's object is a template: every pipeline call works on a copy, whose state is created in `start`.  All
    seams pass the call on by default; not calling ``proceed`` skips what it stands for.  A subclass that has
    a ``name`` is registered under it.
    """

    name: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    exclusive: ClassVar[str] = ""
    """The kind: "guidance", "skip", "solver", "blocks" or ""; one of a kind in a stack, ordered by kinds."""

    alone: ClassVar[bool] = False
    """Whether a stack that a user writes has no other beside it, since it stands for a whole one."""

    shorthand: ClassVar[str] = ""
    """The option that ``"name:value"`` sets, in the place of a preset."""

    trials: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """The options that ``diffaccel tune`` varies, with their values from careful to fast; none: not tried.

    Only accelerators of the kinds "skip" and "solver" are.
    """

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of which a stack may have no other: its own, and more where options make it so."""
        return (self.exclusive,)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Registers the subclass by its name.

        Raises:
            OptionError: If its kind is unknown.
        """
        super().__init_subclass__(**kwargs)
        if cls.exclusive not in _ORDER:
            kinds = ", ".join(map(repr, _ORDER))
            raise OptionError(f"{cls.__name__}: exclusive={cls.exclusive!r} is none of {kinds}")
        if cls.name:
            _REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            OptionError: If an option has a wrong type or value.
        """
        check_options(self, self.name)

    @classmethod
    def create(cls, preset: str = "", /, **options: Any) -> Self:
        """Creates the accelerator from a preset, or from its `shorthand`; some options are replaced.

        Raises:
            UnknownAccelerator: If the preset is unknown.
            OptionError: If an option is unknown or has a wrong value.
        """
        if preset and cls.shorthand:
            preset, options = "", {cls.shorthand: preset, **options}
        if preset and preset not in cls.presets:
            raise UnknownAccelerator(f"{cls.name} has no preset {preset!r}; {closest(preset, cls.presets)}")
        check_names(cls, options, cls.name)
        return cls(**{**cls.presets.get(preset, {}), **options})

    def check(self, pipe: Any) -> str | None:
        """Returns why the accelerator cannot serve this pipeline as it is now, or None if it can."""
        return None

    def expand(self, pipe: Any) -> list["Accelerator"]:
        """Returns what stands for the accelerator on a pipeline: itself, or a whole stack."""
        return [self]

    def step_counts(self, pipe: Any) -> Sequence[int]:
        """Returns the numbers of inference steps that it serves on a pipeline; nothing for any number."""
        return ()

    def arguments(self, pipe: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the arguments of the pipeline's call that are replaced, by name.

        Arguments:
            pipe: The pipeline.
            given: All arguments of the call by name, defaults among them.
        """
        return {}

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns a scheduler that stands in the place of the pipeline's during a call; None leaves it.

        Arguments:
            pipe: The pipeline.
            given: The arguments of the call by name, without defaults; none outside of a call.
        """
        return None

    def start(self, run: "Run") -> None:
        """Begins a sampling loop: creates all state anew (called again for every loop of a cascade)."""

    def evaluate(self, call: "Evaluation", proceed: Proceed) -> Any:
        """Wraps one evaluation of a network; returns its output as the network packs it."""
        return proceed(call)

    def update(self, call: "Update", proceed: Proceed) -> Any:
        """Wraps one update of the solver; returns the scheduler's output as it packs it."""
        return proceed(call)

    def blocks(self, pipe: Any) -> list[nn.Module]:
        """Returns the sub-modules of the denoisers whose calls go through `block`."""
        return []

    def block(self, call: "BlockCall", proceed: Proceed) -> Any:
        """Wraps one call of a sub-module that `blocks` has named."""
        return proceed(call)


def registry() -> dict[str, type[Accelerator]]:
    """Returns all known accelerators by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


def resolve(spec: Any) -> list[Accelerator]:
    """Turns what a user writes into a stack: new objects, outermost first.

    Arguments:
        spec: ``"name"``, ``"name:preset"``, ``"plan.json"``, a mapping of such names to options, an
            `Accelerator`, or a list or tuple of these.

    Raises:
        UnknownAccelerator: If a name or preset is unknown.
        OptionError: If an option, or the specification itself, is of no use.
        AcceleratorConflict: If two accelerators are of one exclusive kind, or one that stands alone is not.
    """
    stack = ordered(_expand(spec))
    if len(stack) > 1 and (alone := [accelerator.name for accelerator in stack if accelerator.alone]):
        raise AcceleratorConflict(f"{alone[0]!r} stands alone: it is a whole stack; use no other beside it")
    return stack


def ordered(stack: Sequence[Accelerator]) -> list[Accelerator]:
    """Returns a stack with the outermost accelerator first.

    Raises:
        AcceleratorConflict: If two accelerators are of one exclusive kind.
    """
    for kind in _ORDER:
        same = [accelerator.name for accelerator in stack if kind and kind in accelerator.kinds]
        if len(same) > 1:
            raise AcceleratorConflict(f"{same[0]!r} and {same[1]!r} are both of the kind {kind!r}; use one")
    return sorted(stack, key=lambda accelerator: _ORDER[accelerator.exclusive])


def tag(accelerator: Accelerator) -> str:
    """Returns a one-line tag such as ``sada(tolerance=0.01)``: the name and the changed options."""
    changed = [
        f"{field.name}={getattr(accelerator, field.name)}"
        for field in dataclasses.fields(accelerator)
        if getattr(accelerator, field.name) != field.default
    ]
    return f"{accelerator.name}({', '.join(changed)})" if changed else accelerator.name


def _expand(spec: Any) -> list[Accelerator]:
    if isinstance(spec, Accelerator):
        return [copy.copy(spec)]
    if isinstance(spec, str):
        return [_create(spec, {})]
    if isinstance(spec, Mapping):
        return [_create(name, options) for name, options in spec.items()]
    if isinstance(spec, (list, tuple)):
        return [accelerator for item in spec for accelerator in _expand(item)]
    raise OptionError(
        f"accel={spec!r} is a {type(spec).__name__}; expected a name, 'name:preset', {{name: options}}, "
        f"an Accelerator, a list of these, or None; known: {', '.join(registry())}"
    )


def _create(text: str, options: Any) -> Accelerator:
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in (text, *options)):
        raise OptionError(f"accel={{{text!r}: {options!r}}}: expected a name and a mapping of its options")
    name, _, preset = text.partition(":")
    if name not in _REGISTRY and text.endswith(".json"):  # the file of a plan
        name, preset = "auto", text
    if name not in _REGISTRY:
        raise UnknownAccelerator(f"no accelerator {name!r}; {closest(name, _REGISTRY)}")
    return _REGISTRY[name].create(preset, **options)

"""The data flow of one evaluation: which modules reach the result, if others inherit what they gave before.

A `Trace` watches an evaluation from outside of the modules that are named to it, as a graph of operations on
storages; what a named module does inside of itself is not looked at, unless it holds other named ones. The
graph (`Flow`) then tells what a result still depends on once some modules' outputs are taken from memory.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UnsupportedPipeline

__all__ = ["Flow", "Needed", "Trace", "blank_of"]

SAMPLE = 0
"""The event that stands for the network's noisy input."""


class Event(NamedTuple):
    """An operation, or the end of a named module's call, which has written some storages.

    Arguments:
        inputs: The events that it depends on.
        within: The named modules that were under way, outermost first.
        module: The named module whose call has ended; empty for an operation.
        given: The events that the module's arguments depend on.
        passed: Those of its arguments that it passes on as its output.
    """

    inputs: tuple[int, ...]
    within: tuple[str, ...] = ()
    module: str = ""
    given: tuple[int, ...] = ()
    passed: tuple[int, ...] = ()


class Needed(NamedTuple):
    """What a result depends on.

    Arguments:
        modules: The named modules that it depends on, those that inherit among them.
        sample: Whether it depends on the network's noisy input.
    """

    modules: frozenset[str]
    sample: bool


@dataclass(frozen=True)
class Blank:
    """The shape of a tensor that nobody will look at."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def blank_of(shapes: Any) -> Any:
    """Returns zeros in the structure of an output, of which `Flow.shapes` has the shapes."""
    return pytree.tree_map_only(
        Blank,
        lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device),
        shapes,
    )


class Flow:
    """The graph of one evaluation.

    Arguments:
        events: All events, in order.
        roots: Those that wrote the result.
        shapes: The outputs of the named modules, a `Blank` in the place of each tensor.
    """

    def __init__(self, events: list[Event], roots: Collection[int], shapes: dict[str, Any]) -> None:
        self.events, self.roots, self.shapes = events, tuple(roots), shapes

    def needed(self, inherited: Collection[str], changes: Collection[str] = ()) -> Needed:
        """Returns what the result depends on if some modules inherit.

        Arguments:
            inherited: The modules that give what they gave before.
            changes: Those of them that add to their input what they added before.
        """
        seen, waiting, modules = set(self.roots), list(self.roots), set[str]()
        while waiting:
            event = self.events[waiting.pop()]
            modules.update(event.within)
            inputs = event.inputs
            if event.module:
                modules.add(event.module)
                if event.module in inherited:
                    inputs = event.given if event.module in changes else event.passed
            for other in inputs:
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return Needed(frozenset(modules), SAMPLE in seen)


class Trace(TorchDispatchMode):
    """Records the data flow of evaluations while it is entered.

    Storages are told apart by where they are, so that nothing is kept alive; one whose place was another's
    before can only make more depend on more.

    """

    def __init__(self) -> None:
        super().__init__()
        self.events = [Event(())]
        self.shapes: dict[str, Any] = {}
        self._writers: dict[int, int] = {}
        self._within: tuple[str, ...] = ()
        self._roots: set[int] = set()
        self._left: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and records it."""
        kwargs = kwargs or {}
        before = _tensors((args, kwargs))
        places = {_place(leaf) for leaf in before}
        inputs = self._known(before)
        output = func(*args, **kwargs)
        written = {_place(leaf) for leaf in _tensors(output)}
        if func._schema.is_mutable:
            written |= places
        elif written <= places:  # a view
            return output
        if inputs:
            self._write(written, Event(inputs, self._within))
        else:
            for place in written:
                self._writers.pop(place, None)
        return output

    def module(self, name: str, holds: bool, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        """Runs the call of a named module and records it.

        Arguments:
            name: Its name.
            holds: Whether it holds other named modules.
            args: The positional arguments.
            kwargs: The keyword arguments.
            call: The call.

        Raises:
            UnsupportedPipeline: If the module has been called before.
        """
        if name in self.shapes:
            raise UnsupportedPipeline(f"{name} runs twice in one evaluation; it cannot inherit")
        before = _tensors((args, kwargs))
        places, given = {_place(leaf) for leaf in before}, self._known(before)
        if holds:
            self._within = (*self._within, name)
            output = call()
            self._within = self._within[:-1]
        else:
            self.__exit__(None, None, None)
            try:
                output = call()
            finally:
                self.__enter__()
        self.shapes[name] = pytree.tree_map_only(
            Tensor, lambda leaf: Blank(tuple(leaf.shape), leaf.dtype, leaf.device), output
        )
        for place in {_place(leaf) for leaf in _tensors(output)}:
            known = (self._writers[place],) if place in self._writers else ()
            passed = known if place in places else ()
            inputs = known if holds else given
            self._write([place], Event(inputs, self._within, name, given, passed))
        return output

    def leave(self, output: Any) -> None:
        """Takes the output of an evaluation that feeds the one that follows."""
        self._left = _tensors(output)

    def begin(self, sample: Any, given: Any) -> None:
        """Begins an evaluation; what the last one has left, but is not handed on as it was, is a result, too.

        Arguments:
            sample: The network's noisy input: a tensor, or a list of them.
            given: All arguments.
        """
        places = {_place(leaf) for leaf in _tensors(given)}
        self._roots |= set(self._known([leaf for leaf in self._left if _place(leaf) not in places]))
        self._left = []
        self._writers |= {_place(leaf): SAMPLE for leaf in _tensors(sample)}

    def finish(self, output: Any) -> Flow:
        """Returns the graph of everything that an output depends on."""
        return Flow(self.events, self._roots | set(self._known(_tensors(output))), self.shapes)

    def _known(self, tensors: list[Tensor]) -> tuple[int, ...]:
        places = (self._writers.get(_place(leaf)) for leaf in tensors)
        return tuple(sorted({event for event in places if event is not None}))

    def _write(self, places: Collection[int], event: Event) -> None:
        self._writers.update(dict.fromkeys(places, len(self.events)))
        self.events.append(event)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

"""Gates: what stands on a component while an accelerated call runs, and only then.

A gate is an instance attribute in the place of a method.  It keeps no state of a call; it asks a context
variable for the run that its thread is in, and passes the call on where there is none.  Several runs that
share a component share its gate.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .run import Run

__all__ = [
    "CURRENT",
    "Gate",
    "close_gate",
    "is_compiled",
    "is_compiled_whole",
    "open_gate",
    "outside",
    "seam",
]

CURRENT: ContextVar["Run | None"] = ContextVar("diffaccel_run", default=None)

_LOCK = threading.Lock()


class Gate:
    """Stands for ``owner.attribute``; looks like it to `inspect.signature`."""

    def __init__(self, owner: Any, attribute: str) -> None:
        self.owner, self.attribute, self.users = owner, attribute, 0
        self.original = getattr(owner, attribute)
        self.replaced = owner.__dict__.get(attribute)
        functools.update_wrapper(self, self.original)
        self._forms: dict[tuple[Any, ...], dict[str, Any]] = {}

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The signature of the method."""
        return inspect.signature(self.original)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call by name, as ``signature.bind`` does; quickly, as at each update.

        Raises:
            TypeError: If the method does not take them.
        """
        form = (len(args), *kwargs)
        if form not in self._forms:  # which argument goes where depends on nothing else
            places = dict(zip(kwargs, range(len(args), len(args) + len(kwargs)), strict=True))
            self._forms[form] = self.signature.bind(*range(len(args)), **places).arguments
        given = (*args, *kwargs.values())

        def pick(place: Any) -> Any:
            if isinstance(place, dict):  # what **kwargs takes
                return {name: given[inner] for name, inner in place.items()}
            return given[place] if isinstance(place, int) else tuple(given[inner] for inner in place)

        return {name: pick(place) for name, place in self._forms[form].items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hands the call to the run of this thread, if it has opened the gate."""
        run = CURRENT.get()
        if run is None or not run.owns(self):
            return self.original(*args, **kwargs)
        return run.enter(self, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """In a copy of the owner the plain method takes the gate's place.

        Where only the owner's attributes are copied, to be put back on it (panoramas), the gate stays.
        """
        if id(self.owner) not in memo:
            return self
        if self.replaced is not None:
            return copy.deepcopy(self.replaced, memo)
        return functools.partial(getattr(type(self.owner), self.attribute), memo[id(self.owner)])


def open_gate(owner: Any, attribute: str) -> Gate:
    """Puts a gate on a component, or joins the one that is there."""
    with _LOCK:
        gate = owner.__dict__.get(attribute)
        if not isinstance(gate, Gate):
            gate = owner.__dict__[attribute] = Gate(owner, attribute)
        gate.users += 1
        return gate


def close_gate(gate: Gate) -> None:
    """Leaves a gate; the last to leave removes it, unless something else has taken its place meanwhile."""
    with _LOCK:
        gate.users -= 1
        if gate.users or gate.owner.__dict__.get(gate.attribute) is not gate:
            return
        if gate.replaced is None:
            del gate.owner.__dict__[gate.attribute]
        else:
            gate.owner.__dict__[gate.attribute] = gate.replaced


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that runs outside of the run of its caller: the gates pass its calls on."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        token = CURRENT.set(None)
        try:
            return function(*args, **kwargs)
        finally:
            CURRENT.reset(token)

    return call


def seam(module: nn.Module) -> str:
    """Returns the attribute of a module that a gate replaces: always outside of compiled code."""
    return "_compiled_call_impl" if getattr(module, "_compiled_call_impl", None) is not None else "forward"


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a module or a part of it is compiled, so that new shapes would compile it again."""
    return any(map(is_compiled_whole, module.modules()))


def is_compiled_whole(module: nn.Module) -> bool:
    """Returns whether a module itself is compiled, so that gates on its parts would be inside of its code."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None

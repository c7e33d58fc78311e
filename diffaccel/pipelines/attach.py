"""How accelerators get on a pipeline and off again: ``accelerate(pipe, ...)`` and ``pipe.to(accel=...)``.

The pipeline object gets a subclass of its own class, of the same name, whose ``__call__`` opens a run.  No
class of diffusers is changed but for the one function ``to``, and between calls no component is touched.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .accelerator import Accelerator, ordered, resolve, tag
from .gates import outside
from .report import Report
from .run import Run, check_stack

__all__ = ["Accel", "accelerate", "attached", "install"]

P = TypeVar("P")
_UNSET: Any = object()


class Accel:
    """The stack in force on a pipeline and the report of its last call: ``pipe.accel``.

    Arguments:
        stack: The accelerators, outermost first.
    """

    def __init__(self, stack: list[Accelerator]) -> None:
        self.stack = tuple(stack)
        self.report: Report | None = None

    def __str__(self) -> str:
        stack = " + ".join(tag(accelerator) for accelerator in self.stack)
        return f"{stack}\n{self.report or 'no call yet'}"

    __repr__ = __str__


def accelerate(pipe: P, accel: Any) -> P:
    """Sets the stack of accelerators of a pipeline; the same as ``pipe.to(accel=...)``.

    Arguments:
        pipe: A `diffusers.DiffusionPipeline` or `diffusers.ModularPipeline`.
        accel: ``"name"``, ``"name:preset"``, ``"plan.json"``, ``{name: {option: value}}``, an `Accelerator`,
            a list of these; or None, which leaves the pipeline as it was before.

    Returns:
        The same object.

    Raises:
        UnknownAccelerator: If a name or preset is unknown.
        OptionError: If an option is unknown or out of range.
        AcceleratorConflict: If two accelerators of the stack are of one exclusive kind, or one that stands
            alone is not.
        UnsupportedPipeline: If an accelerator cannot serve this pipeline, with the reason.

    On an error the pipeline is left as it was.
    """
    if accel is None:
        if hasattr(type(pipe), "_diffaccel_base"):
            pipe.__class__ = _base(pipe)
            del pipe.__dict__["_diffaccel"]
        return pipe
    stack = _checked(pipe, accel)
    pipe.__dict__["_diffaccel"] = Accel(stack)
    pipe.__class__ = _accelerated(_base(pipe))
    return pipe


@contextlib.contextmanager
def attached(pipe: P, accel: Any) -> Iterator[P]:
    """Sets the stack of accelerators of a pipeline inside a block, which leaves it as it was before.

    Arguments:
        pipe: The pipeline.
        accel: What `accelerate` takes; None for a plain pipeline inside the block.

    Raises:
        DiffaccelError: As `accelerate` does, and then the block is not entered.
    """
    before, accel_before = pipe.__class__, pipe.__dict__.get("_diffaccel")
    accelerate(pipe, accel)
    try:
        yield pipe
    finally:
        accelerate(pipe, None)
        pipe.__class__ = before
        if accel_before is not None:
            pipe.__dict__["_diffaccel"] = accel_before


def install(cls: type) -> None:
    """Gives ``cls.to`` the keyword ``accel``, once; without it the method does what it did.

    Raises:
        ImportError: If the method has such a keyword of its own.
    """
    original: Callable[..., Any] = cls.to  # type: ignore[attr-defined]
    if hasattr(original, "_diffaccel"):
        return
    if "accel" in inspect.signature(original).parameters:
        raise ImportError(f"{cls.__name__}.to has an `accel` of its own; this diffaccel is too old for it")

    @functools.wraps(original)
    def to(self: Any, *args: Any, accel: Any = _UNSET, **kwargs: Any) -> Any:
        if accel is _UNSET:
            return original(self, *args, **kwargs)
        if accel is not None:
            check_stack(self, accel := resolve(accel))
        pipe = original(self, *args, **kwargs) if args or kwargs else self
        return accelerate(pipe, accel)

    to._diffaccel = True  # type: ignore[attr-defined]
    cls.to = to  # type: ignore[attr-defined]


def _checked(pipe: Any, accel: Any) -> list[Accelerator]:
    stack = ordered([part for accelerator in resolve(accel) for part in accelerator.expand(pipe)])
    check_stack(pipe, stack)
    return stack


def _base(pipe: Any) -> type:
    return getattr(type(pipe), "_diffaccel_base", type(pipe))


def _restore(base: type) -> Any:
    """Returns an empty accelerated pipeline; what copy and pickle call."""
    return object.__new__(_accelerated(base))


def _outside(name: str, value: Any) -> Any:
    """Returns a callback such that what it calls is no part of the run; anything else as it is.

    The callback objects of diffusers, which are told by their ``tensor_inputs``, keep their type.
    """
    if name.startswith("callback") and callable(value) and not hasattr(value, "tensor_inputs"):
        return outside(value)
    return value


def _replaced(pipe: Any, accel: Accel, bound: inspect.BoundArguments) -> dict[str, Any]:
    """Returns the arguments of a call that the accelerators replace."""
    given = {name: parameter.default for name, parameter in bound.signature.parameters.items()
             if parameter.default is not parameter.empty}  # fmt: skip
    given.update(bound.arguments)
    changed: dict[str, Any] = {}
    for accelerator in accel.stack:
        changed.update(accelerator.arguments(pipe, {**given, **changed}))
    return changed


@functools.cache
def _accelerated(base: type) -> type:
    call = base.__call__

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            bound = inspect.signature(call).bind(self, *args, **kwargs)
        except TypeError:
            return call(self, *args, **kwargs)  # raises the pipeline's own error
        accel: Accel = self._diffaccel
        if changed := _replaced(self, accel, bound):
            bound.arguments.update(changed)
            args, kwargs = bound.args[1:], bound.kwargs
        with Run(self, accel.stack, dict(bound.arguments)) as run:
            accel.report = run.report
            return call(self, *args, **{name: _outside(name, value) for name, value in kwargs.items()})

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _restore, (base,), dict(self.__dict__)

    def accel(self: Any) -> Accel:
        """The stack in force and the report of the last call."""
        return self._diffaccel

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "accel": property(accel),
        "_diffaccel_base": base,
    }
    return type(base)(base.__name__, (base,), namespace)

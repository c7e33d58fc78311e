"""Schedulers that begin late: the tail of a schedule, as one that pipelines take from noise to images."""

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, UnsupportedScheduler
from ..noise import Path, path_of
from .gates import Gate

__all__ = ["begin_from", "late_start", "num_steps", "prepared"]

_BEGIN = "_diffaccel_begin"
_READY = "_diffaccel_ready"


def prepared(scheduler: Any) -> Any:
    """Returns a copy of a scheduler as it stands, between ``set_timesteps`` and its first step."""
    twin = object.__new__(type(scheduler))
    state = {name: value for name, value in scheduler.__dict__.items() if not isinstance(value, Gate)}
    twin.__dict__.update(copy.deepcopy(state))
    return twin


def num_steps(scheduler: Any) -> int:
    """Returns the number of steps of a prepared scheduler, each of one evaluation or two."""
    if hasattr(scheduler, "prk_timesteps"):  # PNDM, which makes its first step twice
        return len(set(scheduler.timesteps.tolist()))
    order = int(getattr(scheduler, "order", 1))
    return (len(scheduler.timesteps) + order - 1) // order


def late_start(scheduler: Any, steps: int) -> Any:
    """Returns a scheduler with the last steps of a schedule, whatever ``set_timesteps`` is given.

    A pipeline that is given the latents of the schedule's first level goes on from there, instead of from
    noise; its ``init_noise_sigma`` is 1, so that they are taken as they are.  The levels do not depend on the
    size of the image, as dynamically shifted ones would.

    Arguments:
        scheduler: A scheduler that `prepared` has made; it is left as it is.
        steps: The number of steps, at least 1.

    Raises:
        OptionError: If the schedule has fewer steps.
        UnsupportedScheduler: If the schedule cannot begin at this place, or at all but its beginning.
    """
    name, number = type(scheduler).__name__, num_steps(scheduler)
    if not 0 < steps <= number:
        raise OptionError(f"{steps} of the last steps of a schedule that has {number}")
    if len(getattr(scheduler, "prk_timesteps", ())):
        raise UnsupportedScheduler(f"{name} begins with Runge-Kutta steps; set its skip_prk_steps")
    late = prepared(scheduler)
    if steps < number:
        _cut(late, steps)
    tail = path_of(late)
    if num_steps(late) != steps or len(tail) != len(late.timesteps) or not _is_tail(tail, path_of(scheduler)):
        raise UnsupportedScheduler(
            f"the schedule of this {name} cannot begin late; use DDIM, Euler, DPM-Solver++ or FlowMatchEuler"
        )
    if hasattr(late, "set_begin_index"):
        late.set_begin_index(0)
    late.__dict__[_READY] = dict(prepared(late).__dict__)
    base: Any = type(late)
    late.__class__ = _late(base)
    return late


def begin_from(late: Any, latents: Tensor) -> None:
    """Puts latents in the place of the first sample that is scaled, for pipelines that take none.

    Arguments:
        late: A scheduler that `late_start` has made.
        latents: The latents, with shape (B, *), repeated for guidance that is stacked in the sample itself.
    """
    late.__dict__[_BEGIN] = late.__dict__[_READY][_BEGIN] = latents


def _cut(scheduler: Any, steps: int) -> None:
    """Leaves the last steps of a schedule; what is kept along it is cut with it."""
    times = scheduler.timesteps
    if hasattr(scheduler, "prk_timesteps"):
        tail = times[-steps:]
        scheduler.timesteps = torch.cat([tail[:2], tail[1:2], tail[2:]]) if steps > 1 else tail
        return
    if hasattr(scheduler, "levels"):  # our own
        scheduler.set_timesteps(timesteps=times[-steps:].tolist(), device=times.device)
        return
    order = int(getattr(scheduler, "order", 1))
    left_out = len(times) - (order * steps - order + 1)
    for name in ("timesteps", "sigmas", "sigmas_interpol", "order_list"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name)[left_out:])


def _is_tail(tail: Path, whole: Path) -> bool:
    """Returns whether a path has the last levels of another one; a level may occur twice (PNDM)."""
    some, all_ = (
        list(dict.fromkeys((level.alpha, level.sigma) for level in path.levels)) for path in (tail, whole)
    )
    pairs = list(zip(some[::-1], all_[::-1], strict=False))
    return len(some) <= len(all_) and all(math.dist(*pair) <= 1e-5 * math.hypot(*pair[0]) for pair in pairs)


@functools.cache
def _late(base: Any) -> Any:
    """Returns the class of schedulers that begin late: one of the same name, which keeps its schedule."""

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(copy.deepcopy(self.__dict__[_READY]))

    def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        begin = self.__dict__.pop(_BEGIN, None)
        if begin is not None:
            sample = begin.repeat(len(sample) // len(begin), *[1] * (begin.ndim - 1))
        return base.scale_model_input(self, sample, *args, **kwargs)

    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "init_noise_sigma": 1.0,
        "set_timesteps": set_timesteps,
    }
    if hasattr(base, "scale_model_input"):
        namespace["scale_model_input"] = functools.update_wrapper(scale_model_input, base.scale_model_input)
    return type(base)(base.__name__, (base,), namespace)

"""Options: dataclass fields of one type, within bounds or out of some choices, checked in one place."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from .errors import OptionError, closest

__all__ = ["check_names", "check_options", "option"]


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Returns a dataclass field: an option of the default's type, within bounds or out of some choices.

    Arguments:
        default: The default value; its type (bool, int, float, str) is the type of the option.
        low: The least allowed value.
        high: The largest allowed value.
        choices: All allowed values.
    """
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


def check_names(cls: type, names: Iterable[Any], owner: str) -> None:
    """Checks that a dataclass has fields of these names.

    Raises:
        OptionError: If it has not, with the names that it has.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            raise OptionError(f"{owner} has no option {name!r}; {closest(str(name), known)}")


def check_options(options: Any, owner: str) -> None:
    """Checks the fields that `option` has made, and turns whole floats into integers where they are such.

    Raises:
        OptionError: If a value has a wrong type, or is not allowed.
    """
    for field in dataclasses.fields(options):
        if "choices" in field.metadata:
            _check_option(owner, field, getattr(options, field.name))
            if isinstance(field.default, (int, float)):
                object.__setattr__(options, field.name, type(field.default)(getattr(options, field.name)))


def _check_option(name: str, field: dataclasses.Field[Any], value: Any) -> None:
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    expected = type(field.default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = isinstance(value, int) or (number and float(value).is_integer())  # False for NaN and infinity
    fits = number if expected is float else number and whole if expected is int else False
    if not (fits or type(value) is expected):
        raise OptionError(f"{name}: {field.name}={value!r} is not of type {expected.__name__}")
    if choices is not None and value not in choices:
        raise OptionError(f"{name}: {field.name}={value!r} is none of {', '.join(map(repr, choices))}")
    above, below = low is None or value >= low, high is None or value <= high  # both False for NaN
    if not (above and below):
        bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
        raise OptionError(f"{name}: {field.name}={value!r} is outside {bounds}")

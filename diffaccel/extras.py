"""Packages that come with extras."""

import importlib
from typing import Any

from .errors import OptionError

__all__ = ["extra_package"]


def extra_package(name: str, extra: str, need: str) -> Any:
    """Returns a package.

    Arguments:
        name: The package.
        extra: The extra of ours that installs it.
        need: What needs it, with its verb, such as "adapters need".

    Raises:
        OptionError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise OptionError(f"{need} the package {name}: pip install diffaccel[{extra}]") from None

"""Which of a network's low-rank adapters is in force; extra ``distill``."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import OptionError, closest
from ..extras import extra_package

__all__ = ["adapters_of", "check_adapter", "insert_adapter", "peft_library", "switch", "tuners_of", "using"]


def peft_library() -> Any:
    """Returns the library.

    Raises:
        OptionError: If it is not installed.
    """
    return extra_package("peft", "distill", "adapters need")


def insert_adapter(network: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
    """Gives a network an adapter with random weights.

    Arguments:
        network: The network, which may have other adapters.
        name: The name of the adapter.
        settings: The arguments of peft's ``LoraConfig``.

    Raises:
        OptionError: If peft is not installed, or the name is taken.
    """
    peft = peft_library()
    if name in adapters_of(network):
        raise OptionError(f"the network has an adapter {name!r} already")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), network, name)


def tuners_of(network: nn.Module) -> list[Any]:
    """Returns the layers of a network that adapters change."""
    tuner = peft_library().tuners.tuners_utils.BaseTunerLayer
    return [module for module in network.modules() if isinstance(module, tuner)]


def adapters_of(network: nn.Module) -> list[str]:
    """Returns the names of a network's adapters."""
    return list(getattr(network, "peft_config", {}))


@contextmanager
def using(network: nn.Module, name: str | None) -> Iterator[None]:
    """Puts one adapter in force inside the block, or none: then the network is the teacher.

    What requires a gradient stays as it is, which peft's own switches change. With gradient checkpointing
    the block has to contain the backward pass, which evaluates layers again.

    Arguments:
        network: The network.
        name: The adapter, or None for the network alone.

    Raises:
        OptionError: If there is no such adapter.
    """
    if name is None and not adapters_of(network):
        yield
        return
    if name is not None:
        check_adapter(network, name)
    tuners = tuners_of(network)
    before = [(tuner._active_adapter, tuner._disable_adapters) for tuner in tuners]
    try:
        switch(tuners, None if name is None else [name], name is None)
        yield
    finally:
        for tuner, (active, disabled) in zip(tuners, before, strict=True):
            tuner._active_adapter, tuner._disable_adapters = active, disabled


def switch(tuners: Sequence[Any], active: list[str] | None, disabled: bool) -> None:
    """Puts adapters in force in some layers, those that are if None; gradients are left as they are."""
    for tuner in tuners:  # the methods for this also switch gradients on and off
        if active is not None:
            tuner._active_adapter = active
        tuner._disable_adapters = disabled


def check_adapter(network: nn.Module, name: str) -> None:
    """Raises an `OptionError` if a network has no such adapter."""
    if name not in adapters_of(network):
        raise OptionError(f"no adapter {name!r}; {closest(name, adapters_of(network))}")

"""Low-rank adapters on one frozen network, as a student and a fake score on their teacher; extra ``distill``.

References:
    | LoRA: Low-Rank Adaptation of Large Language Models (2021), arXiv 2106.09685
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import OptionError, closest
from ..pipelines.switching import adapters_of, check_adapter, peft_library, switch, tuners_of, using

__all__ = [
    "ATTENTION",
    "adapters_of",
    "add_lora",
    "copy_lora",
    "lora_parameters",
    "merged",
    "peft_library",
    "reset_lora",
    "saved_adapter",
    "using",
]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of attention in diffusers' networks."""

_ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Conv3d)


def add_lora(network: nn.Module, name: str, rank: int, alpha: float | None = None,
             targets: Sequence[str] = ATTENTION, seed: int = 0) -> None:  # fmt: skip
    """Adds an adapter, W + alpha / rank B A with B = 0, to a network whose own weights it freezes.

    The new adapter is the one in force afterwards; the others are left as they are.

    Arguments:
        network: A network, which may have other adapters.
        name: The name of the adapter.
        rank: The rank, at least 1.
        alpha: The scale; None for the rank.
        targets: The ends of the names of the layers to adapt, linear ones or convolutions.
        seed: Decides A; the global generator is left as it is.

    Raises:
        OptionError: If the name is taken, or an option is out of range, or an end matches no layer.
    """
    peft = peft_library()
    if name in adapters_of(network) or not name or "." in name:
        raise OptionError(f"no adapter can be named {name!r}; taken: {', '.join(adapters_of(network))}")
    if rank < 1 or (alpha is not None and alpha <= 0):
        raise OptionError(f"rank is {rank} and alpha {alpha}; expected at least 1, and more than 0")
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=_matched(network, targets)
    )
    others = [lora_parameters(network, other) for other in adapters_of(network)]
    trained = {key for other in others for key, parameter in other.items() if parameter.requires_grad}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter
        torch.manual_seed(seed)
        if hasattr(network, "add_adapter"):
            cast(Any, network).add_adapter(config, name)
        else:  # DiT has no mixin for it
            peft.inject_adapter_in_model(config, network, name)
            switch(tuners_of(network), [name], False)
    trained |= set(lora_parameters(network, name))
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(key in trained)


def copy_lora(network: nn.Module, source: str, name: str) -> None:
    """Adds an adapter that is a copy of another one.

    Arguments:
        network: The network.
        source: The adapter to copy.
        name: The name of the copy.

    Raises:
        OptionError: If there is no such adapter, or the name is taken.
    """
    check_adapter(network, source)
    config = cast(Any, network).peft_config[source]
    add_lora(network, name, config.r, config.lora_alpha, sorted(config.target_modules))
    copies = lora_parameters(network, name)
    with torch.no_grad():
        for key, parameter in lora_parameters(network, source).items():
            copies[re.sub(rf"(\.lora_\w+\.){re.escape(source)}", rf"\g<1>{name}", key)].copy_(parameter)


@torch.no_grad()
def reset_lora(network: nn.Module, name: str, seed: int = 0) -> None:
    """Sets an adapter to what a new one is: the network is what it is without it.

    Arguments:
        network: The network.
        name: The adapter.
        seed: Decides A; the global generator is left as it is.

    Raises:
        OptionError: If there is no such adapter.
    """
    check_adapter(network, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tuner in tuners_of(network):
            if name in tuner.lora_A:
                drawn = torch.empty_like(tuner.lora_A[name].weight, device="cpu")
                tuner.lora_A[name].weight.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5))
                tuner.lora_B[name].weight.zero_()


def _matched(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Returns the names of the layers that the targets mean, each of which must mean one."""
    known = [name.removesuffix(".base_layer") for name, module in network.named_modules()
             if isinstance(module, _ADAPTABLE) and ".lora_" not in name]  # fmt: skip
    found: dict[str, None] = {}
    for target in targets:
        matched = [name for name in known if name == target or name.endswith(f".{target}")]
        if not matched:
            ends = {".".join(_tail(name)) for name in known}
            raise OptionError(f"{target!r} matches no layer of {type(network).__name__}; "
                              f"{closest(target, ends)}")  # fmt: skip
        found |= dict.fromkeys(matched)
    return list(found)


def _tail(name: str) -> list[str]:
    """Returns the end of a name from its last word on, as in "attn1.to_out.0"."""
    parts = name.split(".")
    last = max((place for place, part in enumerate(parts) if not part.isdigit()), default=0)
    return parts[last:]


def lora_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Returns the parameters of an adapter by their names in the network.

    Raises:
        OptionError: If there is no such adapter.
    """
    check_adapter(network, name)
    own = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
    return {key: parameter for key, parameter in network.named_parameters() if own.search(key)}


@torch.no_grad()
def merged(network: nn.Module, name: str | None) -> dict[str, Tensor]:
    """Returns the weights of a network as if it had no adapters, one of them merged or none.

    Arguments:
        network: The network, which may have no adapters.
        name: The adapter to merge, or None.

    Raises:
        OptionError: If there is no such adapter.
    """
    state = {key.replace(".base_layer.", "."): value for key, value in network.state_dict().items()
             if ".lora_" not in key}  # fmt: skip
    if name is None:
        return state
    check_adapter(network, name)
    for key, layer in network.named_modules():
        if name in getattr(layer, "lora_A", {}):
            weight, tuner = state[f"{key}.weight"], cast(Any, layer)
            state[f"{key}.weight"] = (weight.float() + tuner.get_delta_weight(name).float()).to(weight.dtype)
    return state


def saved_adapter(network: Any, name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights of an adapter as peft saves them, and its settings, both for a file.

    Arguments:
        network: The network.
        name: The adapter.
        dtype: The type of the weights.

    Raises:
        OptionError: If there is no such adapter.
    """
    check_adapter(network, name)
    state = peft_library().get_peft_model_state_dict(network, adapter_name=name)
    settings = network.peft_config[name].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    return {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}, plain

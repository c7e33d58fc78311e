"""A student of several experts as one network, which a pipeline, a trial and an export take as any other."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..pipelines import ConditionExperts, NoiseExperts
from ..pipelines.routed import BUILT, Member, Routed
from ..pipelines.switching import insert_adapter
from .adapters import lora_parameters, merged
from .fixed_guidance import fix_guidance
from .grid import Grid
from .method import Expert
from .students import student_like
from .units import Units

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["averaged", "check_grids", "joined", "settled", "timestep_of"]

_ROUNDING = 1 / 256
"""The largest relative error of a time that is passed on in bfloat16."""


def timestep_of(units: Units, time: float) -> float:
    """Returns what a network is given as time at a time of the straight path, in [0, 1]."""
    t = torch.tensor([time], dtype=torch.float64)
    return float(units.level(1 - t, t).timestep)


def joined(experts: Sequence[Expert], units: Units, router: Mapping[str, Any] | None = None) -> nn.Module:
    """Returns the network that experts are together; it shares their weights.

    It is the network itself where there is one, without an adapter.

    Arguments:
        experts: The experts, those for the highest times first.
        units: In which units the networks count noise.
        router: The settings of the `ConditionExperts` that they are, if conditions decide.

    Raises:
        OptionError: If the boundaries do not fall to 0, or noise and conditions decide.
    """
    members = [_member(expert) for expert in experts]
    if router is not None:
        if any(expert.boundary for expert in experts):
            raise OptionError("experts are chosen by noise or by condition, not by both")
        return ConditionExperts.of(members, **router)
    bounds = [expert.boundary for expert in experts]
    falling = all(a > b for a, b in itertools.pairwise(bounds))
    if not bounds or not falling or bounds[-1] != 0 or bounds[0] >= 1:
        raise OptionError(
            f"experts with the boundaries {bounds}; expected falling ones in [0, 1), the last 0"
        )
    if len(members) == 1 and members[0][1] is None:
        return members[0][0]
    rising = timestep_of(units, 0.9) > timestep_of(units, 0.1)
    limits = [timestep_of(units, bound) for bound in bounds[:-1]]
    return NoiseExperts.of(members, boundaries=limits, rising=rising)


def _member(expert: Expert) -> Member:
    network = expert.denoiser.network
    return getattr(network, "module", network), expert.denoiser.adapter  # what processes wrap around it


def check_grids(experts: Sequence[Expert], units: Units, grids: Sequence[Grid]) -> None:
    """Checks that rounding cannot decide which expert makes a step, and that each makes one.

    Arguments:
        experts: The experts by noise level, joined as one network or not.
        units: In which units the networks count noise.
        grids: The grids at which the student is sampled.

    Raises:
        OptionError: With the time and the boundary, if it can; or with the expert, if it makes no step.
    """
    if len(experts) == 1 or any(expert.conditions is not None for expert in experts):
        return
    network: Any = joined(experts, units)
    used = set()
    for time in (time for grid in grids for time in grid.times):
        wanted = next(place for place, expert in enumerate(experts) if time >= expert.boundary)
        near = [timestep_of(units, min(1.0, time * factor)) for factor in (1 - _ROUNDING, 1, 1 + _ROUNDING)]
        if network.route((), {"timestep": torch.tensor(near)}) != [wanted] * 3:
            nearest = min((expert.boundary for expert in experts), key=lambda bound: abs(bound - time))
            raise OptionError(
                f"the time {time:g} of a grid is so near to the boundary {nearest:g} of two experts that "
                "rounding decides between them; expected a boundary between the times of the grid"
            )
        used.add(wanted)
    for place, expert in enumerate(experts):
        if place not in used:
            times = [[round(time, 6) for time in grid.times] for grid in grids]
            raise OptionError(
                f"expert {place + 1} of {len(experts)}, from the time {expert.boundary:g} on, makes no step "
                f"of the grids {times}; is that the grid that was trained?"
            )


@contextmanager
def averaged(trainer: "Trainer", units: Units) -> Iterator[nn.Module]:
    """Yields a run's student as one network: trained experts with their averages, frozen ones as they are."""
    experts = trainer.method.experts()
    with ExitStack() as stack:
        for role in trainer.roles.values():
            if any(expert.denoiser is role.denoiser for expert in experts):
                stack.enter_context(role.averaged())
        yield joined(experts, units, trainer.method.router)


@torch.no_grad()
def settled(network: nn.Module, adapter: str | None, guidance: float | None = None,
            apart: bool = False) -> nn.Module:  # fmt: skip
    """Returns a frozen copy of a student as it leaves: what it needs, and no guidance to give if possible.

    An adapter is merged; those of experts stay adapters if they share one base.

    Arguments:
        network: The network, of experts or not.
        adapter: The adapter to merge, or None.
        guidance: The guidance scale that it was trained with, see `fix_guidance`.
        apart: Whether each expert is to have a network of its own, though they are adapters of one.
    """
    if not isinstance(network, Routed):
        return _plain(network, merged(network, adapter), guidance)
    rest = {key: network.config[key] for key in _settings(network)}
    if network.config["adapters"] and (apart or len(network.networks) > 1):
        pairs = [(network.networks[place], name) for place, name in network.members]
        alone = [_plain(part, merged(part, name or None), guidance) for part, name in pairs]
        return type(network).of([(part, None) for part in alone], **rest)
    plain, state = [], merged(network, adapter)
    for place, part in enumerate(network.networks):
        start = f"networks.{place}."
        own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        plain.append(_plain(part, own, guidance))
    whole = network.state_dict()
    for entry in network.config["adapters"]:
        part, name = plain[entry["network"]], entry["name"]
        _inject(part, name, entry["settings"], f"networks.{entry['network']}.", whole)
    return type(network).of([(plain[place], name) for place, name in network.members], **rest)


def _settings(network: Routed) -> list[str]:
    return [key for key in network._internal_dict if not key.startswith("_") and key not in BUILT]


def _plain(network: nn.Module, state: dict[str, Tensor], guidance: float | None) -> nn.Module:
    plain: nn.Module = student_like(network)
    plain.load_state_dict(state)
    like = next(network.parameters())
    plain = nn.Module.to(plain, like.device, like.dtype).eval().requires_grad_(False)
    return fix_guidance(plain, guidance)


def _inject(network: nn.Module, name: str, settings: dict[str, Any], start: str,
            whole: dict[str, Tensor]) -> None:  # fmt: skip
    """Gives a network the adapter that another one has."""
    like = next(network.parameters())
    insert_adapter(network, name, settings)
    nn.Module.to(network, like.device, like.dtype).eval().requires_grad_(False)
    for key, value in lora_parameters(network, name).items():
        value.copy_(whole[start + key])

"""Experts by noise level: one module that calls, at each time, the network that was trained for it.

References:
    | Phased DMD (2025), arXiv 2510.27684
    | eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers (2022), arXiv 2211.01324
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from ..errors import OptionError, UnsupportedPipeline
from .routed import Routed

__all__ = ["NoiseExperts"]


class NoiseExperts(Routed):
    """K networks of a class, or K adapters of one, each for a range of noise levels; see `Routed.of`.

    The timestep is the one that the network itself is given, in its own units. On a CPU the choice costs
    nothing; elsewhere it is one number read from the device for an evaluation, as in the pipeline of Wan 2.2.

    Arguments:
        networks: The classes and configurations of the networks.
        adapters: The networks' LoRA adapters.
        members: For each expert, that for the highest noise first, the network's place and its adapter.
        boundaries: For each expert but the last, the timestep down to which it is called, itself included.
        rising: Whether timesteps rise with noise.

    Raises:
        OptionError: If the boundaries do not fall with the noise.
    """

    @register_to_config
    def __init__(
        self, networks: Sequence[Mapping[str, Any]] = (), adapters: Sequence[Mapping[str, Any]] = (),
        members: Sequence[Sequence[Any]] = (), boundaries: Sequence[float] = (), rising: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.signs = 1 if rising else -1
        self.limits = [self.signs * float(boundary) for boundary in boundaries]
        if any(a <= b for a, b in itertools.pairwise(self.limits)):
            raise OptionError(f"boundaries {list(boundaries)}; expected ever less noise, and no two alike")
        self._build(networks, adapters, members)
        if members:
            self._check()

    def _check(self) -> None:
        if len(self.members) != len(self.limits) + 1:
            raise OptionError(
                f"{len(self.members)} experts and {len(self.limits)} boundaries; expected one less"
            )

    @property
    def pair(self) -> tuple[Any, Any, float] | None:
        """The two networks and their boundary, or None if they are not two, or adapters, or time falls."""
        if len(self.networks) != 2 or len(self.members) != 2 or self.signs < 0 or self.config["adapters"]:
            return None
        first, second = (self.networks[place] for place, _ in self.members)
        return first, second, self.limits[0]

    def summary(self) -> str:
        """Returns in words who does what."""
        limits = ", ".join(f"{self.signs * limit:g}" for limit in self.limits)
        what = "adapters of one network" if len(self.networks) == 1 else "networks"
        return f"{len(self.members)} {what}, by noise level; the timesteps from which on: {limits}, and all"

    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
        """Returns the place of the expert for each row, or one for all.

        Raises:
            UnsupportedPipeline: If the timestep is not one number for each row.
        """
        timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        if timestep.ndim > 1:
            raise UnsupportedPipeline(
                f"timesteps of shape {tuple(timestep.shape)}; experts by noise level need one for each row"
            )
        levels = self.signs * timestep.reshape(-1).to(torch.float32 if timestep.is_mps else torch.float64)
        if not self.limits:
            return [0]
        place: list[int] = sum((levels < limit).long() for limit in self.limits).tolist()  # type: ignore[union-attr]
        return place

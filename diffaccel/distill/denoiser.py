"""A network of a pipeline as x0, eps and velocity at any time, on one path for all models.

The path is the straight one,

    x_t = (1 - t) x0 + t eps,    velocity = eps - x0,    t in [0, 1], noise at 1,

whatever the network was trained on and whatever it predicts: `units` tells where it has the same level.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedPipeline
from ..noise import wide
from .adapters import lora_parameters, using
from .host import Host, Inputs
from .units import Units

__all__ = ["Denoiser", "Prediction", "guided_velocity"]


class Prediction(NamedTuple):
    """What a network says of a sample.

    Attributes:
        x0: The predicted clean sample, with shape (B, *).
        eps: The predicted noise of unit variance, with shape (B, *).
    """

    x0: Tensor
    eps: Tensor

    @property
    def velocity(self) -> Tensor:
        """The velocity dx/dt = eps - x0 on the straight path."""
        return self.eps - self.x0


class Denoiser(nn.Module):
    """Creates a denoiser of a network.

    Arguments:
        network: The network: the pipeline's own, or one that is called in the same way.
        units: In which units it counts noise.
        adapter: The LoRA adapter in force during a call, "" for none of them; None leaves that as it is.
    """

    def __init__(self, network: nn.Module, units: Units, adapter: str | None = None) -> None:
        super().__init__()
        self.network, self.units, self.adapter = network, units, adapter

    @classmethod
    def of(cls, host: Host) -> "Denoiser":
        """Returns the denoiser of a pipeline's own network."""
        return cls(host.network, host.units)

    def forward(self, x_t: Tensor, t: Tensor, inputs: Inputs) -> Prediction:
        """Returns the prediction for samples of the straight path.

        Arguments:
            x_t: The samples (B, *).
            t: Their times (B), in (0, 1].
            inputs: What else the network is given, for B rows.
        """
        time = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        return self.at(x_t, 1 - time, time, inputs)

    def at(self, sample: Tensor, alpha: Tensor, sigma: Tensor, inputs: Inputs) -> Prediction:
        """Returns the prediction for samples alpha x0 + sigma eps of any path, in float32 or wider.

        Above the noisiest level that the network knows it is asked for that level, and eps is what, with its
        x0, makes the sample: DDIM's first step from pure noise.  Below its cleanest level, that level stands.

        Arguments:
            sample: The samples (B, *).
            alpha: Their signal scales (B).
            sigma: Their noise scales (B), not 0.
            inputs: What else the network is given, for B rows.
        """
        sample = wide(sample)
        level = self.units.level(alpha, sigma)

        def broad(values: Tensor) -> Tensor:
            return values.to(sample.dtype).view(-1, *[1] * (sample.ndim - 1))

        norm = torch.hypot(level.alpha, level.sigma) / torch.hypot(alpha, sigma)
        own = broad(norm) * sample
        output = self._output(own * broad(level.scale), level.timestep, inputs)
        jacobian = level.alpha * level.q - level.sigma * level.p
        x0 = broad(level.q / jacobian) * own - broad(level.sigma / jacobian) * output
        eps = broad(level.alpha / jacobian) * output - broad(level.p / jacobian) * own
        rest = (sample - broad(alpha) * x0) / broad(sigma).clamp_min(1e-3)  # used at high noise only
        return Prediction(x0, torch.where(broad(level.beyond) > 0, rest, eps))

    def active(self) -> AbstractContextManager[None]:
        """Returns a context in which the denoiser's adapter is in force; a backward pass may need it too."""
        if self.adapter is None:
            return nullcontext()
        return using(getattr(self.network, "module", self.network), self.adapter or None)

    def state(self) -> dict[str, Tensor]:
        """Returns the weights that are its own, by name: all of the network, or those of its adapter."""
        network = getattr(self.network, "module", self.network)
        return dict(lora_parameters(network, self.adapter) if self.adapter else network.state_dict())

    def _output(self, sample: Tensor, timestep: Tensor, inputs: Inputs) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        with self.active():
            packed = inputs.call(self.network, sample.to(dtype), timestep.to(torch.float32))
        output = packed if isinstance(packed, Tensor) else packed[0]
        return wide(_without_variance(output, sample))


def guided_velocity(
    denoiser: Denoiser, cond: Inputs, uncond: Inputs | None, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the velocity field u + scale (c - u) with its conditions bound: (x_t, t) -> (B, *).

    Arguments:
        denoiser: The denoiser.
        cond: What it is given for the conditions.
        uncond: What it is given for none; None if the scale is 1.
        scale: The guidance scale; 1 is off.
    """

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        c = denoiser(x_t, t, cond).velocity
        if uncond is None or scale == 1:
            return c
        u = denoiser(x_t, t, uncond).velocity
        return u + scale * (c - u)

    return velocity


def _without_variance(output: Any, sample: Tensor) -> Tensor:
    """Returns the prediction of a network that predicts a variance too, in a second half of its channels."""
    if output.shape == sample.shape:
        return output
    if output.ndim > 1 and output.shape[1] == 2 * sample.shape[1] and output.shape[2:] == sample.shape[2:]:
        return output.chunk(2, dim=1)[0]
    raise UnsupportedPipeline(f"the network makes {tuple(output.shape)} of {tuple(sample.shape)}")

"""The scheduler of reflowed students: each step goes back to the noise that the run has started from.

References:
    Improving the Training of Rectified Flows (2024), arXiv 2405.20320 (the new update rule)
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..errors import OptionError, UnsupportedScheduler
from ..noise import wide
from .paths import flow_settings

__all__ = ["AnchoredFlowScheduler"]

_PURE = 1 - 1e-6
"""The least sigma of a sample that is nothing but noise."""


class AnchoredFlowScheduler(SchedulerMixin, ConfigMixin):
    r"""Steps of a rectified flow that keep its initial noise z, for models that were trained on pairs.

    A step from t to s takes x0_hat = x_t - t velocity and goes to

        x_s = (1 - s) x0_hat + s z,

    in float32 or wider. Of a perfect reflow this is Euler's method, as it is with one step or two. Of a real
    one, it does not carry along the error of the noise that x_t and the velocity imply. Without reflow it can
    be worse than Euler's method: see ``benchmarks/flow_toys.py``.

    z is the sample of the first step, if its sigma is 1. A run that begins in mid-schedule (image-to-image),
    or with sigmas below 1, has no such sample: it makes Euler's steps, x_s = x_t + (s - t) velocity.
    `is_anchored` tells which.

    The grid of N steps is 1, (N - 1) / N, .., 1 / N, and timesteps are t times ``num_train_timesteps``.
    Sigmas that a pipeline brings are taken as they are: nothing is shifted, and the settings of shifts of
    another scheduler are not taken over.

    Arguments:
        num_train_timesteps: The timestep of t = 1.
    """

    order = 1
    _compatibles: list[str] = []
    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._levels: list[float] = []
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._noise: Tensor | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes the scheduler from another one's configuration, of which it takes ``num_train_timesteps``.

        Raises:
            UnsupportedScheduler: If that is for another path, or for networks that do not predict velocities.
        """
        if isinstance(config, Mapping):
            flow_settings(config)  # raises for other paths
            usual = "epsilon" if "beta_schedule" in config else "flow_prediction"
            if config.get("prediction_type", usual) != "flow_prediction":
                maker = config.get("_class_name", "this scheduler")
                raise UnsupportedScheduler(
                    f"the settings of {maker} are for networks that do not predict the velocity of a flow"
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step, where a pipeline begins in mid-schedule."""
        return self._begin_index

    @property
    def is_anchored(self) -> bool:
        """Whether the run has begun from noise alone; False before its first step."""
        return self._noise is not None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the first step, for image-to-image."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Chooses the times of the next run.

        Arguments:
            num_inference_steps: The number N of steps.
            device: Where the timesteps are to be.
            timesteps: The times of the steps times ``num_train_timesteps``, falling.
            sigmas: The times of the steps, falling from at most 1 to above 0; a last 0 may be given.
            mu: What pipelines of flow matching pass for a shift; there is none.

        Raises:
            OptionError: If nothing or too much is given, or times do not fall from at most 1 to above 0.
        """
        if timesteps is not None and sigmas is not None:
            raise OptionError("give timesteps or sigmas, not both")
        scale = float(self.config.num_train_timesteps)
        if timesteps is not None:
            levels = [float(time) / scale for time in timesteps]
        elif sigmas is not None:
            levels = [float(sigma) for sigma in sigmas]
        elif num_inference_steps is not None:
            levels = [1 - n / num_inference_steps for n in range(num_inference_steps)]
        else:
            raise OptionError("give num_inference_steps, timesteps or sigmas")
        if levels and levels[-1] == 0:
            levels.pop()
        self._check(levels, num_inference_steps)
        self._levels = [*levels, 0.0]
        self.sigmas = torch.tensor(self._levels, dtype=torch.float32)
        self.timesteps = torch.tensor([scale * t for t in levels], dtype=torch.float32, device=device)
        self.num_inference_steps = len(levels)
        self._begin_index = self._step_index = self._noise = None

    def _check(self, levels: Sequence[float], count: int | None) -> None:
        falling = all(t > s for t, s in itertools.pairwise((*levels, 0.0)))
        if not levels or levels[0] > 1 or not falling:
            raise OptionError(f"the times {levels} do not fall from at most 1 to above 0")
        if count is not None and count != len(levels):
            raise OptionError(f"num_inference_steps is {count}, but {len(levels)} times are given")

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Returns the sample, which is the network's input as it is."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """Makes one step.

        Arguments:
            model_output: The velocity noise - x0 that the network predicts, with shape (B, *).
            timestep: The timestep that it was made for.
            sample: The sample, with shape (B, *).
            return_dict: Whether to return a `SchedulerOutput` instead of a tuple.

        Raises:
            OptionError: If ``set_timesteps`` was not called, or the last step has been made.
        """
        x, velocity = wide(sample), wide(model_output)
        if self._step_index is None:
            self._step_index = self._place(timestep)
            if self._levels[self._step_index] >= _PURE:
                self._noise = x.clone()  # a pipeline may change its sample in place
        if self._step_index >= len(self._levels) - 1:
            raise OptionError("the last step has been made; call set_timesteps")
        t, s = self._levels[self._step_index : self._step_index + 2]
        if self._noise is None:
            result = x + (s - t) * velocity
        else:
            result = (1 - s) * (x - t * velocity) + s * self._noise
        self._step_index += 1
        result = result.to(sample.dtype)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _place(self, timestep: Any) -> int:
        """Returns the place of a timestep, the first step where a pipeline has not said another."""
        if self.num_inference_steps is None:
            raise OptionError("call set_timesteps first")
        if self._begin_index is not None:
            return self._begin_index
        return int((self.timesteps - torch.as_tensor(timestep).to(self.timesteps)).abs().argmin())

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns noisy samples (1 - t) x0 + t noise, (B, *), in the samples' type.

        Arguments:
            original_samples: Clean samples (B, *).
            noise: Noise (B, *).
            timesteps: Timesteps (B), or one for all.
        """
        x0 = wide(original_samples)
        t = timesteps.to(x0) / self.config.num_train_timesteps
        t = t.reshape(-1, *[1] * (x0.ndim - 1))
        return ((1 - t) * x0 + t * wide(noise)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Returns noisy samples, as the pipelines of flow matching ask for them."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        """Returns the number of training timesteps."""
        return int(self.config.num_train_timesteps)

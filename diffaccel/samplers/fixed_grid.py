"""The scheduler of few-step students whose grid no stock scheduler has: the times are its configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import OptionError
from ..noise import NoiseLevel, prediction_coefficients, wide
from .exponential import Level
from .paths import LARGEST, TrainingPath, betas_of, flow_settings

__all__ = ["FixedGridScheduler"]


class FixedGridScheduler(SchedulerMixin, ConfigMixin):
    r"""First-order steps on the times at which a student was trained, and on no others.

    A time t in (0, 1] is that of the straight path, x_t = (1 - t) x0 + t eps; a network with a table of betas
    is asked at the level of the table with the same ratio of noise to signal, t / (1 - t), or at its noisiest
    level where it knows none that noisy. From x0, which the network predicts, a step goes to

        x_s = alpha_s x0 + sigma_s eps,    eps = (x_t - alpha_t x0) / sigma_t, or fresh noise,

    in float32 or wider: Euler's method on the straight path, DDIM on a variance-preserving one, and with
    fresh noise the sampler of consistency models. It ends at x0.

    Arguments:
        grids: For each number of steps that was trained, its falling times; the number is their count.
        num_train_timesteps: The number T of training timesteps.
        beta_start: The first beta.
        beta_end: The last beta.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: The betas themselves.
        prediction_type: What the network predicts: "epsilon", "sample", "v_prediction" or "flow_prediction",
            of which the last stands for the straight path.
        rescale_betas_zero_snr: Whether the noisiest level is pure noise.
        use_flow_sigmas: Whether the path is straight though the prediction type is another.
        stochastic_sampling: Whether each step takes fresh noise.

    Raises:
        OptionError: If there is no grid, two have one length, or times do not fall from at most 1 to above 0.

    References:
        | Denoising Diffusion Implicit Models (2021), arXiv 2010.02502, equation 12
        | Consistency Models (2023), arXiv 2303.01469, algorithm 1
    """

    order = 1
    _compatibles: list[str] = []
    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(
        self,
        grids: Sequence[Sequence[float]] = (),
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "flow_prediction",
        rescale_betas_zero_snr: bool = False,
        use_flow_sigmas: bool = False,
        stochastic_sampling: bool = False,
    ) -> None:
        self.grids = {len(times): tuple(float(time) for time in times) for times in grids}
        for times in self.grids.values():
            falling = all(a > b for a, b in zip(times, (*times[1:], 0.0), strict=True)) if times else False
            if not falling or times[0] > 1:
                raise OptionError(f"a grid of the times {times}; expected falling ones in (0, 1]")
        if not grids or len(self.grids) < len(grids):
            raise OptionError(f"{len(grids)} grids; expected one for each number of steps")
        alphas = None
        if not use_flow_sigmas and prediction_type != "flow_prediction":
            betas = betas_of(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
                             rescale_betas_zero_snr)  # fmt: skip
            self.betas = betas.float()
            self.alphas_cumprod = (1 - betas).cumprod(0).float()
            alphas = (1 - betas).cumprod(0).tolist()
        prediction_coefficients(prediction_type, 1.0, 1.0)  # raises for an unknown one
        self.path = TrainingPath(num_train_timesteps, alphas)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        """The noise's share of each level on the straight path, sigma / alpha on others; and 0."""
        self.levels: list[Level] = []
        """The levels at which the network is asked, and the last one."""
        self._exact: list[Level] = []
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes the scheduler from the configuration of another one, given ``grids``.

        Raises:
            UnsupportedScheduler: If the configuration is for another path.
        """
        if isinstance(config, Mapping):
            kwargs = {**flow_settings(config), **kwargs}
            # the defaults of the other class may be other than ours
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step, where a pipeline begins in mid-schedule."""
        return self._begin_index

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
        """Chooses the grid with this number of steps.

        Arguments:
            num_inference_steps: The number of steps.
            device: Where the timesteps are to be.
            timesteps: Nothing but the timesteps of the grid.
            sigmas: Nothing but the noise levels of the grid, or the equal steps that pipelines of flow
                matching pass by themselves.
            mu: What pipelines of flow matching pass for a shift; the grid is what it is.

        Raises:
            OptionError: If the student was not trained for this number, or at these levels.
        """
        given = timesteps if sigmas is None else sigmas
        count = len(given) if given is not None else num_inference_steps
        if count not in self.grids:
            counts = ", ".join(map(str, sorted(self.grids)))
            raise OptionError(f"this student was trained for {counts} steps, not for {count}")
        grid, last = self.grids[count], Level(1.0, 0.0)
        if self.path.is_flow:
            times = [self.path.steps * time for time in grid]
            self.levels = self._exact = [*(Level(1 - time, time) for time in grid), last]
        else:
            ratios = [time / (1 - time) if time < 1 else LARGEST for time in grid]
            known = [min(ratio, self.path.largest) for ratio in ratios]
            times = [self.path.time(ratio) for ratio in known]
            self.levels = [*map(self.path.level, known), last]
            self._exact = [*map(self.path.level, ratios), last]
        shown = [level.sigma if self.path.is_flow else level.ratio for level in self.levels]
        if timesteps is not None:
            _check(timesteps, times, 0.5)
        if sigmas is not None and not _close(sigmas, [1 - n / count for n in range(count)], 1e-4):
            _check(sigmas, shown[:-1], 1e-4 * max(1.0, shown[0]))
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor(shown, dtype=torch.float32)
        self.num_inference_steps = count
        self._begin_index = self._step_index = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Returns the sample, which is the network's input as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Makes one step.

        Arguments:
            model_output: The network's prediction, with shape (B, *).
            timestep: The timestep that it was made for.
            sample: The sample, with shape (B, *).
            eta: The noise of DDIM, which pipelines pass on; must be 0.
            use_clipped_model_output: Another argument of DDIM; must be off.
            generator: The source of fresh noise.
            return_dict: Whether to return a `SchedulerOutput` instead of a tuple.

        Raises:
            OptionError: If ``set_timesteps`` was not called, or an argument of DDIM is in use.
        """
        if eta or use_clipped_model_output:
            raise OptionError("eta and use_clipped_model_output are DDIM's; this student was trained without")
        if self.num_inference_steps is None:
            raise OptionError("call set_timesteps first")
        if self._step_index is None:
            self._step_index = self._place(timestep)
        place, x = self._step_index, wide(sample)
        asked, level, after = self.levels[place], self._exact[place], self._exact[place + 1]
        p, q = prediction_coefficients(self.config.prediction_type, asked.alpha, asked.sigma)
        x0 = NoiseLevel(asked.alpha, asked.sigma, p, q).x0(model_output, x)
        result = after.alpha * x0
        if after.sigma:
            result = result + after.sigma * self._noise(x, x0, level, generator)
        self._step_index += 1
        result = result.to(sample.dtype)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _noise(self, x: Tensor, x0: Tensor, level: Level, generator: Any) -> Tensor:
        if self.config.stochastic_sampling:
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return (x - level.alpha * x0) / level.sigma

    def _place(self, timestep: Any) -> int:
        """Returns the place of a timestep, the first step where a pipeline has not said another."""
        if self._begin_index is not None:
            return self._begin_index
        return int((self.timesteps - torch.as_tensor(timestep).to(self.timesteps)).abs().argmin())

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns noisy samples alpha x0 + sigma eps at some timesteps.

        Arguments:
            original_samples: Clean samples (B, *).
            noise: Noise (B, *).
            timesteps: Training times (B).
        """
        levels = [self.path.level(self.path.ratio(float(time))) for time in timesteps.flatten().tolist()]
        shape = (-1, *([1] * (original_samples.ndim - 1)))
        alpha = original_samples.new_tensor([level.alpha for level in levels]).reshape(shape)
        sigma = original_samples.new_tensor([level.sigma for level in levels]).reshape(shape)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Returns noisy samples, as the pipelines of flow matching ask for them."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        """Returns the number of training timesteps."""
        return int(self.config.num_train_timesteps)


def _close(given: Sequence[float], own: Sequence[float], tolerance: float) -> bool:
    return all(abs(float(a) - b) <= tolerance for a, b in zip(given, own, strict=True))


def _check(given: Sequence[float], own: Sequence[float], tolerance: float) -> None:
    if not _close(given, own, tolerance):
        raise OptionError(f"this student was trained at {own}; {[float(value) for value in given]} was given")

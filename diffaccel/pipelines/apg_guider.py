"""APG as a guider: the component of modular pipelines that combines the predictions."""

import math
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from torch import Tensor, nn

from ..errors import UnsupportedPipeline
from ..guidance import Trajectory
from ..noise import Path, path_of, wide
from .apg import APG
from .branches import Layout, leading
from .run import first_input, own_index

__all__ = ["APGGuider"]


class APGGuider(BaseGuidance):
    """Adaptive projected guidance in x0 space, in the paper's form D_c + (w - 1) Dapg.

    ``APGGuider(...).connect(pipe.scheduler)`` goes into a pipeline by ``pipe.update_components(guider=...)``;
    it has to know the scheduler, which guiders are not told, to get from outputs to x0.  The sample is what
    the network receives meanwhile.  Where a pipeline does more to the result (Qwen-Image's norms), it still
    does.  A guider serves one pipeline at a time.

    References:
        Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models (2024),
        arXiv 2410.02416, Algorithm 1.

    Arguments:
        guidance_scale: The guidance scale w; 1 for none.
        eta: See `APG`, as the next five.
        rescale: The norm threshold.
        rescale_unit: The unit of the threshold.
        momentum: The beta of the momentum.
        dims: What norms are taken of.
        origin: Where the parallel component starts.
        guidance_rescale: The part of the result that is given the standard deviation of the conditional
            output (arXiv 2305.08891, Section 3.4).
        start: The part of the steps after which guidance starts.
        stop: The part of the steps after which it ends.
        enabled: Whether there is guidance.

    Raises:
        OptionError: If an option of APG is out of range.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        rescale: float = 0.0,
        rescale_unit: str = "rms",
        momentum: float = 0.0,
        dims: str = "all",
        origin: str = "zero",
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.apg = APG(eta, rescale, rescale_unit, momentum, dims, origin)
        self.trajectory = Trajectory()
        self.scheduler: Any = None
        self._sample: Any = None
        self._hook: Any = None
        self._timesteps: Any = None
        self._path: Path | None = None

    def connect(self, scheduler: Any) -> Self:
        """Tells the guider the scheduler of its pipeline; returns the guider.

        Raises:
            UnsupportedScheduler: When guiding, if the scheduler's noise levels are not known.
        """
        self.scheduler = scheduler
        self._timesteps = None
        return self

    def new(self, **kwargs: Any) -> Self:
        """Returns a guider of the same configuration but for ``kwargs``, connected to the same scheduler."""
        return super().new(**kwargs).connect(self.scheduler)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Listens to the network, to see the sample.

        Raises:
            UnsupportedPipeline: If the guider has not been connected.
        """
        if self.scheduler is None:
            raise UnsupportedPipeline(
                "APGGuider does not know the scheduler; call its connect(pipe.scheduler)"
            )
        super().prepare_models(denoiser)
        self._hook = denoiser.register_forward_pre_hook(self._listen, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Ceases to listen."""
        self._hook.remove()
        self._hook = None

    def _listen(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._sample = first_input(denoiser, args, kwargs)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Returns the inputs of the network for each prediction; each value is shared or one a prediction."""
        names = enumerate(self._input_predictions[: self.num_conditions])
        return [self._prepare_batch(data, index, name) for index, name in names]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """Returns the same as `prepare_inputs`, out of the fields of a block's state."""
        names = enumerate(self._input_predictions[: self.num_conditions])
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name) for index, name in names
        ]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Returns the guided output, (B, *), and the outputs that it is made of.

        Arguments:
            pred_cond: The conditional output, with shape (B, *).
            pred_uncond: The unconditional output; None where there is no guidance.
        """
        pred = pred_cond if pred_uncond is None else self._guided(pred_cond, pred_uncond)
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _guided(self, cond: Tensor, uncond: Tensor) -> Tensor:
        path, index = self._current_path(), self._index()
        sample, self._sample = self._sample, None
        sample = torch.stack(sample) if isinstance(sample, list) else sample
        sample = sample.reshape(cond.shape) if sample.numel() == cond.numel() else leading(sample, cond)
        noisy = wide(sample) / path.input_scale(index)
        step = None
        if not self.apg.is_plain:
            step = self.apg.step(path[index], cond, uncond, noisy, self.trajectory, Layout())
        if step is None:
            return uncond + self.guidance_scale * (cond - uncond)
        return (wide(cond) + (self.guidance_scale - 1) * step).to(cond.dtype)

    def _current_path(self) -> Path:
        """Returns the noise levels of the loop; a new loop has a new tensor of timesteps, and no memory."""
        if self._path is None or self._timesteps is not self.scheduler.timesteps:
            self._path, self._timesteps = path_of(self.scheduler), self.scheduler.timesteps
            self.trajectory = Trajectory()
        return self._path

    def _index(self) -> int:
        if (index := own_index(self.scheduler)) is not None:
            return index
        return self.scheduler.timesteps.tolist().index(float(self._timestep))

    @property
    def is_conditional(self) -> bool:
        """Whether the network computes the conditional prediction now."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """The number of predictions of this step: 2, or 1 without guidance."""
        active = self._enabled and not math.isclose(self.guidance_scale, 1.0)
        if active and self._num_inference_steps is not None:
            first, last = (int(part * self._num_inference_steps) for part in (self._start, self._stop))
            active = first <= self._step < last
        return 2 if active else 1

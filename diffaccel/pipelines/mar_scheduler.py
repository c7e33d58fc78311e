r"""The scheduler of MAR: which tokens an autoregressive step draws, and the steps of the head for them.

References:
    | Autoregressive Image Generation without Vector Quantization (Li et al., 2024)
    | https://arxiv.org/abs/2406.11838
    | MaskGIT: Masked Generative Image Transformer (Chang et al., 2022), https://arxiv.org/abs/2202.04200
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import OptionError, closest
from .autoregressive import ARStep, token_counts
from .head_error import normal_error
from .mar_chain import ChainStep, chain, run_chain
from .mar_head import MARHead

__all__ = ["GUIDANCE_SCHEDULES", "MARScheduler", "MARSchedulerOutput", "masked_counts"]

HEADS = ("diffusion", "flow")
VARIANCES = {"learned": None, "small": 0.0, "large": 1.0}
GUIDANCE_SCHEDULES = ("linear", "constant")

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class MARSchedulerOutput(BaseOutput):
    """What an autoregressive step gives.

    Arguments:
        prev_sample: The tokens with the drawn ones, with shape (B, N, c).
        drawn: The positions of the drawn tokens, with shape (B, n).
        head_calls: The evaluations of the head.
    """

    prev_sample: Tensor
    drawn: Tensor
    head_calls: int


def masked_counts(num_tokens: int, num_steps: int) -> list[int]:
    r"""Returns the numbers m of unknown tokens before, between and after K steps, N first and 0 last.

    :math:`m_{k+1} = \max(1, \min(m_k - 1, \lfloor N \cos(\pi (k + 1) / 2 K) \rfloor))`, and the last step
    draws all that are left (arXiv 2202.04200, 3.2, the cosine schedule).

    Raises:
        OptionError: If there are more steps than tokens, or none.
    """
    if not 1 <= num_steps <= num_tokens:
        raise OptionError(
            f"{num_steps} autoregressive steps for {num_tokens} tokens; each step draws a token, so use "
            f"num_inference_steps from 1 to {num_tokens}"
        )
    counts = [num_tokens]
    for k in range(1, num_steps):
        kept = math.floor(num_tokens * math.cos(math.pi * k / (2 * num_steps)))
        counts.append(max(1, min(counts[-1] - 1, kept)))
    return [*counts, 0]


class MARScheduler(SchedulerMixin, ConfigMixin):
    """Draws the tokens of an image in K autoregressive steps, by the diffusion or flow of a token head.

    Its timesteps are the numbers of unknown tokens before each step.  `step` is one autoregressive step.

    Arguments:
        head_type: "diffusion", for a head that predicts noise on the cosine schedule, or "flow", for one that
            predicts velocity on the straight path.
        variance_type: The variance of the diffusion's steps: "learned", "small" or "large".
        num_head_steps: The steps of the head in an autoregressive step.
        num_train_timesteps: The levels of the diffusion.
        start_timestep: The largest timestep that the head is asked for (`mar_chain.diffusion_timesteps`).

    Raises:
        OptionError: If an option is unknown.
    """

    order = 1

    @register_to_config
    def __init__(
        self, head_type: str = "diffusion", variance_type: str = "learned", num_head_steps: int = 100,
        num_train_timesteps: int = 1000, start_timestep: int = 950,
    ) -> None:  # fmt: skip
        if head_type not in HEADS:
            raise OptionError(f"no head_type {head_type!r}; {closest(str(head_type), HEADS)}")
        if variance_type not in VARIANCES:
            raise OptionError(f"no variance_type {variance_type!r}; {closest(str(variance_type), VARIANCES)}")
        self.num_head_steps = num_head_steps
        self.timesteps = torch.empty(0, dtype=torch.int64)
        self.drawn: tuple[int, ...] = ()
        self.spread: float | None = None

    def set_timesteps(
        self, num_inference_steps: int, num_tokens: int, num_head_steps: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Begins images of ``num_tokens`` tokens.

        Arguments:
            num_inference_steps: The autoregressive steps K.
            num_tokens: The tokens N.
            num_head_steps: The steps of the head, if they are others than those of the configuration.
            device: The device of the timesteps.

        Raises:
            OptionError: If there are more steps than tokens, or a number of steps is too small.
        """
        counts = masked_counts(num_tokens, num_inference_steps)
        self.num_head_steps = self.config.num_head_steps if num_head_steps is None else num_head_steps
        self.chain(self.num_head_steps)  # raises for too few
        self.drawn = token_counts(counts)
        self.timesteps = torch.tensor(counts[:-1], device=device)
        self.spread = None

    def head_steps(self, step: ARStep) -> int:
        """Returns the steps that the head takes in one autoregressive step: always as many.

        This is the method by which `diffaccel.pipelines.disa.StepAnnealing` sets the steps.
        """
        return self.num_head_steps

    def chain(self, num_head_steps: int) -> tuple[ChainStep, ...]:
        """Returns the head's steps for a number of them; fewer where the largest timestep cuts some."""
        config = self.config
        return chain(config.head_type, num_head_steps, config.num_train_timesteps, config.start_timestep)

    def step_error(self, num_head_steps: int, spread: float) -> float:
        """Returns the error of a number of head steps for a normal token: `head_error.normal_error`.

        Arguments:
            num_head_steps: The number of head steps.
            spread: The standard deviation of the token.
        """
        variance = VARIANCES[self.config.variance_type]
        # a learned variance lies between the two others
        return normal_error(self.chain(num_head_steps), spread, 0.5 if variance is None else variance)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, *, head: MARHead, order: Tensor,
        guidance_scale: float = 1.0, guidance_schedule: str = "linear", temperature: float = 1.0,
        generator: Generators = None, return_dict: bool = True,
    ) -> MARSchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        r"""Draws the tokens of one autoregressive step.

        The guidance of a step is ``1 + (g - 1) (N - m') / N`` with the m' tokens that it leaves unknown
        (the official "linear" schedule), or g.

        Arguments:
            model_output: The conditions z of all positions, with shape (B, N, D), or (2 B, N, D) with those
                for no class as the second half.
            timestep: The number of unknown tokens.
            sample: The tokens, with shape (B, N, c).
            head: The token head.
            order: The order of the positions: the unknown ones come first, with shape (B, N).
            guidance_scale: The guidance scale g, if the model output has two halves.
            guidance_schedule: "linear" or "constant".
            temperature: The factor of the noise that the head's steps add.
            generator: The source of the noise, or one of each image.
            return_dict: Whether to return an output object, not a tuple.
        """
        index = self.timesteps.tolist().index(int(timestep))
        before, count = int(timestep), self.drawn[index]
        drawn = order[:, before - count : before]
        steps = self.chain(self.head_steps(ARStep(index, self.drawn, self.spread)))
        if guidance_schedule == "linear":
            done = 1 - (before - count) / order.shape[1]
            guidance_scale = 1 + (guidance_scale - 1) * done
        halves = len(model_output) // len(sample)
        place = drawn.repeat(halves, 1)[:, :, None].expand(-1, -1, model_output.shape[-1])
        condition = model_output.gather(1, place).flatten(0, 1)
        shape = (len(sample), len(steps), count, sample.shape[-1])
        noise = randn_tensor(shape, generator, sample.device, torch.float32).transpose(0, 1).flatten(1, 2)
        predict = _guided(head, condition, guidance_scale if halves == 2 else None)
        variance = VARIANCES[self.config.variance_type] if self.config.head_type == "diffusion" else 0.0
        rows, self.spread = run_chain(predict, steps, noise, variance, temperature)
        place = drawn[:, :, None].expand(-1, -1, sample.shape[-1])
        tokens = sample.scatter(1, place, rows.view(len(sample), count, -1).to(sample.dtype))
        result = MARSchedulerOutput(tokens, drawn, len(steps))
        return result if return_dict else result.to_tuple()


def _guided(head: MARHead, condition: Tensor, scale: float | None) -> Callable[[Tensor, float], Tensor]:
    """Returns the head with guidance: both halves see one sample, and the variance is that with the class."""
    embedded = head.embed(condition)

    def predict(sample: Tensor, timestep: float) -> Tensor:
        rows = sample.to(embedded.dtype)
        time = torch.tensor([timestep], device=sample.device)
        if scale is None:
            return head(rows, time, embedded).float()
        given, free = head(torch.cat([rows, rows]), time, embedded).float().chunk(2)
        mean, variance = given.split([sample.shape[-1], given.shape[-1] - sample.shape[-1]], -1)
        free = free[:, : sample.shape[-1]]
        return torch.cat([free + scale * (mean - free), variance], -1)

    return predict

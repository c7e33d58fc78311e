r"""SlimFlow: a flow for a small student by annealed reflow, then one step of it, guided by two of the flow.

With t = 1 at the noise, pairs of noise and sample x0, and fresh noise e of each sample:

    annealed noise     noise_b = sqrt(1 - b^2) noise + b e,    b from 1 to 0 in the course of training
    flow               the loss of rectified flow on x0 and noise_b
    one step           x0_hat = noise - velocity(noise, 1)
    its target         x0; and, on fresh noise, two steps of the frozen flow, the first of velocity a:
                       x_s = noise - (1 - s) a,    target = x_s - s flow(x_s, s)

noise_b is standard normal for every b. At b = 1 this is a first rectified flow on the teacher's samples, from
which reflow has to start where a student cannot inherit weights; at b = 0 it is reflow.

References:
    SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow (2024), arXiv 2407.12718
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from ..errors import OptionError, closest
from ..noise import wide
from ..options import option
from .data import Batch
from .densities import DENSITIES
from .draws import Draws
from .inversion import Velocity
from .method import Method, Setup
from .premetrics import L2, PREMETRICS, Premetric, broad
from .rectified_flow import distance_for
from .reflow import Coupling, flow_loss

__all__ = ["FIRST_STEPS", "SCHEDULES", "FirstStep", "SlimFlow", "anneal", "annealed_noise", "coupling_at",
           "distill_loss", "flip", "middle_times", "two_step_loss", "two_step_target"]  # fmt: skip

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - min(1.0, done),
    "exp": lambda done: math.exp(-done),
    "cos": lambda done: (1 + math.cos(math.pi * min(1.0, done))) / 2,
    "constant": lambda done: 0.0,
}
"""The share b of fresh noise, from 1 on, as a function of progress: images over annealed images; "exp" never
ends, and "constant" is plain reflow from the beginning."""

FirstStep = Literal["practice", "paper"]

FIRST_STEPS: Mapping[str, tuple[float, float]] = {"practice": (0.2, 0.8), "paper": (0.0, 1.0)}
"""The bounds of s for each rule of the first of two steps.

"practice" takes the student's own velocity as the first step's, as section 4.1 and the published code do;
"paper" the frozen flow's, as the printed equation does, at one more evaluation. On a toy (8 modes on a ring,
3 layers of 24, ``benchmarks/flow_toys.py``, three seeds) flows with one-step errors of 0.228, 0.234 and 0.253
are distilled to 0.098, 0.103 and 0.107 without two steps, to 0.100, 0.107 and 0.114 with those of "practice",
and to 0.134, 0.142 and 0.151 with those of "paper": the step from pure noise is the frozen flow's worst one,
and draws the student back to it.
"""

_SQUARED = L2()


def anneal(images: int, anneal_images: int, schedule: str = "linear") -> float:
    """Returns the share b of fresh noise, in [0, 1], after some images of training.

    Arguments:
        images: The images that the student has been trained on.
        anneal_images: The images after which "linear" and "cos" are 0, and "exp" 1 / e; 0 for no annealing.
        schedule: One of ``SCHEDULES``.

    Raises:
        OptionError: If there is no such schedule, or a number is below 0.
    """
    if schedule not in SCHEDULES:
        raise OptionError(f"no schedule {schedule!r}; {closest(schedule, SCHEDULES)}")
    if images < 0 or anneal_images < 0:
        raise OptionError(f"{images} images of {anneal_images} annealed ones; expected numbers from 0 on")
    return SCHEDULES[schedule](images / anneal_images) if anneal_images else 0.0


def annealed_noise(noise: Tensor, fresh: Tensor, b: float) -> Tensor:
    """Returns sqrt(1 - b^2) noise + b fresh, (B, *), in float32 or wider: at b = 0 the noise, at 1 the fresh.

    Arguments:
        noise: The noise of the pairs, with shape (B, *).
        fresh: Standard normal numbers of each sample, with shape (B, *).
        b: The share of the fresh, in [0, 1].

    Raises:
        OptionError: If b is out of range.
    """
    if not 0 <= b <= 1:
        raise OptionError(f"the share of fresh noise is {b}; expected 0 to 1")
    return math.sqrt(1 - b * b) * wide(noise) + b * wide(fresh)


def coupling_at(b: float) -> Coupling:
    """Returns what noise is to its sample: "paired" at b = 0 only, which premetrics other than L2 need."""
    return "paired" if b == 0 else "independent"


def flip(flags: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Mirrors the flagged samples of each tensor: noise and sample of a pair, and maps that condition it.

    Right for a teacher that was trained with mirrored images, and whose decoder, if there is one, is
    equivariant; wrong for text, and for conditions that tell left from right.

    Arguments:
        flags: Which samples are mirrored, bool, with shape (B), such as ``draws.integers(2) > 0``.
        tensors: Tensors of shape (B, *, W).
    """
    return tuple(torch.where(broad(flags.float(), part) > 0, part.flip(-1), part) for part in tensors)


def distill_loss(velocity: Velocity, x0: Tensor, noise: Tensor, premetric: Premetric = _SQUARED) -> Tensor:
    """Returns the distance of one step, noise - velocity(noise, 1), from x0, for each sample: shape (B).

    It is that of velocities at t = 1, where the premetrics of LPIPS have nothing but LPIPS.

    Arguments:
        velocity: The student's velocity field.
        x0: The teacher's samples of the noise, with shape (B, *).
        noise: The noise of the pairs, with shape (B, *): never annealed.
        premetric: What the distance is.
    """
    return flow_loss(velocity, x0, noise, _ones(noise), premetric, coupling="paired")


def two_step_loss(velocity: Velocity, flow: Velocity, noise: Tensor, s: Tensor,
                  premetric: Premetric = _SQUARED, first_step: FirstStep = "practice") -> Tensor:  # fmt: skip
    """Returns the distance of the student's one step from two steps of the flow, for each sample: shape (B).

    No gradient reaches the flow, nor the student through the target; the student is evaluated once.

    Arguments:
        velocity: The student's velocity field.
        flow: The frozen field of the second step.
        noise: Fresh standard normal noise, with shape (B, *).
        s: The times between the steps, with shape (B): see `middle_times`.
        premetric: What the distance is.
        first_step: "practice" if the student makes the first step too, "paper" if the flow does; see
            ``FIRST_STEPS`` for why the former is the default.

    Raises:
        OptionError: If there is no such rule.
    """
    _check(first_step)
    noise, t = wide(noise), _ones(noise)
    own = wide(velocity(noise, t))
    with torch.no_grad():
        first = own if first_step == "practice" else wide(flow(noise, t))
    target = two_step_target(first, flow, noise, s)
    return premetric(own - (noise - target), target, t)


@torch.no_grad()
def two_step_target(first: Tensor, flow: Velocity, noise: Tensor, s: Tensor) -> Tensor:
    """Returns x_s - s flow(x_s, s) with x_s = noise - (1 - s) first, (B, *), without a gradient.

    Arguments:
        first: The velocity of the first step, with shape (B, *).
        flow: The field of the second step.
        noise: The noise that the steps start from, with shape (B, *).
        s: The times between the steps, with shape (B), in (0, 1).
    """
    noise = wide(noise)
    s = s.to(noise)
    x_s = noise - (1 - broad(s, noise)) * wide(first)
    return x_s - broad(s, noise) * wide(flow(x_s, s))


def middle_times(draws: Draws, first_step: FirstStep = "practice") -> Tensor:
    """Returns a time s between two steps for each sample, with shape (B): U(0.2, 0.8), or U(0, 1) as printed.

    Arguments:
        draws: The random numbers of the samples.
        first_step: The rule of the first step.

    Raises:
        OptionError: If there is no such rule.
    """
    _check(first_step)
    low, high = FIRST_STEPS[first_step]
    return low + (high - low) * draws.uniform()


def _check(first_step: str) -> None:
    if first_step not in FIRST_STEPS:
        raise OptionError(f"no first step {first_step!r}; {closest(first_step, FIRST_STEPS)}")


def _ones(noise: Tensor) -> Tensor:
    return torch.ones(len(noise), dtype=wide(noise).dtype, device=noise.device)


FLOW = "flow"
"""The name of the frozen flow of the second phase."""


@dataclass
class SlimFlow(Method):
    """A student that is smaller than its teacher: a flow of its own first, and then one step.

    In the first phase it learns the flow of pairs whose noise is mixed with fresh noise, ever less of it. In
    the second one, the average of that flow is frozen, the student begins from it, and learns the pairs'
    samples in one step, and two steps of the flow on fresh noise. Both phases use the same pairs: the paper's
    regeneration of pairs by the flow is a second run, with ``pairs`` made by the first one's export.

    Arguments:
        anneal: How the share of fresh noise falls: "linear", "exp", "cos", or "constant" (none at all).
        anneal_part: When it is over, as a part of the first phase.
        distill_part: The second phase, as a part of all images; 0 for none.
        density: How times are drawn in the first phase.
        premetric: The distance in the second phase, and in the first one once no noise is fresh.
        perceptual: Whose features it compares, if it does.
        first_step: Who makes the first of two steps: "practice" (the student) or "paper" (the flow).
        two_step: The weight of the two-step term.
        mirror: Whether half of the pairs are mirrored; right for teachers that were trained so only.

    References:
        SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow (2024), arXiv 2407.12718
    """

    name: ClassVar[str] = "slimflow"

    anneal: str = option("linear", choices=tuple(SCHEDULES))
    anneal_part: float = option(0.6, low=0.0, high=1.0)
    distill_part: float = option(0.33, low=0.0, high=1.0)
    density: str = option("uniform", choices=tuple(DENSITIES))
    premetric: str = option("l2", choices=tuple(PREMETRICS))
    perceptual: str = option("offline", choices=("offline", "lpips"))
    first_step: str = option("practice", choices=tuple(FIRST_STEPS))
    two_step: float = option(1.0, low=0.0)
    mirror: bool = option(False)

    def begin(self, setup: Setup) -> None:
        """Makes the networks.

        Raises:
            OptionError: If the student is an adapter, of which no frozen copy is made.
        """
        super().begin(setup)
        if setup.student.adapter is not None:
            raise OptionError("slimflow trains students of their own weights; set lora_rank=0")
        if self.mirror and len(setup.host.shape) < 3:
            raise OptionError(f"mirror=true needs samples with a width, not {setup.host.shape}")
        self._l2 = distance_for(setup, "l2", self.perceptual)
        self._distance = distance_for(setup, self.premetric, self.perceptual)
        self._flow_images = round((1 - self.distill_part) * setup.images)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The images after which the second phase begins."""
        return (self._flow_images,) if self.distill_part else ()

    def enter(self, phase: int) -> None:
        """Freezes the flow when the second phase begins."""
        if phase == 1:
            self.snapshot(FLOW)

    def loss(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        """Returns the terms of the phase, each the mean over the samples."""
        x0, noise = batch.x0, batch.noise
        if self.mirror:
            x0, noise = flip(batch.draws.integers(2) > 0, x0, noise)
        velocity = self.velocity(self.networks["student"], batch.inputs)
        if FLOW not in self.frozen:
            images = round(self.anneal_part * self._flow_images)
            b = anneal(batch.images, images, self.anneal)
            mixed = annealed_noise(noise, batch.draws.normal(*x0.shape[1:]), b)
            coupling = coupling_at(b)
            distance = self._distance if coupling == "paired" else self._l2
            t = DENSITIES[self.density].sample(batch.draws)
            return {"flow": flow_loss(velocity, x0, mixed, t, distance, coupling=coupling).mean()}
        terms = {"distill": distill_loss(velocity, x0, noise, self._distance).mean()}
        if self.two_step:
            flow = self.velocity(self.frozen[FLOW], batch.inputs)
            rule = cast(FirstStep, self.first_step)
            s, fresh = middle_times(batch.draws, rule), batch.draws.normal(*x0.shape[1:])
            guided = two_step_loss(velocity, flow, fresh, s, self._distance, rule)
            terms["two-step"] = self.two_step * guided.mean()
        return terms

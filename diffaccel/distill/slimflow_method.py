"""SlimFlow as a method: a student of another size, by annealed reflow and then one step of it."""

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from ..errors import OptionError
from ..options import option
from .data import Batch
from .densities import DENSITIES
from .method import Method, Setup
from .premetrics import PREMETRICS
from .rectified_flow import distance_for
from .reflow import flow_loss
from .slimflow import (
    FIRST_STEPS,
    SCHEDULES,
    FirstStep,
    anneal,
    annealed_noise,
    coupling_at,
    distill_loss,
    flip,
    middle_times,
    two_step_loss,
)  # fmt: skip

__all__ = ["SlimFlow"]

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
            self.frozen[FLOW] = self.snapshot()

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

"""Rectified flow as a method: a student on pairs of noise and the teacher's sample, in one round (2-RF++)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import option
from .data import Batch
from .densities import DENSITIES
from .latents import decoder_of
from .method import Method, Setup
from .premetrics import PREMETRICS, Premetric, load_perceptual, premetric_of
from .reflow import flow_loss

__all__ = ["RectifiedFlow", "distance_for"]


@dataclass
class RectifiedFlow(Method):
    """Reflow with the improvements of 2-RF++: U-shaped times, robust premetrics, the teacher's weights first.

    A student whose network predicts eps, v or x0 keeps doing so: the velocity is made of its prediction by
    the exact map of `units`, so that it leaves as the same kind of model. Guidance of the teacher is in its
    samples; the student has none. Real pairs (configuration G of the paper) are pairs of another store, which
    `pairs.invert_pairs` makes.

    Arguments:
        density: How times are drawn: "u-shaped", "uniform" or "logit-normal".
        premetric: The distance of velocities: "l2", "huber", "lpips-huber" or "lpips-huber-1/t".
        perceptual: Whose features the last two compare: "offline" or "lpips".

    References:
        | Improving the Training of Rectified Flows (2024), arXiv 2405.20320
        | Flow Straight and Fast (2022), arXiv 2209.03003
    """

    name: ClassVar[str] = "rectified-flow"

    density: str = option("u-shaped", choices=tuple(DENSITIES))
    premetric: str = option("l2", choices=tuple(PREMETRICS))
    perceptual: str = option("offline", choices=("offline", "lpips"))

    def begin(self, setup: Setup) -> None:
        """Makes the networks."""
        super().begin(setup)
        self._distance = distance_for(setup, self.premetric, self.perceptual)

    def loss(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        """Returns the distance of velocities at random times, the mean over the samples."""
        t = DENSITIES[self.density].sample(batch.draws)
        velocity = self.velocity(self.networks["student"], batch.inputs)
        distance = flow_loss(velocity, batch.x0, batch.noise, t, self._distance, coupling="paired")
        return {"flow": distance.mean()}


def distance_for(setup: Setup, premetric: str, perceptual: str) -> Premetric:
    """Returns a premetric for the samples of a run, decoded where it compares images.

    Arguments:
        setup: What the method starts from.
        premetric: The name of the premetric.
        perceptual: Whose features it compares, if it does.

    Raises:
        OptionError: If there is none of these names.
        MissingWeights: If the weights of the features are not on this machine.
        UnsupportedPipeline: If samples cannot be decoded here.
    """
    if not premetric.startswith("lpips"):
        return premetric_of(premetric)
    device = next(setup.student.network.parameters()).device
    return premetric_of(premetric, load_perceptual(perceptual, device, decode=decoder_of(setup.host)))

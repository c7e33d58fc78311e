"""What methods of distribution matching share: a fake score, a guided teacher, and two time scales."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from ..options import option
from .adapters import copy_lora
from .data import Batch
from .denoiser import Denoiser
from .draws import Draws
from .grid import Grid, shift_of
from .host import Inputs
from .matching import (
    fake_loss,
    kl_weight,
    matching_gradient,
    pseudo_pair,
    straight,
    subinterval_weight,
    transition,
)
from .method import Method, Setup
from .premetrics import broad
from .walk import Ask, ScoreTimes, beginning

__all__ = ["FAKE", "DistributionMatching"]

FAKE = "fake_score"
"""The name of the network that learns the student's own score."""


@dataclass
class DistributionMatching(Method):
    """A student that is led by the difference of two scores: its teacher's, and its own by a fake score.

    Only the conditions of the pairs are used, and noise is fresh, of which there is more than pairs. The path
    is the straight one, to which `Denoiser` brings every model; the fake score, which begins as the teacher,
    is trained on what the teacher's network predicts, be that eps, v, x0 or a velocity, in its own units.

    Arguments:
        ratio: The updates of the fake score for one of the student: that R of DMD2, where the fake score is
            trained in the student's iteration too, so that 5 is 5 to 1.
        fake_rate: The learning rate of the fake score, as a multiple of the student's.
        guidance: The guidance scale w of the teacher, uncond + w (cond - uncond); below 0 that of the pairs.
        normalizer: What the difference of the scores is multiplied by: "sample" for 1 / mean |x0 - mu_R| of
            each sample, "kl" for the weight of the KL divergence.
        earliest: The least part of the range of times at which scores are compared.
        latest: The largest part.
        shift: The shift of these times; 0 for that of the teacher's scheduler.
        times: The times of the student's steps on the straight path; none for those of a stock scheduler.
    """

    helpers: ClassVar[frozenset[str]] = frozenset({FAKE})
    bound: ClassVar[bool] = True

    ratio: int = option(5, low=1)
    fake_rate: float = option(1.0, low=0.0)
    guidance: float = option(-1.0)
    normalizer: str = option("sample", choices=("sample", "kl"))
    earliest: float = option(0.02, low=0.0, high=1.0)
    latest: float = option(0.98, low=0.0, high=1.0)
    shift: float = option(0.0, low=0.0)
    times: Sequence[float] = field(default=())

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        self.check_times("times")
        if self.earliest >= self.latest:
            raise OptionError(
                f"scores are compared from {self.earliest:g} to {self.latest:g}; expected a range"
            )

    def begin(self, setup: Setup) -> None:
        """Makes the fake score, from the teacher's weights or as a second adapter on them.

        Raises:
            OptionError: If the run is for several numbers of steps, or for another one than ``times`` has.
            UnsupportedPipeline: If the teacher's guidance cannot be called by itself.
        """
        super().begin(setup)
        if len(setup.steps) != 1:
            raise OptionError(
                f"{self.name} trains one number of steps; set steps=[4], not {list(setup.steps)}"
            )
        scheduler = setup.host.pipe.scheduler
        stock = Grid.stock(scheduler, setup.steps[0], self.jumps)
        self.trained = Grid(tuple(map(float, self.times)), stock.kind) if self.times else stock
        """The grid of the student."""
        if len(self.trained) != setup.steps[0]:
            raise OptionError(f"steps={list(setup.steps)}, but {len(self.trained)} times are trained")
        self.law = ScoreTimes(setup.host.units, self.shift or shift_of(scheduler))
        """The law of the times of scores."""
        self._fake = self.networks[FAKE] = self._copy_of_teacher(setup)
        w = self.guidance if self.guidance >= 0 else setup.guidance
        self.scale = 1.0 if w is None else float(w)
        """The teacher's guidance scale."""
        self._blank = setup.host.encode_unconditional(1) if self.scale != 1 else None
        self._blanks: dict[int, Inputs] = {}

    def check_times(self, name: str) -> None:
        """Checks an option that is a list of times.

        Raises:
            OptionError: If it is no list of numbers.
        """
        values = getattr(self, name)
        if not isinstance(values, (list, tuple)) or not all(type(t) in (int, float) for t in values):
            raise OptionError(f"{self.name}: {name}={values!r} is no list of numbers")

    @property
    def jumps(self) -> bool:
        """Whether the student's steps jump to x0, and take fresh noise."""
        return True

    def turns(self, step: int) -> tuple[str, ...]:
        """Returns the student, and the fake score as often as the ratio says."""
        return ("student", *[FAKE] * self.ratio)

    def rate(self, turn: str) -> float:
        """Returns the factor of the learning rate."""
        return self.fake_rate if turn == FAKE else 1.0

    def grid(self, steps: int) -> Grid:
        """Returns the grid that the student is trained on.

        Raises:
            OptionError: If it has another number of steps.
        """
        if steps != len(self.trained):
            raise OptionError(
                f"the student is trained at the times {self.trained.times}, and for no other number of "
                f"steps: not for {steps}"
            )
        return self.trained

    def place(self, turn: str, batch: Batch, count: int) -> int:
        """Returns a number in [0, count) that all samples of an update share, in all processes.

        It decides how often networks are called, which has to be the same everywhere.
        """
        return int(Draws(self.setup.seed, [batch.images], f"{turn}/place").integers(count))

    def noise(self, batch: Batch, count: int) -> tuple[Tensor, ...]:
        """Returns standard normal noise, each of shape (B, *), out of one draw."""
        return batch.draws.normal(count, *batch.x0.shape[1:]).unbind(1)

    def first(self, noise: Tensor) -> Tensor:
        """Returns the sample that the student begins with, with shape (B, *)."""
        return beginning(noise, self.trained.times[0], self.setup.host.path_kind == "flow")

    def ask(self, network: Denoiser, inputs: Inputs) -> Ask:
        """Returns a network with its conditions bound."""
        return lambda x_t, t: network(x_t, t, inputs)

    @torch.no_grad()
    def real(self, x_t: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        """Returns the guided teacher's x0, uncond + w (cond - uncond), with shape (B, *)."""
        x0 = self.setup.teacher(x_t, t, inputs).x0
        if self._blank is None:
            return x0
        if inputs.rows not in self._blanks:
            self._blanks[inputs.rows] = self._blank.take([0] * inputs.rows).to(x_t.device)
        uncond = self.setup.teacher(x_t, t, self._blanks[inputs.rows]).x0
        return uncond + self.scale * (x0 - uncond)

    def led(self, x_s: Tensor, s: float, t: Tensor, noise: Tensor) -> Tensor:
        """Returns a_{t|s} x_s + s_{t|s} noise, (B, *): samples at the time s, led to the times t (B)."""
        between = transition("flow", straight(torch.full_like(t, s)), straight(t))
        return broad(between.alpha, x_s) * x_s + broad(between.sigma, x_s) * noise

    def gradient(self, real: Tensor, fake: Tensor, sample: Tensor, s: float, t: Tensor) -> Tensor:
        """Returns the gradient (B, *) of what the student has made, by the chosen normalizer.

        Arguments:
            real: The teacher's x0 at the times t, with shape (B, *).
            fake: The fake score's x0, with shape (B, *).
            sample: The student's x0, with shape (B, *).
            s: The time of what the student has made.
            t: The times (B).
        """
        kl = self.normalizer == "kl"
        weight = kl_weight("flow", straight(torch.full_like(t, s)), straight(t)) if kl else None
        return matching_gradient(real, fake, sample, weight)

    def fake_turn(self, x_s: Tensor, s: float, t: Tensor, noise: Tensor, inputs: Inputs,
                  weight: str = "none", clamp: float = 10.0) -> Tensor:  # fmt: skip
        """Returns the fake score's loss, of shape (), on samples that the student has made.

        Arguments:
            x_s: The samples (B, *), at the time s.
            s: Their time on the straight path, 0 for clean samples.
            t: The times (B) to learn the score at, above s.
            noise: The noise (B, *) that leads there.
            inputs: Their conditions.
            weight: One of ``WEIGHTS``.
            clamp: Its bound.
        """
        low, high = straight(torch.full_like(t, s)), straight(t)
        between, x_s = transition("flow", low, high), x_s.detach()
        x0, eps = pseudo_pair("flow", x_s, noise, low, high)
        said = self._fake(self.led(x_s, s, t, noise), t, inputs)
        own = self.setup.host.units.level(*high)
        p, q = broad(own.p, x_s), broad(own.q, x_s)
        scale = torch.hypot(own.alpha, own.sigma) / torch.hypot(*high)  # the width is that of its own path
        unit = high.sigma / between.sigma * (own.q - own.p * high.sigma / high.alpha)
        weights = subinterval_weight(weight, scale * between.sigma, unit, clamp)
        return fake_loss(p * said.x0 + q * said.eps, p * x0 + q * eps, weights)

    def _copy_of_teacher(self, setup: Setup) -> Denoiser:
        network: Any = setup.teacher.network
        if setup.student.adapter is not None:
            name = setup.student.adapter.replace("student", FAKE)  # there may be several students
            copy_lora(network, setup.student.adapter, name)
            return Denoiser(network, setup.student.units, name)
        return Denoiser(copy.deepcopy(network).requires_grad_(True), setup.student.units)

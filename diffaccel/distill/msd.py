r"""Multi-student distillation: K students, each for a part of the conditions, and a route to them.

V_1, .., V_K divide the conditions. Student k is distilled as ever, but for its own conditions alone:

    G_k = distill(teacher, conditions in V_k),    k = 1 .. K;    a sample of y is by the G_k with y in V_k,

so that capacity grows K-fold and the time of a sample does not. The students learn nothing of each other.

References:
    Multi-student Diffusion Distillation for Better One-step Generators (2024), arXiv 2410.23274
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..options import option
from .adapters import copy_lora
from .data import Batch
from .denoiser import Denoiser
from .distribution_matching import FAKE
from .dmd2 import DMD2
from .grid import Grid
from .inversion import Velocity
from .matching import straight
from .method import Expert, Method, Setup
from .partition import Partition
from .premetrics import broad
from .shards import Condition

__all__ = ["MSD", "score_loss"]

SCORE, MATCHING, ADVERSARIAL = "score", "matching", "adversarial"
"""The stages: TSM, DM and ADM of the paper."""


@dataclass
class MSD(DMD2):
    """K students by distribution matching; with K = 1 the course is that of `DMD2`, bit for bit.

    The conditions of the matching loss, and the real samples of the discriminator, are those of the student's
    own part; the pairs of the regression loss are all pairs, which the paper found to keep modes. The
    teacher's unconditional branch is one for all. All durations are for one student: K cost K times as much.

    Three stages of the paper, by share of the training: students smaller than their teacher first learn its
    scores, once for all of them; then they are matched; then, with ``adversarial``, a discriminator is added.
    The smaller learning rate of the paper's last stage is not published; ``lr_decay`` makes it fall.

    Arguments:
        students: The number K.
        score_part: The share of the training in which a network learns the teacher's scores at all times,
            before it is copied K times; 0 for none, as for students with the teacher's weights.
        adversarial_part: The share of the training, at its end, with the discriminator.
    """

    name: ClassVar[str] = "msd"

    students: int = option(4, low=1)
    score_part: float = option(0.0, low=0.0, high=1.0)
    adversarial_part: float = option(1.0, low=0.0, high=1.0)

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.adversarial and self.adversarial_part < 1 and self.score_part + self.adversarial_part > 1:
            raise OptionError(
                f"score_part={self.score_part:g} and adversarial_part={self.adversarial_part:g} overlap"
            )

    def begin(self, setup: Setup) -> None:
        """Makes the students and their fake scores.

        Raises:
            OptionError: If the conditions cannot be divided, or adapters shall learn scores that they have.
        """
        Method.begin(self, setup)
        if self.score_part and setup.student.adapter is not None:
            raise OptionError("adapters have the teacher's scores already: set score_part=0")
        self.partition = self._partition(setup)
        """Who has which conditions; None for one student."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(DMD2)}
        self.jobs: list[DMD2] = []
        """The distillation of each student."""
        self.networks, self._places = {}, {}
        copies = [setup.student, *(_another(setup.student, place) for place in range(1, self.students))]
        for place, student in enumerate(copies):
            job = DMD2(**own)
            job.begin(dataclasses.replace(setup, student=student))
            self.jobs.append(job)
            for name, network in job.networks.items():
                turn = _turn(name, place)
                self.networks[turn], self._places[turn] = network, (place, name)
        self.helpers = frozenset(_turn(FAKE, place) for place in range(self.students))  # type: ignore[misc]
        self.stages = self._stages()
        """The stages of this run, in their order."""
        self._stage = self.stages[0]

    def _partition(self, setup: Setup) -> Partition | None:
        if self.students == 1:
            return None
        return Partition.of(setup.host, setup.conditions, self.students)

    def _stages(self) -> tuple[str, ...]:
        late = self.adversarial > 0 and self.adversarial_part > 0
        early = not late or self.score_part + self.adversarial_part < 1
        used = ((SCORE, self.score_part > 0), (MATCHING, early), (ADVERSARIAL, late))
        return tuple(stage for stage, has in used if has)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The numbers of images at which another stage begins."""
        images = self.setup.images
        ends = {SCORE: self.score_part, MATCHING: 1 - self.adversarial_part}
        return tuple(round(ends[stage] * images) for stage in self.stages[:-1])

    def enter(self, phase: int) -> None:
        """Begins a stage; after the first, all students are what one has become."""
        self._stage = self.stages[phase]
        for job in self.jobs:
            job.adversarial = self.adversarial if self._stage == ADVERSARIAL else 0.0
        if phase and self.stages[phase - 1] == SCORE:
            state = _bare(self.networks["student"]).state_dict()
            for job in self.jobs[1:]:
                _bare(job.setup.student).load_state_dict(state)

    def turns(self, step: int) -> tuple[str, ...]:
        """Returns the turns of all students, or the one of the network that learns scores."""
        if self._stage == SCORE:
            return ("student",)
        return tuple(_turn(name, place) for place, job in enumerate(self.jobs) for name in job.turns(step))

    def conditions(self, turn: str) -> tuple[Condition, ...] | None:
        """Returns the conditions of a student, or None for all."""
        if self.partition is None or self._stage == SCORE:
            return None
        return self.partition.parts[self._places[turn][0]]

    def rate(self, turn: str) -> float:
        """Returns the factor of the learning rate."""
        place, name = self._places[turn]
        return self.jobs[place].rate(name)

    def grid(self, steps: int) -> Grid:
        """Returns the grid, which all students are trained on."""
        return self.jobs[0].grid(steps)

    def loss(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        """Returns the terms of a turn, each the mean over the samples."""
        place, name = self._places[turn]
        if self._stage != SCORE:
            return self.jobs[place].loss(name, batch)
        t = self.jobs[0].law.between(0, 1, batch.draws.uniform())
        noise = batch.draws.normal(*batch.x0.shape[1:])
        own, teacher = (
            self.velocity(network, batch.inputs) for network in (self.networks[turn], self.setup.teacher)
        )
        return {"score": score_loss(own, teacher, batch.x0, noise, t).mean()}

    def experts(self) -> tuple[Expert, ...]:
        """Returns the students, each with its conditions."""
        parts = (None,) if self.partition is None else self.partition.parts
        return tuple(Expert(job.setup.student, 0.0, own) for job, own in zip(self.jobs, parts, strict=True))

    @property
    def router(self) -> Any:
        """The rule that knows the student of a condition."""
        return None if self.partition is None else self.partition.router


def score_loss(student: Velocity, teacher: Velocity, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Returns the mean square of the difference of velocities at x_t, (B): teacher score matching.

    That of x0, which the paper writes, is t^2 times as much; its weights lambda_t are not published.

    Arguments:
        student: The student's velocity field.
        teacher: The teacher's, without guidance, to which no gradient goes.
        x0: Samples (B, *).
        noise: Standard normal noise (B, *).
        t: Times (B), in (0, 1].
    """
    level = straight(t)
    x_t = broad(level.alpha, x0) * x0 + broad(level.sigma, x0) * noise
    with torch.no_grad():
        target = teacher(x_t, t)
    return (student(x_t, t) - target).square().flatten(1).mean(1)


def _turn(name: str, place: int) -> str:
    return f"{name}_{place + 1}" if place else name


def _bare(denoiser: Denoiser) -> nn.Module:
    network: nn.Module = getattr(denoiser.network, "module", denoiser.network)
    return network


def _another(student: Denoiser, place: int) -> Denoiser:
    """Returns a student with the same first weights, or another adapter of the same network."""
    if student.adapter is None:
        return Denoiser(copy.deepcopy(student.network), student.units)
    network: Any = student.network
    name = _turn(student.adapter, place)
    copy_lora(network, student.adapter, name)
    return Denoiser(network, student.units, name)

"""Phased DMD: experts for ranges of noise, each matched to the teacher at the end of its range."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from ..options import option
from .adapters import reset_lora
from .data import Batch
from .denoiser import Denoiser
from .distribution_matching import FAKE, DistributionMatching
from .matching import WEIGHTS, surrogate
from .method import Expert, Setup
from .walk import move, times_like, walk

__all__ = ["PhasedDMD", "phases_of"]

_NEAR = 1 / 256
"""The relative distance below which rounding may decide on which side of a boundary a time lies."""


@dataclass
class PhasedDMD(DistributionMatching):
    """Distribution matching in phases along the noise: each makes one expert, for some of the steps.

    The expert of a phase begins as the teacher; those before it are frozen, and make what it begins with, as
    in use. It goes on to the time s at which the next one begins, 0 for the last, and is judged there: what
    it has made is led to more noise, where the fake score, again the teacher at first, and the teacher are
    compared. With Euler's steps what it makes is no noised x0, and the fake score learns from pseudo pairs;
    steps that take fresh noise need none of that: x0 is judged as by DMD2, at times above s.

    Within a phase of several steps the gradient goes through one of them, drawn once for all samples, from
    which the student jumps to s; the fake score is trained on the same. Models with a table of betas are
    asked at broken timesteps too. In the first of K phases the student is its expert alone, at all times.

    Arguments:
        phases: The number K of experts.
        switches: The K - 1 falling times, between those of the student's steps, down to which an expert is
            called; none for equal numbers of steps.
        transition: The student's steps: "euler" or "fresh", which is also how it has to be sampled.
        interval: The times of scores: from s to pure noise, "nested", or to where the expert begins,
            "disjoint".
        margin: The least distance of these times from s, as a part of the network's range.
        weight: The weight of the fake score's loss: "clamp", "eps" or "none", see `subinterval_weight`. At
            s = 0 the first one weighs times of little noise less, unlike plain DMD.
        clamp: The bound of "clamp"; .inf for none.

    References:
        | Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals
          (2025), arXiv 2510.27684
        | Learning Few-Step Diffusion Models by Trajectory Distribution Matching (2025), arXiv 2503.06674, for
          disjoint intervals
    """

    name: ClassVar[str] = "phased-dmd"

    phases: int = option(2, low=1)
    switches: Sequence[float] = field(default=())
    transition: str = option("euler", choices=("euler", "fresh"))
    interval: str = option("nested", choices=("nested", "disjoint"))
    margin: float = option(0.02, low=1e-3, high=1.0)
    weight: str = option("clamp", choices=WEIGHTS)
    clamp: float = option(10.0, low=1e-6)

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        self.check_times("switches")

    def begin(self, setup: Setup) -> None:
        """Makes the networks, and divides the steps among the phases.

        Raises:
            OptionError: If the student cannot begin as the teacher, or the phases do not fit the grid.
        """
        super().begin(setup)
        own, teacher = ({key: value.shape for key, value in denoiser.network.state_dict().items()}
                        for denoiser in (setup.student, setup.teacher))  # fmt: skip
        if own != teacher:
            raise OptionError("each phase begins with the teacher's weights: set student=teacher")
        self.spans, self.limits = phases_of(self.trained.times, self.phases, self.switches)
        """The steps of each phase, and the times down to which its expert is called."""
        self.ends = [self.trained.times[span.stop] for span in self.spans[:-1]] + [0.0]
        """The times s to which the experts go."""
        self.phase = 0
        self.parts = [self._parts_of(phase) for phase in range(self.phases)]
        """For each phase and turn, the parts of the network's range between which scores are looked at."""
        for phase, parts in enumerate(self.parts):
            low, high = parts["student"]
            if low >= high:
                raise OptionError(
                    f"phase {phase + 1} has no times for scores: from {low:.3g} to {high:.3g} of the range; "
                    "expected less margin, or other times"
                )

    @property
    def jumps(self) -> bool:
        """Whether steps take fresh noise."""
        return self.transition == "fresh"

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The images after which another phase begins; all have the same number."""
        return tuple(round(self.setup.images * k / self.phases) for k in range(1, self.phases))

    def enter(self, phase: int) -> None:
        """Freezes the expert of the phase before, and has student and fake score begin as the teacher."""
        self.phase = phase
        if phase:
            self.snapshot(f"expert-{phase}")
            for denoiser in self.networks.values():
                self._restart(denoiser)

    def experts(self) -> tuple[Expert, ...]:
        """Returns the frozen experts and the one in training, which makes all of the steps that are left."""
        done = zip(self.frozen.values(), self.limits, strict=False)
        return (*(Expert(denoiser, limit) for denoiser, limit in done), Expert(self.networks["student"]))

    def loss(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        """Returns the term of a turn, the mean over the samples."""
        span, s, inputs = self.spans[self.phase], self.ends[self.phase], batch.inputs
        step = span[self.place(turn, batch, len(span))]
        first, *fresh, noise = self.noise(batch, step + 2 if self.jumps else 2)
        networks = [self.ask(self._expert(n), inputs) for n in range(step)]
        x = walk(networks, self.first(first), self.trained.times[: step + 1], fresh)
        t = self.law.between(*self.parts[self.phase][turn], batch.draws.uniform())
        now, to = times_like(self.trained.times[step], x), 0.0 if self.jumps else s
        if turn == FAKE:
            with torch.no_grad():
                x_s = move(self.setup.student(x, now, inputs), to, None)
            return {"denoising": self.fake_turn(x_s, to, t, noise, inputs, self.weight, self.clamp)}
        said = self.setup.student(x, now, inputs)
        x_s = move(said, to, None)
        x_t = self.led(x_s.detach(), to, t, noise)
        with torch.no_grad():
            fake = self._fake(x_t, t, inputs).x0
        gradient = self.gradient(self.real(x_t, t, inputs), fake, said.x0.detach(), to, t)
        return {"matching": surrogate(gradient, x_s)}

    def _parts_of(self, phase: int) -> dict[str, tuple[float, float]]:
        s, begins = self.ends[phase], self.trained.times[self.spans[phase].start]
        high = self.law.part(begins) if self.interval == "disjoint" and phase else 1.0
        low = self.law.part(s) + self.margin if s else 0.0
        return {FAKE: (low, high), "student": (max(low, self.earliest), min(high, self.latest))}

    def _expert(self, step: int) -> Denoiser:
        """Returns the network that makes a step of the grid."""
        phase = next(n for n, span in enumerate(self.spans) if step in span)
        return self.networks["student"] if phase == self.phase else self.frozen[f"expert-{phase + 1}"]

    def _restart(self, denoiser: Denoiser) -> None:
        network: Any = getattr(denoiser.network, "module", denoiser.network)
        if denoiser.adapter is not None:
            reset_lora(network, denoiser.adapter)
        else:
            network.load_state_dict(self.setup.teacher.network.state_dict())


def phases_of(
    times: Sequence[float], phases: int, switches: Sequence[float]
) -> tuple[list[range], list[float]]:
    """Returns the steps of each phase, and the times down to which its expert is called, the last one 0.

    Arguments:
        times: The falling times of the student's steps.
        phases: The number of phases.
        switches: The times between the phases, one less; none for equal numbers of steps.

    Raises:
        OptionError: If the switches do not fall between 1 and 0, one is so near to a step that rounding
            decides which expert makes it, or a phase has no step.
    """
    count = len(times)
    if phases > count:
        raise OptionError(f"{phases} phases of {count} steps; expected a step for each")
    if not switches:
        starts = [-(-count * k // phases) for k in range(1, phases)]
        limits = [(times[start - 1] + times[start]) / 2 for start in starts]
    else:
        limits = [float(switch) for switch in switches]
        starts = _starts(times, phases, limits)
    return [range(a, b) for a, b in itertools.pairwise([0, *starts, count])], [*limits, 0.0]


def _starts(times: Sequence[float], phases: int, limits: list[float]) -> list[int]:
    """Returns the first step of each phase but the first."""
    if len(limits) != phases - 1:
        raise OptionError(f"{phases} phases with the switches {limits}; expected {phases - 1}")
    if not all(a > b for a, b in itertools.pairwise([1.0, *limits, 0.0])):
        raise OptionError(f"the switches {limits} are not in order; expected falling ones between 1 and 0")
    for limit, time in itertools.product(limits, times):
        if math.isclose(limit, time, rel_tol=_NEAR):
            raise OptionError(
                f"the switch {limit:g} is at the step {time:g}, where rounding decides which expert makes "
                f"it; expected one between the steps {[round(t, 6) for t in times]}"
            )
    starts = [sum(time > limit for time in times) for limit in limits]
    if not all(a < b for a, b in itertools.pairwise([0, *starts, len(times)])):
        raise OptionError(
            f"the switches {limits} overlap: a phase has none of the steps {[round(t, 6) for t in times]}"
        )
    return starts

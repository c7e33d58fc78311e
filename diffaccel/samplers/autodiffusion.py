"""AutoDiffusion: the search for timesteps, and for layers that are left out at some of them.

A budget bounds the work of all steps together, so that thinner networks make room for more steps. Work is
counted in floating-point operations, which a layer's share of the denoiser's is measured for, where the
publication counts layers. The first third of the search changes timesteps only; then the allowed part of
dropped layers grows. What the publication looks at besides, FID, is an option of the objective.

References:
    | AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model
    | Acceleration (2023), https://arxiv.org/abs/2309.10438
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import OptionError, UnsupportedPipeline
from ..eval.cost import flops_by_module
from ..pipelines.layers import SKIP_PATH, residual_layers
from ..pipelines.run import denoisers_of
from ..search import Choices, Space
from .family import solver_of
from .grids import GRIDS, grid
from .objective import Objective
from .paths import TrainingPath
from .presets import SOLVERS, solver_schedule
from .schedule import ScheduleError
from .searching import PipelineSearch
from .thinning import ThinnedSchedule

__all__ = ["LayerSearch", "ThinningSpace", "layer_shares"]

RATE = 0.25
"""The chance of each timestep, and of each step's layers, to change."""
EARLIEST = 0.85
"""The least first timestep: the sampler starts from pure noise, of which an earlier node knows too little."""
SPACING = 1e-3
"""The least distance of two timesteps, in parts of all."""

Steps = list[tuple[float, tuple[str, ...]]]
"""Timesteps in parts of the noisiest, falling, and the layers that are dropped there."""


def layer_shares(objective: Objective) -> dict[str, float]:
    """Returns what part of the denoiser's floating-point operations the body of each residual layer has.

    A layer without any, such as one that is not called, is not among them.

    Raises:
        UnsupportedPipeline: If the denoiser's layers are not known.
    """
    network = next(iter(denoisers_of(objective.pipe).values()))
    layers = residual_layers(network)
    if not layers:
        raise UnsupportedPipeline(f"{type(network).__name__} has no layers that are known to be residual")
    counts = flops_by_module(lambda: objective.sampler(2, 1, 0, 1))
    root = type(getattr(network, "_orig_mod", network)).__name__

    def body(name: str) -> int:
        kept = [counts.get(f"{root}.{name}.{part}", 0) for part in SKIP_PATH]
        return counts.get(f"{root}.{name}", 0) - sum(kept)

    return {name: body(name) / counts[root] for name in layers if body(name) > 0}


class ThinningSpace(Space[ThinnedSchedule]):
    """Timesteps and dropped layers for one model, within a budget.

    Arguments:
        path: The model's path.
        budget: The work of all steps together, in evaluations of the whole network; at least 2.
        shares: The part of the network's work of each layer that can be dropped.
        solver: What goes from node to node, one of ``presets.SOLVERS``.
        allowed: The largest part of the layers that may be dropped at a step; the search raises it.
        earliest: The least first timestep, in parts of the noisiest.
    """

    def __init__(self, path: TrainingPath, budget: int, shares: Mapping[str, float], solver: str = "dpm++2m",
                 allowed: float = 0.0, earliest: float = EARLIEST) -> None:  # fmt: skip
        if budget < 2:
            raise OptionError(f"a search needs at least 2 evaluations, not {budget}")
        self.path, self.budget, self.shares = path, budget, dict(shares)
        self.solver, self.allowed, self.earliest = solver, allowed, earliest
        self.layers = sorted(self.shares)

    def cost(self, candidate: ThinnedSchedule) -> float:
        """Returns the work of all steps, in evaluations of the whole network."""
        return sum(self._cost(names) for names in candidate.dropped)

    def _cost(self, names: tuple[str, ...]) -> float:
        return 1 - sum(self.shares[name] for name in names)

    def seeds(self) -> list[ThinnedSchedule]:
        """Returns the known grids with the whole network at each step."""
        nothing: tuple[tuple[str, ...], ...] = ((),) * self.budget
        grids = [grid(name, self.budget, self.path) for name in GRIDS]
        return [ThinnedSchedule(solver_schedule(self.solver, sigmas), nothing) for sigmas in grids]

    def mutate(self, candidate: ThinnedSchedule, rng: random.Random) -> ThinnedSchedule:
        """Returns a schedule with some timesteps moved or replaced, and other layers at some steps."""
        steps, changed = self._steps(candidate), list[tuple[float, tuple[str, ...]]]()
        ends = [1.0, *(time for time, _ in steps), 0.0]
        for place, (time, names) in enumerate(steps):
            if rng.random() < RATE:
                near = time + rng.gauss(0, 0.25) * (ends[place] - ends[place + 2])
                time = rng.random() if rng.random() < 0.2 else near
            if self.allowed and rng.random() < RATE:
                names = self._some(rng)
            changed.append((time, names))
        return self._legal(changed, rng)

    def _some(self, rng: random.Random) -> tuple[str, ...]:
        """Returns some layers, a part of all that is drawn, too."""
        count = round(rng.uniform(0, self.allowed) * len(self.layers))
        return tuple(rng.sample(self.layers, count))

    def cross(self, first: ThinnedSchedule, second: ThinnedSchedule, rng: random.Random) -> ThinnedSchedule:
        """Returns steps of either, each with its layers; the longer one supplies the rest."""
        short, long = sorted((self._steps(first), self._steps(second)), key=len)
        mixed = [rng.choice(pair) for pair in zip(short, long, strict=False)]
        return self._legal([*mixed, *long[len(short) :]], rng)

    def choose(self, choices: Choices) -> ThinnedSchedule:
        """Returns one of the seeds, its timesteps moved and layers dropped one by one."""
        seeds = self.seeds()
        steps: Steps = []
        for place, (time, _) in enumerate(self._steps(seeds[choices.choice("seed", len(seeds))])):
            moved = time + choices.number(f"move {place}", -1, 1) / self.budget
            dropped = [name for name in self.layers if self.allowed
                       and choices.number(f"{name} at {place}", 0, 1) > 1 - self.allowed]  # fmt: skip
            steps.append((moved, tuple(dropped)))
        return self._legal(steps, random.Random(0))

    def _steps(self, candidate: ThinnedSchedule) -> Steps:
        times = [self.path.time(sigma) / self.path.last_time for sigma in candidate.schedule.sigmas[:-1]]
        return list(zip(times, candidate.dropped, strict=True))

    def _legal(self, steps: Steps, rng: random.Random) -> ThinnedSchedule:
        """Returns a schedule out of steps: different timesteps, within the budget, an early enough first."""
        low = self.path.first_time / self.path.last_time
        ordered = sorted(((min(max(time, low), 1.0), names) for time, names in steps), reverse=True)
        kept = [(max(ordered[0][0], self.earliest), ordered[0][1])]
        for time, names in ordered[1:]:
            if kept[-1][0] - time > SPACING:
                kept.append((time, names))
        while sum(self._cost(names) for _, names in kept) > self.budget + 1e-9:
            del kept[rng.randrange(1, len(kept))]
        spent = sum(self._cost(names) for _, names in kept)
        while len(kept) < 2 or spent + 1 <= self.budget + 1e-9:
            gap, place = max((a[0] - b[0], n) for n, (a, b) in
                             enumerate(zip(kept, [*kept[1:], (low, ())], strict=True)))  # fmt: skip
            if gap < 4 * SPACING:
                break
            kept.insert(place + 1, (kept[place][0] - gap * rng.uniform(0.3, 0.7), ()))
            spent += 1
        sigmas = [self.path.ratio(time * self.path.last_time) for time, _ in kept]
        schedule = solver_schedule(self.solver, (min(sigmas[0], self.path.noisiest), *sigmas[1:], 0.0))
        return ThinnedSchedule(schedule, tuple(names for _, names in kept))

    def encode(self, candidate: ThinnedSchedule) -> list[float]:
        """Returns timesteps and the work of each step, padded to twice the budget, and the work of layers."""
        count = 2 * self.budget
        steps = self._steps(candidate)[:count]
        times = [time for time, _ in steps] + [0.0] * (count - len(steps))
        costs = [self._cost(names) for _, names in steps] + [0.0] * (count - len(steps))
        uses = [sum(name in names for _, names in steps) / len(steps) for name in self.layers]
        return [*times, *costs, len(steps) / self.budget, *uses]

    def to_plain(self, candidate: ThinnedSchedule) -> Any:
        """Returns a schedule as plain data."""
        return candidate.to_dict()

    def from_plain(self, data: Any) -> ThinnedSchedule:
        """Returns a schedule from plain data.

        Raises:
            ScheduleError: If it is none, or one of other layers.
        """
        thinned = ThinnedSchedule.from_dict(data)
        if unknown := {name for names in thinned.dropped for name in names} - set(self.shares):
            raise ScheduleError(f"the denoiser has no layer {min(unknown)!r} that can be left out")
        return thinned


@dataclass
class LayerSearch(PipelineSearch[ThinnedSchedule, ThinningSpace]):
    """One search of AutoDiffusion; its other arguments are those of `PipelineSearch`.

    Arguments:
        max_drop: The largest part of the layers that is dropped at a step; 0 searches timesteps only.
        solver: What goes from node to node, one of ``presets.SOLVERS``.
    """

    RECORDED: ClassVar[tuple[str, ...]] = (*PipelineSearch.RECORDED, "max_drop", "solver")

    max_drop: float = 0.3
    solver: str = "dpm++2m"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            OptionError: If a number makes no sense, a library is missing, or the solver is unknown.
        """
        super().__post_init__()
        if not 0 <= self.max_drop < 1:
            raise OptionError(f"max_drop is {self.max_drop}; expected a part from 0 to less than 1")
        if self.solver not in SOLVERS:
            raise OptionError(f"no solver {self.solver!r}; known: {', '.join(SOLVERS)}")

    def make_space(self) -> ThinningSpace:
        """Returns the schedules of this budget."""
        shares = layer_shares(self.objective(0)) if self.max_drop else {}
        return ThinningSpace(solver_of(self.pipe.scheduler).path, self.evaluations, shares, self.solver)

    def prepare(self) -> None:
        """Raises the allowed part of dropped layers from the first third of the search to the second."""
        progress = 3 * len(self.candidates.scored) / self.budget - 1
        self.space.allowed = self.max_drop * min(max(progress, 0.0), 1.0)

    def known(self) -> dict[str, ThinnedSchedule]:
        """Returns the solver on the grid that was best in the search."""
        return {self.solver: self.best_of(self.space.seeds())}

    def with_facts(self, winner: ThinnedSchedule, facts: dict[str, Any]) -> ThinnedSchedule:
        """Returns the schedule with the report in its facts, its work among them."""
        return replace(winner, facts={**facts, "cost": self.space.cost(winner)})

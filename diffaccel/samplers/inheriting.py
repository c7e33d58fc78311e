"""The search for what inherits at which step, within the work of a number of evaluations.

A candidate has a set of modules for each solver update. In a U-Net sets are those inside of a number of outer
layers or blocks; in a transformer they are any of the blocks. Work is counted in floating-point operations.
The score is the distance to what the same solver makes with the whole network at each update.

References:
    | A-SDM: Accelerating Stable Diffusion through Model Assembly and Feature Inheritance Strategies
    | (2024), https://arxiv.org/abs/2406.00210
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..errors import OptionError, UnsupportedPipeline
from ..eval.cost import flops_by_module
from ..pipelines import Inherit, Inheritance, attached
from ..pipelines.inheritance import computed_steps
from ..pipelines.levels import Parts, parts_of
from ..pipelines.run import denoisers_of
from ..search import Choices, Space
from .objective import Objective
from .searching import PipelineSearch

__all__ = ["InheritanceSearch", "InheritanceSpace", "set_costs"]

RATE = 0.15
"""The chance of each update to change."""
TRIAL_STEPS = 4
"""The inference steps of a run that costs are counted in."""
SHAPES = ((1.0, 0.0), (1.4, 0.25), (1.4, 0.5))
"""Powers and centers of the patterns that a search begins with, see `computed_steps`."""

Names = tuple[str, ...]


class InheritanceSpace(Space[Inheritance]):
    """What inherits at which of a fixed number of updates, within a budget.

    Arguments:
        updates: The number of solver updates T.
        budget: The work of all updates together, in evaluations of the whole network.
        menu: Sets of modules to choose from.
        costs: The work that is left of an evaluation if a set of modules inherits: for each of the menu, or
            for each module alone, which are added up then.

    Raises:
        OptionError: If the budget is too small for any pattern, or leaves nothing to inherit.
    """

    def __init__(
        self, updates: int, budget: float, menu: Sequence[Names], costs: Mapping[Names, float]
    ) -> None:
        self.updates, self.budget = updates, budget
        self.costs = {tuple(sorted(names)): cost for names, cost in costs.items()}
        sets = {tuple(sorted(names)) for names in menu}
        self.menu = sorted(sets, key=lambda names: (self._cost(names), names))
        alone = {name for names in sets for name in names}
        self.atoms = sorted(alone) if all((name,) in self.costs for name in alone) else []
        """The modules that can inherit one by one."""
        least = 1 + (updates - 1) * self._cost(self.menu[0])
        if not least <= budget < updates:
            raise OptionError(
                f"{updates} updates can be the work of {least:.2f} to {updates} evaluations, not of {budget}"
            )

    def _cost(self, names: Names) -> float:
        if not names or names in self.costs:
            return self.costs.get(names, 1.0)
        return 1 - sum(1 - self.costs[(name,)] for name in names)

    def cost(self, candidate: Inheritance) -> float:
        """Returns the work of all updates, in evaluations of the whole network."""
        return sum(map(self._cost, candidate.inherited))

    def seeds(self) -> list[Inheritance]:
        """Returns uniform and centered patterns: for each set those with the most full updates."""
        found: list[Inheritance] = []
        for names in self.menu:
            for warmup in (1, 3):
                for power, center in SHAPES:
                    if (pattern := self._densest(names, warmup, power, center)) is not None:
                        found += [pattern, replace(pattern, order=1)]
        return list(dict.fromkeys(found))

    def _densest(self, names: Names, warmup: int, power: float, center: float) -> Inheritance | None:
        begin = warmup - 1
        for every in range(2, self.updates):
            steps = computed_steps(max(self.updates - begin, 1), every, power, center)
            full = {*range(warmup), *(begin + step for step in steps)}
            pattern = Inheritance(tuple(() if n in full else names for n in range(self.updates)))
            if self.cost(pattern) <= self.budget:
                return pattern
        return None

    def mutate(self, candidate: Inheritance, rng: random.Random) -> Inheritance:
        """Returns a pattern in which other modules inherit at some updates."""
        sets = list(candidate.inherited)
        for step in range(1, self.updates):
            if rng.random() < RATE:
                sets[step] = self._changed(sets, step, rng)
        order = candidate.order ^ (rng.random() < RATE)
        return self._legal(sets, order, rng)

    def _changed(self, sets: Sequence[Names], step: int, rng: random.Random) -> Names:
        kind = rng.random()
        if self.atoms and kind < 0.4:
            return tuple(sorted({*sets[step]} ^ {rng.choice(self.atoms)}))
        if kind < 0.6:
            return rng.choice(self.menu)
        return () if kind < 0.8 else sets[max(1, min(step + rng.choice((-1, 1)), self.updates - 1))]

    def cross(self, first: Inheritance, second: Inheritance, rng: random.Random) -> Inheritance:
        """Returns a pattern with the modules of either at each update."""
        sets = [rng.choice(pair) for pair in zip(first.inherited, second.inherited, strict=True)]
        return self._legal(sets, rng.choice((first, second)).order, rng)

    def choose(self, choices: Choices) -> Inheritance:
        """Returns one of the seeds, with other sets of modules at some updates."""
        seeds = self.seeds()
        seed = seeds[choices.choice("seed", len(seeds))]
        sets = list(seed.inherited)
        for step in range(1, self.updates):
            chosen = choices.choice(f"update {step}", len(self.menu) + 2)
            sets[step] = [sets[step], (), *self.menu][chosen]
        return self._legal(sets, seed.order, random.Random(0))

    def _legal(self, sets: Sequence[Names], order: int, rng: random.Random) -> Inheritance:
        """Returns a pattern within the budget, that uses all of it but for less than a full update."""
        sets, cheapest = [(), *sets[1:]], self.menu[0]
        costs = [self._cost(names) for names in sets]

        def put(step: int, names: Names) -> None:
            sets[step], costs[step] = names, self._cost(names)

        while sum(costs) > self.budget + 1e-9:
            step = rng.choice([n for n in range(1, self.updates) if costs[n] > self._cost(cheapest) + 1e-9])
            cheaper = [names for names in self.menu if self._cost(names) < costs[step] - 1e-9]
            put(step, rng.choice(cheaper))
        while fitting := [n for n in range(1, self.updates)
                          if sets[n] and sum(costs) + 1 - costs[n] <= self.budget + 1e-9]:  # fmt: skip
            put(rng.choice(fitting), ())
        return Inheritance(tuple(sets), int(order))

    def encode(self, candidate: Inheritance) -> list[float]:
        """Returns the work of each update, the updates since the last full one, the order, and uses."""
        ages, age = [], 0
        for names in candidate.inherited:
            age = age + 1 if names else 0
            ages.append(age / 4)
        uses = [sum(name in names for names in candidate.inherited) / self.updates for name in self.atoms]
        return [*map(self._cost, candidate.inherited), *ages, float(candidate.order), *uses]

    def to_plain(self, candidate: Inheritance) -> Any:
        """Returns a pattern as plain data."""
        return candidate.to_dict()

    def from_plain(self, data: Any) -> Inheritance:
        """Returns a pattern from plain data.

        Raises:
            ModelError: If it is none.
        """
        return Inheritance.from_dict(data)


class SameSolver(Objective):
    """The score of a pattern's images; the fine solution is the same solver's with the whole network."""

    def fine(self) -> Tensor:
        """Returns the images of the whole network."""
        return self.sampler(None, self.batch)

    def __call__(self, candidate: Any) -> float:
        """Returns the score of a pattern's images; infinite if they are not finite."""
        with attached(self.pipe, Inherit.of(candidate)):
            return self.scored(self.sampler(None, self.batch))


def set_costs(objective: Objective, parts: Parts, sets: Sequence[Names]) -> dict[Names, float]:
    """Returns the work that is left of an evaluation if modules inherit, as a part of the whole.

    Arguments:
        objective: What has the pipeline and its conditions.
        parts: The modules of its denoiser.
        sets: The sets of modules; in a transformer, each module of theirs is measured alone.
    """
    pipe = objective.pipe
    network = next(iter(denoisers_of(pipe).values()))
    root = type(getattr(network, "_orig_mod", network)).__name__

    def run(accelerator: Any) -> tuple[dict[str, int], Any]:
        with attached(pipe, accelerator):
            return flops_by_module(lambda: objective.sampler(TRIAL_STEPS, 1, 0, 1)), pipe.accel.report

    whole, report = run(Inherit(every=1))
    if parts.changes:
        names = sorted({name for names in sets for name in names})
        return {(name,): 1 - whole.get(f"{root}.{name}", 0) / whole[root] for name in names}
    found = {}
    for same in sets:
        part, own = run(Inherit.of(Inheritance(((), *[same] * (report.updates - 1)))))
        inheriting = sum(action.network not in own.auxiliary for action in own.actions)
        found[tuple(sorted(same))] = 1 - (1 - part[root] / whole[root]) * report.requested / inheriting
    return found


@dataclass
class InheritanceSearch(PipelineSearch[Inheritance, InheritanceSpace]):
    """One search; its other arguments are those of `PipelineSearch`, evaluations being the budget.

    Arguments:
        steps: The number of inference steps.
        level: What inherits: "block" or "layer".
    """

    RECORDED: ClassVar[tuple[str, ...]] = (*PipelineSearch.RECORDED, "steps", "level")

    steps: int = 20
    level: str = "layer"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            OptionError: If a number makes no sense, a library is missing, or the level is unknown.
        """
        super().__post_init__()
        if self.level not in ("block", "layer"):
            raise OptionError(f"a search has no level {self.level!r}; known: block, layer")

    def make_objective(self, conditions: Sequence[str], seed: int, count: int) -> Objective:
        """Returns the objective on some conditions and noise."""
        return SameSolver(
            self.pipe, conditions, self.guidance, seed, count, self.at_once, self.steps, self.score
        )

    def make_space(self) -> InheritanceSpace:
        """Returns the patterns of this budget.

        Raises:
            UnsupportedPipeline: If the denoiser is not known.
        """
        if reason := Inherit(level=self.level).check(self.pipe):
            raise UnsupportedPipeline(f"inherit cannot accelerate this {type(self.pipe).__name__}: {reason}")
        parts = parts_of(next(iter(denoisers_of(self.pipe).values())))
        assert parts is not None
        least, count = (0 if parts.changes else 1), len(parts.stages[self.level])
        menu = [parts.inside(self.level, outer) for outer in range(least, count)]
        objective = self.objective(0)
        with attached(self.pipe, Inherit(every=1)):
            objective.sampler(self.steps, 1, 0, 1)
            updates = self.pipe.accel.report.updates
        return InheritanceSpace(updates, self.evaluations, menu, set_costs(objective, parts, menu))

    def known(self) -> dict[str, Inheritance]:
        """Returns the uniform or centered pattern that was best in the search."""
        return {"the best pattern of a few numbers": self.best_of(self.space.seeds())}

    def with_facts(self, winner: Inheritance, facts: dict[str, Any]) -> Inheritance:
        """Returns the pattern with the report in its facts, its work among them."""
        solver = type(self.pipe.scheduler).__name__
        return replace(winner, facts={**facts, "cost": self.space.cost(winner), "scheduler": solver})

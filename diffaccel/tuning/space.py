"""The candidates for a pipeline: every accelerator that has ``trials`` and serves it, at all step counts."""

import itertools
import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import DiffaccelError
from ..pipelines.accelerator import Accelerator, registry
from ..search import Choices, Space
from .candidate import KINDS, Candidate, Gene

__all__ = ["CandidateSpace"]

FEWEST = 4
"""The least number of steps that is tried, but for accelerators of fewer."""
RATIO = 0.84
"""Each number of steps over the next larger one."""
SPREAD = 4
"""The seeds of an accelerator, evenly spread over its values."""


class CandidateSpace(Space[Candidate]):
    """Stacks and steps for one pipeline.

    Arguments:
        pipe: The pipeline, plain.
        steps: The steps of the plain run, which no candidate exceeds.
    """

    def __init__(self, pipe: Any, steps: int) -> None:
        self.steps = steps
        self.ladder = _ladder(steps)
        self.counts: dict[Gene, tuple[int, ...]] = {}
        self.axes: dict[str, Mapping[str, Any]] = {}
        self.genes: dict[str, list[Gene]] = {kind: [] for kind in KINDS}
        for name, cls in registry().items():
            if cls.trials and cls.exclusive in KINDS:
                self._enter(name, cls, pipe)

    def _enter(self, name: str, cls: type[Accelerator], pipe: Any) -> None:
        """Enters an accelerator with those of its values that serve the pipeline."""
        for values in itertools.product(*cls.trials.values()):
            options = dict(zip(cls.trials, values, strict=True))
            try:
                accelerator = cls.create(**options)
                served = not accelerator.check(pipe)
                counts = tuple(accelerator.step_counts(pipe)) if served else ()
            except DiffaccelError:
                served, counts = False, ()
            if served and (not counts or min(counts) <= self.steps):
                gene = Gene(name, tuple(options.items()))
                self.counts[gene] = tuple(count for count in counts if count <= self.steps)
                self.genes[cls.exclusive].append(gene)
                self.axes[name] = cls.trials

    def seeds(self) -> list[Candidate]:
        """Returns what is known to be good: each accelerator by itself, plain fewer steps, and some pairs."""
        found = [Candidate(self.steps, (gene,)) for gene in self._some("skip")]
        many, *fewer = _spread(self.ladder[1:], SPREAD)
        found += [Candidate(count) for count in (many, *fewer)]
        for gene in self.genes["solver"]:
            counts = self.counts[gene] or (tuple(fewer[:1]) if self._is_first(gene) else ())
            found += [Candidate(count, (gene,)) for count in counts]
        free = [gene for gene in self.genes["solver"] if not self.counts[gene]]
        for skip in self._some("skip", 1):
            found += [Candidate(many, genes) for genes in ((skip,), *((gene, skip) for gene in free[:1]))]
        return [self._legal(candidate.steps, candidate.genes) for candidate in found]

    def _some(self, kind: str, count: int = SPREAD) -> list[Gene]:
        """Returns the accelerators of a kind, each with some values."""
        groups = itertools.groupby(self.genes[kind], key=lambda gene: gene.name)
        return [gene for _, genes in groups for gene in _spread(list(genes), count)]

    def _is_first(self, gene: Gene) -> bool:
        """Whether all options but the first have their first value."""
        axes = self.axes[gene.name]
        return all(value == axes[name][0] for name, value in gene.options[1:])

    def mutate(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """Returns a candidate with another value, another number of steps, or another accelerator."""
        steps, genes = candidate.steps, {gene.kind: gene for gene in candidate.genes}
        draw = rng.random()
        if draw < 0.4 and genes:
            kind = rng.choice(sorted(genes))
            genes[kind] = self._neighbor(genes[kind], rng)
        elif draw < 0.75:
            steps = self._rung(steps, rng.choice((-2, -1, -1, 1, 1, 2)))
        else:
            kind = rng.choice([kind for kind in KINDS if self.genes[kind]] or [KINDS[0]])
            genes.pop(kind, None)
            if self.genes[kind] and rng.random() < 0.7:
                genes[kind] = rng.choice(self.genes[kind])
        return self._legal(steps, genes.values())

    def _neighbor(self, gene: Gene, rng: random.Random) -> Gene:
        """Returns the accelerator with one option changed, usually to the value beside."""
        options, axes = dict(gene.options), self.axes[gene.name]
        name = rng.choice([name for name in axes if len(axes[name]) > 1] or list(axes))
        place = axes[name].index(options[name]) + rng.choice((-2, -1, -1, 1, 1, 2))
        options[name] = axes[name][min(max(place, 0), len(axes[name]) - 1)]
        changed = Gene(gene.name, tuple(options.items()))
        return changed if changed in self.counts else gene

    def _rung(self, steps: int, move: int) -> int:
        """Returns a number of steps some places further in the ladder."""
        nearest = min(range(len(self.ladder)), key=lambda place: abs(self.ladder[place] - steps))
        return self.ladder[min(max(nearest + move, 0), len(self.ladder) - 1)]

    def cross(self, first: Candidate, second: Candidate, rng: random.Random) -> Candidate:
        """Returns a candidate with the steps of one, and each accelerator of either."""
        genes = [rng.choice((first, second)).gene(kind) for kind in KINDS]
        return self._legal(rng.choice((first, second)).steps, [gene for gene in genes if gene is not None])

    def choose(self, choices: Choices) -> Candidate:
        """Returns one of the seeds, its steps moved and accelerators replaced."""
        seeds = self.seeds()
        seed = seeds[choices.choice("seed", len(seeds))]
        move = (0, -2, -1, 1, 2)[choices.choice("steps", 5)]
        steps, genes = self._rung(seed.steps, move) if move else seed.steps, []
        for kind in KINDS:
            known = [seed.gene(kind), None, *self.genes[kind]]
            if (gene := known[choices.choice(kind, len(known))]) is not None:
                genes.append(gene)
        return self._legal(steps, genes)

    def _legal(self, steps: int, genes: Iterable[Gene]) -> Candidate:
        """Returns a candidate whose steps suit its accelerators, and which is not the plain run."""
        kept = tuple(sorted(genes, key=lambda gene: KINDS.index(gene.kind)))
        for gene in kept:
            if counts := self.counts[gene]:
                steps = min(counts, key=lambda count: abs(count - steps))
        if not kept and steps >= self.steps:
            steps = self.ladder[1]
        return Candidate(steps, kept)

    def encode(self, candidate: Candidate) -> list[float]:
        """Returns the steps, which accelerators there are, and the places of their values."""
        genes = {gene.name: dict(gene.options) for gene in candidate.genes}
        numbers = [math.log(candidate.steps / self.steps)]
        for name, axes in sorted(self.axes.items()):
            options = genes.get(name)
            numbers.append(float(options is not None))
            for key, values in axes.items():
                place = 0 if options is None else values.index(options[key])
                numbers.append(0.0 if options is None else place / max(len(values) - 1, 1))
        return numbers

    def to_plain(self, candidate: Candidate) -> Any:
        """Returns a candidate as plain data."""
        return candidate.to_plain()

    def from_plain(self, data: Any) -> Candidate:
        """Returns a candidate from plain data."""
        return Candidate.from_plain(data)


def _ladder(steps: int) -> list[int]:
    """Returns numbers of steps, from the largest to the fewest."""
    found = [steps]
    while (least := min(math.floor(found[-1] * RATIO), found[-1] - 1)) >= min(FEWEST, max(steps - 1, 1)):
        found.append(least)
    return found


def _spread(items: list[Any], count: int) -> list[Any]:
    """Returns some items, evenly spread, the middle ones of equal parts."""
    if len(items) <= count:
        return items
    return [items[int((n + 0.5) * len(items) / count)] for n in range(count)]

"""S3: the search for the schedule of a model and a number of evaluations.

The objective is the distance of the images to those of the model's fine solution on the same noise: some
hundred times cheaper and smoother than a Fréchet distance, and no reference images are needed. All candidates
see the same conditions and noise; the best are scored again on others, and the winner is reported on a third
set.

Left out of the published method: the starting node and the stencil's points are not searched (they are data
of a `Schedule` and can be given by hand); the network's skip connections are not scaled.

References:
    | A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (2024)
    | https://arxiv.org/abs/2312.07243
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import OptionError
from ..eval.sampler import Sampler
from ..search import Evolution
from .family import family_of, solver_of
from .grids import grid
from .presets import solver_schedule
from .schedule import Schedule
from .space import ScheduleSpace

__all__ = ["Search", "TeacherDistance", "fine_schedule"]

Share = Callable[[list[Schedule], Callable[[Schedule], float]], list[float]]
"""What scores candidates, in one process or in several."""

TOP = 10
"""The candidates that are scored again."""
CLASSIC = ("dpm++2m", "unipc2", "deis2", "theta2")
"""The known solvers that a report compares with, each on its best grid."""


def fine_schedule(pipe: Any, steps: int) -> Schedule:
    """Returns the schedule of a model's fine solution: UniPC of order 3, on the grid that suits its path."""
    path = solver_of(pipe.scheduler).path
    return solver_schedule("unipc3", grid("trailing" if path.is_flow else "log_snr", steps, path))


class TeacherDistance:
    """The root mean square distance of images to the fine solution on the same noise.

    Arguments:
        pipe: The pipeline, plain.
        conditions: Prompts or labels; nothing for an unconditional pipeline.
        guidance: The guidance scale; None for the pipeline's own.
        seed: The seed of the first image's noise.
        count: The number of images.
        batch: Images a call.
        steps: The steps of the fine solution.
    """

    def __init__(self, pipe: Any, conditions: Sequence[str], guidance: float | None, seed: int, count: int,
                 batch: int = 32, steps: int = 200) -> None:  # fmt: skip
        self.pipe, self.batch = pipe, batch
        self.sampler = Sampler(pipe, conditions[:count], steps, guidance, seed, count)
        self.fine = self.images(fine_schedule(pipe, steps))

    def images(self, schedule: Schedule) -> Tensor:
        """Returns the images of a schedule, with shape (N, 3, H, W)."""
        before = self.pipe.scheduler
        self.pipe.scheduler = solver_of(before, schedules=[schedule.to_dict()])
        try:
            return self.sampler(schedule.evaluations, self.batch)
        finally:
            self.pipe.scheduler = before

    def __call__(self, schedule: Schedule) -> float:
        """Returns the distance of a schedule's images; infinite if they are not finite."""
        distance = float((self.images(schedule) - self.fine).double().square().mean().sqrt())
        return distance if distance == distance else float("inf")


@dataclass
class Search:
    """One search, which can be stopped and goes on from its file.

    Arguments:
        pipe: The pipeline, plain.
        evaluations: The number of the network's evaluations.
        conditions: Prompts or labels of all images.
        guidance: The guidance scale; None for the pipeline's own.
        images: Images of the objective; a second and a third set of others have twice as many.
        budget: Candidates to score.
        seed: Decides everything.
        batch: Candidates between two trainings of the ranking.
        file: Where the state is kept; None keeps none.
        writes: Whether this process keeps it; of several, one does.
    """

    pipe: Any
    evaluations: int
    conditions: Sequence[str]
    guidance: float | None = None
    images: int = 32
    budget: int = 300
    seed: int = 0
    batch: int = 8
    file: Path | None = None
    writes: bool = True

    def __post_init__(self) -> None:
        """Makes the space and the engine.

        Raises:
            OptionError: If a number makes no sense.
        """
        if self.images < 1 or self.budget < 1 or self.batch < 1:
            raise OptionError("a search needs at least 1 image, 1 candidate and a batch of 1")
        path = solver_of(self.pipe.scheduler).path
        self.space = ScheduleSpace(path, self.evaluations)
        self.evolution: Evolution[Schedule] = Evolution(self.space, self.seed)

    def _distance(self, part: int) -> TeacherDistance:
        """Returns the objective on the first, second or third set of conditions and noise."""
        sizes = (self.images, 2 * self.images, 2 * self.images)
        start, count = sum(sizes[:part]), sizes[part]
        conditions = self.conditions and [
            self.conditions[(start + n) % len(self.conditions)] for n in range(count)
        ]
        seed = self.seed * 1_000_003 + 7_000_000 + start
        return TeacherDistance(self.pipe, conditions, self.guidance, seed, count)

    def run(
        self, advance: Callable[[int], None] = lambda count: None, share: Share | None = None
    ) -> Schedule:
        """Searches, scores the best again, and returns the winner with a report in its facts.

        Arguments:
            advance: Told the number of candidates that were scored.
            share: Scores candidates in several processes; by default this one scores them all.
        """
        share = share or (lambda candidates, score: [score(candidate) for candidate in candidates])
        self._load()
        if len(self.evolution.scored) < self.budget:
            objective = self._distance(0)
        while len(self.evolution.scored) < self.budget:
            candidates = self.evolution.ask(min(self.batch, self.budget - len(self.evolution.scored)))
            if not candidates:
                break
            self.evolution.tell(candidates, share(candidates, objective))
            self._save()
            advance(len(candidates))
        return self._winner(share)

    def _winner(self, share: Any) -> Schedule:
        best = self.evolution.best[:TOP]
        again = share([entry.candidate for entry in best], self._distance(1))
        scores = [entry.score + 2 * second for entry, second in zip(best, again, strict=True)]  # by images
        place = min(range(len(best)), key=scores.__getitem__)
        held_out = self._distance(2)
        classics = self._classics()
        report = dict(zip(classics, share(list(classics.values()), held_out), strict=True))
        winner = best[place].candidate
        final = share([winner], held_out)[0]
        facts = {
            "family": family_of(self.pipe), "guidance": self.guidance, "images": self.images,
            "seed": self.seed, "candidates": len(self.evolution.scored), "distance": best[place].score,
            "again": again[place], "held_out": final, "held_out_of_known_solvers": report,
        }  # fmt: skip
        return replace(winner, facts=facts)

    def _classics(self) -> dict[str, Schedule]:
        """Returns the known solvers on the grid that was best in the search."""
        scored = {entry.candidate: entry.score for entry in self.evolution.scored}
        return {name: min(self.space.known(name), key=lambda schedule: scored.get(schedule, float("inf")))
                for name in CLASSIC}  # fmt: skip

    def _facts(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations, "guidance": self.guidance, "images": self.images,
                "seed": self.seed, "family": family_of(self.pipe),
                "conditions": list(self.conditions)}  # fmt: skip

    def _save(self) -> None:
        if self.file is None or not self.writes:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")
        temporary.write_text(
            json.dumps({"facts": self._facts(), **self.evolution.state_dict()}), encoding="utf-8"
        )
        os.replace(temporary, self.file)

    def _load(self) -> None:
        """Goes on from the file.

        Raises:
            OptionError: If it is that of another search.
        """
        if self.file is None or not self.file.exists():
            return
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
            facts = state.pop("facts")
        except (OSError, ValueError, KeyError) as error:
            raise OptionError(
                f"cannot read the search {str(self.file)!r}: {error}; remove it to begin anew"
            ) from None
        ours = json.loads(json.dumps(self._facts()))
        if different := [key for key in ours if facts.get(key) != ours[key]]:
            raise OptionError(
                f"{str(self.file)!r} is another search: {different[0]} is {facts.get(different[0])!r}, "
                f"now {ours[different[0]]!r}"
            )
        self.evolution.load_state_dict(state)

"""What a student makes in mid-training: samples on fixed noise, their distance and their health."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import zoo
from ..eval.fidelity import as_bytes
from ..eval.images import open_images
from ..eval.protocols import Extractor, protocol
from ..eval.reference import zoo_statistics
from ..eval.sampler import Sampler, default_conditions
from ..eval.scoring import reference_of
from ..eval.statistics import Statistics, collect
from .assembly import averaged
from .grid import fixed_grid
from .health import Health, examine
from .method import Method
from .runs import Run, guidance_of
from .trial import with_network, with_parts

__all__ = ["Validation", "conditions_of", "student_pipe"]

SEED = 700_000_000
"""The first seed of validations: noise that no pairs of common seeds have."""

SHOWN, TEACHER = 10, 64
"""Images of a grid, and of the teacher."""


def student_pipe(pipe: Any, component: str, network: nn.Module, method: Method, steps: Sequence[int]) -> Any:
    """Returns a pipeline with a student in the place of its network, and a scheduler of its grids."""
    student = with_network(pipe, component, network)
    student.scheduler = fixed_grid(pipe.scheduler, [method.grid(n) for n in steps])
    return student


def conditions_of(run: Run, count: int) -> list[str]:
    """Returns conditions to measure a run's student on: those of the zoo's models, or those of the pairs."""
    if run.config.teacher in zoo.names():
        return default_conditions(run.config.teacher, run.pipe, count)
    known = list(dict.fromkeys(map(str, run.store.conditions)))
    return [known[n % len(known)] for n in range(count if known and run.host.kind != "batch_size" else 0)]


class Validation:
    """Measures the average of a run's student; the conditions and the noise are always the same.

    Arguments:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        config, self.run = run.config, run
        count = config.eval_count
        zoo_model = config.teacher in zoo.names()
        self.conditions = conditions_of(run, count)
        self.shown: dict[str, Tensor] = {}
        """The first images of the teacher and of each number of steps."""
        self.extractor: Extractor | None = None
        self.reference: Statistics | None = None
        if config.reference or zoo_model:
            self.extractor = Extractor(protocol(config.protocol), str(run.trainer.accelerator.device))
            self.reference = (reference_of(config.reference, self.extractor, ["fid"]) if config.reference
                              else zoo_statistics(self.extractor, ["fid"]))  # fmt: skip
        self._teacher: Health | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """Returns the figures by number of steps: ``"fid/1"``, ``"diversity/4"``, and signs of a collapse.

        Only the first process measures; the others wait.
        """
        accelerator, found = self.run.trainer.accelerator, {}
        if accelerator.is_main_process:
            with torch.random.fork_rng():  # what is measured must not change the training
                found = self._measure()
        accelerator.wait_for_everyone()
        return found

    def _measure(self) -> dict[str, Any]:
        run, signs = self.run, []
        record: dict[str, float] = {}
        teacher = self._of_teacher()
        with averaged(run.trainer, run.host.units) as network:
            pipe = student_pipe(run.pipe, run.host.component, network, run.method, run.config.steps)
            for steps in run.config.steps:
                images = self._sample(pipe, steps, len(self.conditions) or run.config.eval_count,
                                      guidance_of(run.pipe))  # fmt: skip
                self.shown[f"{steps} steps"] = images[:SHOWN]
                health = examine(images[:TEACHER], self.conditions[:TEACHER])  # as many as of the teacher
                record |= {f"{name}/{steps}": value for name, value in health.to_dict().items()}
                signs += [f"{steps} steps: {sign}" for sign in health.signs(teacher)]
                if self.extractor is not None and self.reference is not None:
                    features = collect(open_images(as_bytes(images)), self.extractor)
                    record[f"fid/{steps}"] = self.reference.reference.distance(features.gaussian)
        return {"validation": record, "signs": signs}

    def _of_teacher(self) -> Health:
        """Returns the health of the teacher's own images, which are made once."""
        if self._teacher is None:
            store = self.run.store
            teacher = with_parts(self.run.pipe)
            with self.run.method.setup.teacher.active():  # a LoRA student shares its network
                images = self._sample(teacher, int(store.settings.get("steps", 50)), TEACHER, store.guidance)
            self.shown["teacher"] = images[:SHOWN]
            self._teacher = examine(images, self.conditions[:TEACHER])
        return self._teacher

    def _sample(self, pipe: Any, steps: int, count: int, guidance: float | None) -> Tensor:
        guided = "guidance_scale" in inspect.signature(pipe.__call__).parameters
        sampler = Sampler(pipe, self.conditions[:count], steps, guidance if guided else None, SEED, count,
                          self.run.store.options)  # fmt: skip
        return sampler(steps, 64)

"""Plans as an accelerator: ``pipe.to(accel="auto")``, or ``pipe.to(accel="plan.json")``."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..errors import UnsupportedPipeline
from ..pipelines.accelerator import Accelerator, Proceed, option, resolve
from ..pipelines.run import Evaluation
from .plan import Plan, PlanError, stored_file

__all__ = ["Auto", "shape_of"]


def shape_of(sample: Any) -> list[int]:
    """Returns the shape of a row of a network's input: a tensor (rows, *), or a list with one entry a row."""
    first: Tensor = sample[0]
    return list(first.shape)


@dataclass
class Auto(Accelerator):
    """Samples as ``diffaccel tune`` has chosen for this model: stack, solver and number of steps.

    The call asks for the steps and the guidance that the plan stands for; the plan decides how many are run.
    Refused are other versions of diffaccel, diffusers or torch, another pipeline class, other weights or
    types, another scheduler, other steps, guidance or sizes: what was measured does not hold for them. Other
    arguments (negative prompts, image inputs, ...) are not looked at.

    Arguments:
        file: A plan; empty for the one that is stored with the model (``diffaccel tune --store``).
    """

    name: ClassVar[str] = "auto"
    shorthand: ClassVar[str] = "file"
    alone: ClassVar[bool] = True  # a plan was measured without others

    file: str = option("")

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        self.plan: Plan | None = None
        """The plan, once the accelerator is on a pipeline."""

    def expand(self, pipe: Any) -> list[Accelerator]:
        """Returns the accelerator with its plan, and the plan's stack.

        Raises:
            PlanError: If there is no plan, or it is damaged.
            UnsupportedPipeline: If the plan is for another model, or other versions.
        """
        found = copy.copy(self)
        found.plan = plan = self._read(pipe)
        if reason := plan.mismatch(pipe) or plan.other_weights(pipe):
            raise UnsupportedPipeline(f"auto cannot accelerate this {type(pipe).__name__}: {reason}")
        return [found, *resolve(list(plan.stack))]

    def _read(self, pipe: Any) -> Plan:
        """Returns the plan in the file, or the one that is stored with the model."""
        file = Path(self.file).expanduser() if self.file else stored_file(pipe)
        if not self.file and not file.is_file():
            raise PlanError(f"no plan {str(file)!r} is stored with this model; use diffaccel tune --store")
        return Plan.load(file)

    def check(self, pipe: Any) -> str | None:
        """Returns why the plan is not for the pipeline as it is now, but for its weights.

        Raises:
            PlanError: If there is no plan, or it is damaged.
        """
        return (self.plan or self._read(pipe)).mismatch(pipe)

    @property
    def _plan(self) -> Plan:
        assert self.plan is not None, "an accelerator on a pipeline is expanded"
        return self.plan

    def arguments(self, pipe: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the number of steps that the plan runs.

        Raises:
            UnsupportedPipeline: If the call asks for other steps or guidance than the plan stands for.
        """
        match = self._plan.match
        for name, key in (("num_inference_steps", "steps"), ("guidance_scale", "guidance")):
            if given.get(name) != match[key]:
                raise UnsupportedPipeline(
                    f"the plan stands for {name}={match[key]}, and the call asks for {given.get(name)}; call "
                    "with that, or tune again"
                )
        if own := [name for name in ("timesteps", "sigmas") if given.get(name) is not None]:
            raise UnsupportedPipeline(f"a plan has its own steps; call without {own[0]}")
        return {"num_inference_steps": self._plan.steps}

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Evaluates a network.

        Raises:
            UnsupportedPipeline: If the sizes are not those that were tuned.
        """
        if call.step == 0 and (shape := shape_of(call.sample)) != self._plan.match["shape"]:
            raise UnsupportedPipeline(
                f"the plan is for network inputs of shape {self._plan.match['shape']}, these are {shape}; "
                "call with the sizes of the tuning, or tune again"
            )
        return proceed(call)

r"""Fewer head steps for later tokens: ``pipe.to(accel="disa")``.  Reduces to fixed steps for upper=lower.

Autoregressive step k of K gets :math:`T(k) = L + \lfloor f(u) (U - L) \rfloor` steps of the token head, with
the progress :math:`u = k / (K - 1)` and f(u) of `FALLS` (arXiv 2505.20297, 3.3).

References:
    | DiSA: Diffusion Step Annealing in Autoregressive Image Generation (Zhao et al., 2025)
    | https://arxiv.org/abs/2505.20297
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from torch import nn

from ..errors import OptionError
from .accelerator import Accelerator, Proceed, option
from .autoregressive import ARStep
from .report import Action, Count
from .run import BlockCall, Run, denoisers_of

__all__ = ["FALLS", "StepAnnealing"]

HEAD = "head"

FALLS: dict[str, Callable[[Fraction], Fraction | float]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (math.cos(math.pi * u) + 1) / 2,
    "two-stage": lambda u: Fraction(u < Fraction(1, 2)),
    "constant": lambda u: Fraction(0),
}
"""f(u) of each kind, from 1 to 0; "constant" is the lower number throughout, as in the paper's code."""


@dataclass
class StepAnnealing(Accelerator):
    """Gives each autoregressive step its number of head steps.

    It serves every pipeline whose scheduler has a method ``head_steps`` (see `autoregressive`).  The report
    counts the head's evaluations as those of a network "head": requested are the steps that the pipeline
    would have taken.

    Arguments:
        upper: The head steps U of the first autoregressive step.
        lower: The head steps L of the last one.
        kind: "linear", "cosine", "two-stage", "constant" (always ``lower``), or "auto": the fewest steps
            from ``lower`` to ``upper`` by which a normal token, as wide as the head has predicted those of
            the step before, is drawn within ``tolerance``.
        by: Whether progress is the part of the autoregressive steps ("ar_step") or of the tokens ("tokens").
        tolerance: The Wasserstein distance that "auto" allows, in the units of the tokens; the default was
            calibrated on tiny-fashion-mar.

    Raises:
        OptionError: If an option is out of range, or ``lower`` above ``upper``.
    """

    name: ClassVar[str] = "disa"
    exclusive: ClassVar[str] = "solver"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mar": {"upper": 50, "lower": 5},
        "flowar": {"upper": 25, "lower": 15},
        "flowar-h": {"upper": 50, "lower": 15},
        "xar": {"upper": 50, "lower": 15},
        "harmon": {"upper": 50, "lower": 5},
        "auto": {"kind": "auto", "lower": 2},
    }

    upper: int = option(50, low=2)
    lower: int = option(5, low=2)
    kind: str = option("linear", choices=(*FALLS, "auto"))
    by: str = option("ar_step", choices=("ar_step", "tokens"))
    tolerance: float = option(0.2, low=0)

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.lower > self.upper:
            raise OptionError(f"disa: lower={self.lower} is above upper={self.upper}; steps fall to lower")

    def check(self, pipe: Any) -> str | None:
        """Returns why a pipeline has no autoregressive steps, or none that "auto" can measure."""
        scheduler = pipe.scheduler
        name = type(scheduler).__name__
        if not callable(getattr(scheduler, "head_steps", None)):
            return f"it has no autoregressive steps; {name} has no method head_steps(step)"
        if self.kind == "auto" and not callable(getattr(scheduler, "step_error", None)):
            return f"kind='auto' needs the errors of its head; {name} has no method step_error(steps, spread)"
        return None

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns the pipeline's scheduler with annealed head steps; it stands in during a call."""
        self.count: Count = Count()
        self.run: Run | None = None
        self.counted = bool(self.blocks(pipe))
        annealed = copy.copy(pipe.scheduler)
        plain = annealed.head_steps  # of the copy, whose number of steps the call may set

        def head_steps(step: ARStep) -> int:
            return self._granted(annealed, step, plain(step))

        annealed.head_steps = head_steps
        return annealed

    def start(self, run: Run) -> None:
        """Enters the head into the report."""
        self.run = run
        run.report.counts[HEAD] = self.count
        run.report.auxiliary = tuple({*run.report.auxiliary, HEAD})

    def blocks(self, pipe: Any) -> list[nn.Module]:
        """Returns the heads that are parts of denoisers."""
        heads = (getattr(module, HEAD, None) for module in denoisers_of(pipe).values())
        return [head for head in heads if isinstance(head, nn.Module)]

    def block(self, call: BlockCall, proceed: Proceed) -> Any:
        """Counts an evaluation of the head."""
        self.count.evaluated += 1
        self.count.rows += len(call.args[0])
        return proceed(call)

    def steps(self, step: ARStep, error: Callable[[int, float], float] | None = None) -> int:
        """Returns the head steps of an autoregressive step.

        Arguments:
            step: The step.
            error: The error of a number of head steps for a token of some spread, which "auto" needs.
        """
        if self.kind == "auto":
            if error is None or step.spread is None or not math.isfinite(step.spread):
                return self.upper  # nothing is known yet
            spread, numbers = step.spread, range(self.lower, self.upper)
            return self.lower + bisect_left(numbers, True, key=lambda n: error(n, spread) <= self.tolerance)
        done, end = step.index, step.count - 1
        if self.by == "tokens":
            done, end = step.known, step.total - step.drawn[-1]
        progress = Fraction(done, end) if end else Fraction(0)
        return self.lower + math.floor(FALLS[self.kind](progress) * (self.upper - self.lower))

    def _granted(self, scheduler: Any, step: ARStep, asked: int) -> int:
        granted = self.steps(step, getattr(scheduler, "step_error", None))
        self.count.requested += asked
        if not self.counted:
            self.count.evaluated += granted
        if self.run is not None and granted < asked:
            samples = tuple(range(self.run.batch))
            self.run.report.actions.append(Action(step.index, 0, HEAD, self.name, "anneal", samples))
        return granted

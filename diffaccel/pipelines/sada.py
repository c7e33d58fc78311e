"""SADA: skips the network where the trajectory is stable, and reconstructs what it would have said."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..errors import UnsupportedPipeline, UnsupportedScheduler
from ..noise import is_stochastic, probe
from .accelerator import Accelerator, Proceed, option
from .gates import is_compiled
from .history import select
from .replay import Replay
from .rows import merge_rows
from .run import AUXILIARY, Evaluation, Run, Update
from .sada_rules import ErrorRule, Rule, StabilityRule

__all__ = ["Sada"]


@dataclass
class Sada(Accelerator):
    """Stability-guided adaptive acceleration, step-wise, for every deterministic solver and prediction type.

    At a skipped step no network runs (a ControlNet neither); the guided x0 is reconstructed from history
    and handed to the solver as an ordinary output. Every sample of a batch decides for itself, and the
    network runs for the samples that need it; a compiled network, which a new batch size would compile
    again, runs for all samples as soon as one needs it. The first steps and the last one always run.
    Reduces to the plain pipeline, bit for bit, for ``max_skips=0`` or ``skip_from=1``.

    The default goes beyond the paper, since it measures better (docs/sada.md): `ErrorRule` decides, and
    once a stretch of skipped steps has ended, its solver updates are repeated with interpolated predictions
    (`Replay`). The preset ``"paper"`` follows the formulas of the paper, see `StabilityRule`. The token-
    wise part of the paper (recomputing unstable tokens only) is left out here: it needs attention
    processors of its own for each family.

    References:
        SADA: Stability-guided Adaptive Diffusion Acceleration (2025), arXiv 2507.17135.

    Arguments:
        criterion: ``"error"`` or ``"stability"``.
        tolerance: The error allowed to a skipped step, relative to x0; 0 skips nothing. Error criterion only.
        max_skips: The largest number of skipped steps in a row; 0 switches off.
        skip_from: The part of the steps that always run at the beginning, in [0, 1].
        skip_until: The part of the steps after which all run, in [0, 1].
        order: The computed predictions in the extrapolation, 2 or 3 being best. Error criterion only.
        correct: Whether finished stretches are corrected. Error criterion only.
        late: The part of the steps after which every ``interval``-th is run whatever the criterion says;
            1 for none. Stability criterion only.
        interval: See ``late``.
        nodes: The nodes of the polynomial after ``late``. Stability criterion only.
    """

    name: ClassVar[str] = "sada"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "precise": {"tolerance": 0.003},
        "fast": {"tolerance": 0.014},
        "paper": {
            "criterion": "stability",
            "max_skips": 4,
            "skip_from": 0.2,
            "skip_until": 0.94,
            "correct": False,
        },
    }
    exclusive: ClassVar[str] = "skip"
    trials: ClassVar[Mapping[str, Sequence[Any]]] = {
        "tolerance": (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.007, 0.01, 0.014, 0.02, 0.03)
    }

    criterion: str = option("error", choices=("error", "stability"))
    tolerance: float = option(0.007, low=0.0)
    max_skips: int = option(3, low=0)
    skip_from: float = option(0.1, low=0.0, high=1.0)
    skip_until: float = option(1.0, low=0.0, high=1.0)
    order: int = option(2, low=1, high=4)
    correct: bool = option(True)
    late: float = option(0.48, low=0.0, high=1.0)
    interval: int = option(4, low=2)
    nodes: int = option(4, low=1, high=6)

    def check(self, pipe: Any) -> str | None:
        """Refuses stochastic and unknown schedulers."""
        if reason := is_stochastic(pipe.scheduler):
            return (
                f"the updates of {type(pipe.scheduler).__name__} are random ({reason}); use a deterministic "
                "scheduler, such as DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)"
            )
        try:
            path = probe(pipe.scheduler)
        except UnsupportedScheduler as error:
            return str(error)
        if self.criterion == "stability" and any(path[index].sigma == 0 for index in range(len(path))):
            return f"{type(pipe.scheduler).__name__} starts without noise, where the criterion is undefined"
        return None

    @property
    def is_off(self) -> bool:
        """Whether the options allow no skip at all, so that nothing has to be watched."""
        hopeless = self.criterion == "error" and self.tolerance == 0
        return hopeless or self.max_skips == 0 or self.skip_from == 1

    def start_rule(self, run: Run) -> Rule:
        """Returns the rule with the state of a new loop."""
        if self.criterion == "error":
            return ErrorRule(self.tolerance, self.max_skips, self.order)
        phase = math.inf if self.late == 1 else self.late * run.num_updates
        phase = phase if math.isinf(phase) else round(phase / self.interval) * self.interval
        return StabilityRule(self.max_skips, phase, self.interval, self.nodes)

    def start(self, run: Run) -> None:
        """Forgets the last loop.

        Raises:
            UnsupportedPipeline: If the call asks for an ``eta`` that makes the solver stochastic.
        """
        if run.arguments.get("eta") and "eta" in inspect.signature(run.scheduler.step).parameters:
            raise UnsupportedPipeline(
                f"sada cannot accelerate eta={run.arguments['eta']}: updates are random; use eta=0"
            )
        self.rule: Rule | None = None
        self.replay = Replay()
        self.last: dict[tuple[str, int], tuple[int, Any]] = {}
        self.skip = np.zeros(0, bool)
        self.ran: np.ndarray | None = None
        self.network = ""
        self.batch = 0
        self.compiled: dict[str, bool] = {}

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Runs a network for the samples that do not skip, and fills in its last output for the rest."""
        if self.is_off:
            return proceed(call)
        key, batch = (call.network, call.branch), len(self.skip)
        denoiser = call.network not in AUXILIARY
        known, previous = self.last.get(key, (0, None))
        switched = denoiser and (call.network != self.network or known not in (0, call.rows))
        if known != call.rows or switched or not self.skip.any():
            output, ran = proceed(call), np.ones(batch, bool)
        elif self.skip.all():
            output, ran = previous, ~self.skip
        elif call.rows % batch or self._is_compiled(call):  # frames may be samples, but not rows
            output, ran = proceed(call), np.ones(batch, bool)
        else:
            part, ran = call.select(np.flatnonzero(~self.skip).tolist(), batch), ~self.skip
            rows = [row for row in range(call.rows) if ran[row % batch]]
            output = merge_rows(previous, proceed(part), rows, call.rows)
        if not ran.all():
            call.log(self, "skip", np.flatnonzero(~ran).tolist())
        self.last[key] = (call.rows, output)
        if denoiser:
            self.ran = ran if self.ran is None else self.ran & ran
            if switched and self.network:
                self.rule = None
            self.network = call.network
        return output

    def update(self, call: Update, proceed: Proceed) -> Any:
        """Gives the solver the reconstructed output where a sample was skipped, and plans the next step.

        Raises:
            UnsupportedPipeline: If the number of samples changes, or is not that of the outputs.
        """
        if self.is_off:
            return proceed(call)
        self._check_batch(call)
        batch, level = len(call.sample), call.run.path[call.index]
        ran = self.ran if self.ran is not None and len(self.ran) == batch else np.ones(batch, bool)
        if self.rule is None:
            self.rule = self.start_rule(call.run)
            self.replay.clear()
            ran = np.ones(batch, bool)  # a new rule has nothing to reconstruct from
        x0 = level.x0(call.output, call.sample)
        if not ran.all():
            x0 = select(ran, x0, self.rule.reconstruct(call).to(x0.dtype))
        corrected = self._corrected(call, x0, ran)
        if corrected is not call:
            call, x0 = corrected, select(ran, level.x0(call.output, corrected.sample), x0)
        if not ran.all():
            rebuilt = level.output(x0, call.sample).to(call.output.dtype)
            call = replace(call, output=select(ran, call.output, rebuilt))
        keep = self.correct and isinstance(self.rule, ErrorRule)
        result = self.replay.step(call, proceed, ~ran, keep)
        allowed = self.rule.plan(call, x0, result, ran)
        self.skip = allowed & self._in_range(call)
        self.ran = None
        return result

    def _is_compiled(self, call: Evaluation) -> bool:
        """Whether the network is compiled; asked only where it matters, since all parts are looked at."""
        if call.network not in self.compiled:
            self.compiled[call.network] = is_compiled(call.module)
        return self.compiled[call.network]

    def _check_batch(self, call: Update) -> None:
        given, batch = len(call.output), len(call.sample)
        if given != batch or self.batch not in (0, batch):
            what = f"{given} outputs for {batch} samples" if given != batch else (
                f"{self.batch} samples in one update and {batch} in the next")  # fmt: skip
            raise UnsupportedPipeline(f"sada cannot accelerate this {type(call.run.pipe).__name__}: {what}")
        self.batch = batch

    def _corrected(self, call: Update, x0: Any, ran: np.ndarray) -> Update:
        rule = self.rule
        if not isinstance(rule, ErrorRule) or not self.correct:
            return call
        if not self.replay.follows(call.sample):  # the pipeline has changed it, as inpainting does
            self.replay.clear()
            return call
        return self.replay.correct(call, ran, lambda old: rule.interpolate(x0, call, old))

    def _in_range(self, call: Update) -> bool:
        """Whether the next step may be skipped at all."""
        step, updates = call.step + 1, call.run.num_updates
        first = max(math.ceil(self.skip_from * updates), self.order + 1 if self.criterion == "error" else 3)
        return self.max_skips > 0 and first <= step < min(self.skip_until * updates, updates - 1)

"""SADA: skips the network where the trajectory is stable, and reconstructs what it would have said."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ..errors import UnsupportedPipeline, UnsupportedScheduler
from ..noise import is_stochastic, probe
from .accelerator import Accelerator, Proceed, option
from .cells import WHOLE
from .gates import is_compiled
from .history import select
from .replay import Replay
from .rows import merge_rows, rows_of
from .run import AUXILIARY, BlockCall, Evaluation, Run, Update, denoisers_of
from .sada_rules import ErrorRule, Rule, StabilityRule, position
from .tokens import Tokens, why_no_tokens

__all__ = ["Sada"]


@dataclass
class Sada(Accelerator):
    """Stability-guided adaptive acceleration for every deterministic solver and prediction type.

    At a skipped step no network runs (a ControlNet neither); the guided x0 is reconstructed from history
    and handed to the solver as an ordinary output. Every sample of a batch decides for itself, and the
    network runs for the samples that need it; a compiled network, which a new batch size would compile
    again, runs for all samples as soon as one needs it. The first steps and the last one always run.
    Reduces to the plain pipeline, bit for bit, for ``max_skips=0`` or ``skip_from=1``.

    The default goes beyond the paper, since it measures better (docs/sada.md): `ErrorRule` decides, and
    once a stretch of skipped steps has ended, its solver updates are repeated with interpolated predictions
    (`Replay`). The preset ``"paper"`` follows the formulas of the paper, see `StabilityRule`.

    With ``tokens`` the same criterion is asked of every token of the latents, and transformer blocks run for
    the unstable ones alone in the steps that are computed (`tokens.Tokens`): token-wise, for the denoisers
    named there. Reduces to the step-wise part, bit for bit, where no token is stable.

    References:
        SADA: Stability-guided Adaptive Diffusion Acceleration (2025), arXiv 2507.17135.

    Arguments:
        criterion: ``"error"`` or ``"stability"``.
        tolerance: The error allowed to a skipped step, relative to x0; 0 skips nothing. Error criterion only.
        max_skips: The largest number of skipped steps in a row; 0 switches off. A token may be left out of
            twice as many updates in a row; with the stability criterion, of one less than so many.
        skip_from: The part of the steps that always run at the beginning, in [0, 1].
        skip_until: The part of the steps after which all run, in [0, 1].
        order: The computed predictions in the extrapolation, 2 or 3 being best. Error criterion only.
        correct: Whether finished stretches are corrected. Error criterion only.
        late: The part of the steps after which every ``interval``-th is run whatever the criterion says;
            1 for none. Stability criterion only.
        interval: See ``late``.
        nodes: The nodes of the polynomial after ``late``. Stability criterion only.
        tokens: The error allowed to a token that is not computed, in units of ``tolerance``; 0 for no
            token-wise part. For the stability criterion, which has no error, any other number is the same.
        window: One token in each square of so many by so many is computed whatever the criterion says, in
            turn; 0 for none.
        max_downsample: The side, in latent pixels, of the largest tokens in a U-Net that are left out.
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
    tokens: float = option(0.0, low=0.0)
    window: int = option(0, low=0)
    max_downsample: int = option(2, low=1)

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
        if self.tokens:
            return why_no_tokens(pipe)
        return None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of what it does: blocks are those of the token-wise part."""
        return ("skip", "blocks") if self.tokens else ("skip",)

    @property
    def is_off(self) -> bool:
        """Whether the options allow no skip at all, so that nothing has to be watched."""
        hopeless = self.criterion == "error" and self.tolerance == 0
        return hopeless or self.max_skips == 0 or self.skip_from == 1

    def start_rule(self, run: Run) -> Rule:
        """Returns the rule with the state of a new loop."""
        if self.criterion == "error":
            return ErrorRule(self.tolerance, self.max_skips, self.order, self.cells)
        phase = math.inf if self.late == 1 else self.late * run.num_updates
        phase = phase if math.isinf(phase) else round(phase / self.interval) * self.interval
        return StabilityRule(self.max_skips, phase, self.interval, self.nodes, self.cells)

    def blocks(self, pipe: Any) -> list[nn.Module]:
        """Returns what the token-wise part looks into."""
        self.thin: Tokens | None = None
        if self.tokens and not self.is_off:
            self.thin = Tokens(denoisers_of(pipe), self.max_downsample)
        return self.thin.modules if self.thin else []

    def block(self, call: BlockCall, proceed: Proceed) -> Any:
        """Computes some tokens or all of them."""
        return self.thin.block(call, proceed) if self.thin else proceed(call)

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
        self.skip = self.nobody = np.zeros(0, bool)
        self.wanted = np.ones((0, 1), bool)
        self.idle = True  # whether the next evaluation is that of all samples in all of their cells
        self.cells = WHOLE
        if self.thin:
            self.thin.clear()
        self.skipped = False  # whether an evaluation of this step has left out the samples that skip
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
        whole, skips = self.idle or known != call.rows or switched, False
        if not whole and self.skip.all():
            output, skips = previous, True
        elif whole or call.rows % batch or self._is_compiled(call):  # frames may be samples, but not rows
            output = self._part(call, proceed, range(batch))
        else:
            output, skips = self._some(call, proceed, previous), bool(self.skip.any())
        if skips:
            call.log(self, "skip", np.flatnonzero(self.skip).tolist())
        self.last[key] = (call.rows, output)
        if denoiser:
            self.skipped |= skips
            if switched and self.network:
                self.rule = None
            self.network = call.network
        return output

    def _some(self, call: Evaluation, proceed: Proceed, previous: Any) -> Any:
        """Evaluates a network for the samples that do not skip, and fills in its last output for the rest."""
        output, batch = previous, len(self.skip)
        thin = np.any(~self.wanted, 1) & (call.network not in AUXILIARY)
        for group in (~self.skip & ~thin, ~self.skip & thin):
            samples = np.flatnonzero(group).tolist()
            if len(samples) == batch:
                output = self._part(call, proceed, samples, bool(thin.all()))
            elif samples:
                rows = rows_of(samples, batch, call.rows)
                part = self._part(call.select(samples, batch), proceed, samples, bool(thin[samples[0]]), rows)
                output = merge_rows(output, part, rows, call.rows)
        return output

    def _part(
        self, call: Evaluation, proceed: Proceed, samples: Sequence[int], thin: bool = False,
        rows: list[int] | None = None,
    ) -> Any:  # fmt: skip
        """Evaluates a network for some samples, in all of their cells or in those that are wanted."""
        if self.thin is None or call.network in AUXILIARY or not self.cells.batch:
            return proceed(call)
        wanted = self.wanted[samples] if thin else None
        key, now = (call.network, call.branch), position(call.run.path, call.run.coming(None))
        linear = self.criterion == "error"
        with self.thin.part(key, now, linear, self.cells, rows, wanted) as part:
            output = proceed(call)
        if thin:
            call.run.report.counts[call.network].saved += call.share * (
                1 - part.computed / max(part.total, 1)
            )
            call.log(self, "thin", samples)
        return output

    def update(self, call: Update, proceed: Proceed) -> Any:
        """Gives the solver the reconstructed output where a sample was skipped, and plans the next step.

        Raises:
            UnsupportedPipeline: If the number of samples changes, or is not that of the outputs.
        """
        if self.is_off:
            return proceed(call)
        self._check_batch(call)
        level, missing = call.run.path[call.index], self._begin_update(call)
        rule, fresh = self.rule, self._fresh(missing)
        assert rule is not None
        x0 = level.x0(call.output, call.sample)
        if fresh is not None:
            x0 = self._select(fresh, x0, rule.reconstruct(call).to(x0.dtype))
        corrected = self._corrected(call, x0, missing)
        if corrected is not call:
            newest = level.x0(call.output, corrected.sample)
            call, x0 = corrected, newest if fresh is None else self._select(fresh, newest, x0)
        if fresh is not None:
            rebuilt = level.output(x0, call.sample).to(call.output.dtype)
            call = replace(call, output=self._select(fresh, call.output, rebuilt))
        keep = self.correct and isinstance(rule, ErrorRule)
        result = self.replay.step(call, proceed, missing if keep else None)
        allowed, possible = rule.plan(call, x0, result, fresh), self._in_range(call)
        self.skip = self.nobody if allowed is None else allowed & possible
        self._choose(call, possible)
        unaware = allowed is None and self.thin is None
        self.idle = unaware or not (self.skip.any() or not self.wanted.all())
        self.skipped = False
        return result

    def _begin_update(self, call: Update) -> np.ndarray | None:
        """Returns the samples whose networks did not run, bool (B); begins anew where there is no past."""
        if self.rule is not None:
            return self.skip if self.skipped else None
        batch = len(call.sample)
        self.cells = self.thin.cells(self.network, call.sample.shape) if self.thin else WHOLE
        self.rule = self.start_rule(call.run)
        self.replay.clear()
        self.wanted, self.nobody = np.ones((batch, self.cells.count), bool), np.zeros(batch, bool)
        return None  # a new rule has nothing to reconstruct from

    def _fresh(self, missing: np.ndarray | None) -> np.ndarray | None:
        """Returns the cells whose prediction is taken as the network gave it, bool (B, T); None for all."""
        fills = self.thin is not None and self.rule is not None and self.rule.fills and not self.wanted.all()
        if missing is None:
            return self.wanted if fills else None
        return (self.wanted if fills else np.ones_like(self.wanted)) & ~missing[:, None]

    def _choose(self, call: Update, possible: bool) -> None:
        """Chooses the cells that the next evaluation computes."""
        if self.thin is None or self.rule is None:
            return  # all of them
        self.wanted = np.ones_like(self.wanted)
        if possible:
            self.wanted = ~self.rule.stable(call, self.tokens)
            if self.window:
                self.wanted |= self.cells.lattice(call.step + 1, self.window)
        self.wanted[self.skip] = True

    def _select(self, chosen: np.ndarray, this: Tensor, other: Tensor) -> Tensor:
        """Returns the chosen cells of ``this``, and the other ones of ``other``."""
        if chosen.all() or not chosen.any():
            return this if chosen.all() else other
        split = self.cells.split
        return self.cells.join(select(chosen.ravel(), split(this), split(other)))

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

    def _corrected(self, call: Update, x0: Any, missing: np.ndarray | None) -> Update:
        rule = self.rule
        if not self.replay or not isinstance(rule, ErrorRule) or not self.correct:
            return call
        if not self.replay.follows(call.sample):  # the pipeline has changed it, as inpainting does
            self.replay.clear()
            return call
        ran = ~(self.nobody if missing is None else missing)
        return self.replay.correct(call, ran, lambda old: rule.interpolate(x0, call, old))

    def _in_range(self, call: Update) -> bool:
        """Whether the next step may be skipped at all."""
        step, updates = call.step + 1, call.run.num_updates
        first = max(math.ceil(self.skip_from * updates), self.order + 1 if self.criterion == "error" else 3)
        return self.max_skips > 0 and first <= step < min(self.skip_until * updates, updates - 1)

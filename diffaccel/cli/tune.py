"""``diffaccel tune``: the fastest way to sample within a budget, as a plan for ``pipe.to(accel="auto")``."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DiffaccelError
from ..eval.budget import SPEED, Budget, Judge
from ..eval.cost import Timing
from ..eval.provenance import machine, plain, settings_digest
from ..eval.sampler import Sampler, default_conditions
from ..eval.tolerance import tolerance_bound
from ..tuning.choice import Choice, Claim, check_claim, choose, low_median
from ..tuning.halving import Objective, Trial, front, halve
from ..tuning.measurements import Measurements, folder_of
from ..tuning.plan import Plan, facts_of, stored_file
from ..tuning.space import CandidateSpace
from ..zoo.folders import quiet
from .figures import Point, draw_plot
from .generate import load
from .reading import check_options, read_prompts
from .writing import check_output, counting, write_files

__all__ = ["NoPlan", "Settings", "lines_of", "tune"]


class NoPlan(DiffaccelError, ValueError):
    """A budget that no candidate was shown to meet."""


@dataclass(frozen=True)
class Settings:
    """The options of a tuning, as the command names them.

    Arguments:
        model: The model.
        budget: What is to be met, such as "lpips<=0.05".
        steps: The inference steps of the plain run.
        guidance: The guidance scale; None for the pipeline's own.
        scheduler: Another scheduler for the plain run.
        prompts: A file of prompts or labels.
        images: The images of the final test; the search has half as many others.
        batch: Images a call.
        candidates: Candidates of the search.
        rounds: The interleaved rounds of timing.
        coverage: The share of all images that is to meet the budget.
        confidence: The probability that it does.
        seed: The seed of the first image, and of the search.
        protocol: The features of a budget of "feature_distance".
        device: Where to run.
        dtype: The type of the weights.
    """

    model: str
    budget: str
    steps: int = 50
    guidance: float | None = None
    scheduler: str | None = None
    prompts: Path | None = None
    images: int = 64
    batch: int = 8
    candidates: int = 40
    rounds: int = 5
    coverage: float = 0.95
    confidence: float = 0.95
    seed: int = 0
    protocol: str = "offline"
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def claim(self) -> Claim:
        """What is to be shown."""
        return Claim(Budget.read(self.budget), self.coverage, self.confidence, self.rounds)

    @property
    def searched(self) -> range:
        """The numbers of the images of the search; those of the test come first."""
        return range(self.images, self.images + max(1, self.images // 2))


class Tuning:
    """One tuning of a pipeline, from the search to the plan.

    Arguments:
        settings: The settings.
        pipe: The pipeline, plain.
        sampler: The conditions and seeds of all images.
        measurements: What measures candidates.
    """

    def __init__(self, settings: Settings, pipe: Any, sampler: Sampler, measurements: Measurements) -> None:
        self.settings, self.pipe, self.sampler, self.measurements = settings, pipe, sampler, measurements
        self.claim = settings.claim

    def run(self) -> tuple[list[Trial], Choice, Plan | None]:
        """Returns all that was tried, what was chosen, and the plan for it; None if nothing was."""
        settings, numbers = self.settings, self.settings.searched
        first = range(numbers.start, numbers.start + max(1, len(numbers) // 4))
        objective = Objective(self.claim.budget, self.measurements.plain(first), settings.images)
        space = CandidateSpace(self.pipe, settings.steps)
        trials = halve(space, self.measurements, objective, numbers, settings.candidates, settings.seed)
        choice = choose(trials, self.claim, self.measurements, range(settings.images))
        return trials, choice, self._plan(choice)

    def _plan(self, choice: Choice) -> Plan | None:
        """Returns the plan for what was chosen."""
        if choice.winner is None or choice.measured is None:
            return None
        timing, settings = choice.speedups[choice.winner], self.settings
        if timing.median <= 1:
            return None
        first = range(min(settings.batch, settings.images))
        match = {**facts_of(self.pipe), "steps": settings.steps, "guidance": self.sampler.guidance,
                 "shape": self.measurements.shape(first)}  # fmt: skip
        cost = {
            "evaluated": choice.measured.evaluated,
            "evaluated_plain": self.measurements.plain(first).evaluated,
            "speedup": timing.median, "speedup_least": low_median(timing, self.claim.confidence),
            "speedups": list(timing.values), "batch": settings.batch,
        }  # fmt: skip
        facts = {"settings": _plain_settings(settings), "machine": machine(self.measurements.device),
                 "conditions": len(set(self.sampler.conditions))}  # fmt: skip
        return Plan(choice.winner.steps, tuple(choice.winner.spec), match, self._promise(choice), cost, facts)

    def _promise(self, choice: Choice) -> dict[str, Any]:
        """Returns what was shown of the winner."""
        claim, budget = self.claim, self.claim.budget
        assert choice.measured is not None and choice.winner is not None
        losses = budget.losses(choice.measured.values)
        bound = budget.largest
        if budget.metric == SPEED:  # chosen without a look at the test's images
            bound = tolerance_bound(losses.tolist(), claim.coverage, claim.confidence)
        shown = {"bound": bound, "mean": float(losses.mean()), "worst": float(losses.max())}
        return {
            "budget": str(budget), "metric": budget.quality, "images": len(losses),
            "violations": int(np.sum(losses > bound)),
            "coverage": claim.coverage, "confidence": claim.confidence,
            **{name: plain(budget.value_of(loss)) for name, loss in shown.items()},
        }  # fmt: skip


def tune(settings: Settings, out: Path, store: bool = False) -> dict[str, Any]:
    """Tunes a model; writes ``plan.json``, ``front.json`` and ``front.png``, goes on after a kill.

    Arguments:
        settings: The settings.
        out: The folder; its ``measured`` are what a later call goes on from, and other budgets use again.
        store: Whether the plan is stored in the model's folder as well, for ``accel="auto"``.

    Returns:
        The record that ``front.json`` holds.

    Raises:
        NoPlan: If no candidate was shown to meet the budget; the front is written.
        DiffaccelError: For any mistake in the settings; nothing is written then.
    """
    began = time.perf_counter()
    check_options(settings.device, settings.dtype, settings.guidance, settings.scheduler)
    check_claim(settings.claim, settings.images)
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    check_output(out)
    with quiet([]):
        pipe = load(settings.model, settings.scheduler, settings.device, settings.dtype)
        stored = stored_file(pipe) if store else None
        judge = Judge(settings.claim.budget.quality, settings.device, settings.protocol)
        sampler = _sampler(settings, pipe, prompts)
        folder = folder_of(out / "measured", _facts(settings, pipe, sampler, judge))
        with counting("measurements") as advance:
            measurements = Measurements(pipe, sampler, judge, settings.batch, folder, lambda: advance(1))
            trials, choice, plan = Tuning(settings, pipe, sampler, measurements).run()
    record = _record(settings, trials, choice, plan, time.perf_counter() - began)
    files: dict[str, str | bytes] = {} if plan is None else {"plan.json": plan.text}
    files |= {
        "front.json": json.dumps(record, indent=1, allow_nan=False),
        "front.png": _plot(settings, trials),
    }
    write_files(out, files)
    if plan is None:
        raise NoPlan(_why(settings, trials, choice))
    if stored is not None:
        plan.save(stored)
    return record


def _sampler(settings: Settings, pipe: Any, prompts: list[str] | None) -> Sampler:
    """Returns conditions and seeds of all images; prompts in random order, again if there are too few."""
    count = settings.searched.stop
    if prompts is None:
        conditions = default_conditions(settings.model, pipe, count)
    else:
        order = random.Random(settings.seed).sample(prompts, len(prompts))
        conditions = [order[n % len(order)] for n in range(count)]
    return Sampler(pipe, conditions, settings.steps, settings.guidance, settings.seed, count)


def _facts(settings: Settings, pipe: Any, sampler: Sampler, judge: Judge) -> dict[str, Any]:
    """Returns everything that a measurement depends on but for the candidate and the images' numbers."""
    return plain({
        **facts_of(pipe), "steps": settings.steps, "guidance": sampler.guidance, "batch": settings.batch,
        "seed": settings.seed, "conditions": settings_digest({"conditions": sampler.conditions}),
        "device": settings.device, "dtype": settings.dtype, "judge": judge.record,
    })  # fmt: skip


def _plain_settings(settings: Settings) -> dict[str, Any]:
    return plain({**asdict(settings), "prompts": str(settings.prompts or "built in")})


def _record(settings: Settings, trials: Sequence[Trial], choice: Choice, plan: Plan | None,
            seconds: float) -> dict[str, Any]:  # fmt: skip
    best = front(trials)
    budget = settings.claim.budget
    speedups = {candidate.label: _timing(timing) for candidate, timing in choice.speedups.items()}
    rows = [
        {
            "label": trial.candidate.label, **trial.candidate.to_plain(), "images": trial.measured.count,
            "evaluated": trial.measured.evaluated, "cost": trial.cost, "front": trial in best,
            "expected": None if trial.measured.failure else budget.value_of(trial.loss),
            "failure": trial.measured.failure, "speedup": speedups.get(trial.candidate.label),
        }
        for trial in sorted(trials, key=lambda trial: trial.cost)
    ]  # fmt: skip
    return plain({
        "kind": "tune", "settings": _plain_settings(settings), "metric": budget.quality, "seconds": seconds,
        "rows": rows, "tests": choice.tests, "plan": None if plan is None else plan.to_dict(),
    })  # fmt: skip


def _timing(timing: Timing) -> dict[str, Any]:
    return {"median": timing.median, "quartiles": timing.quartiles, "values": timing.values}


def _plot(settings: Settings, trials: Sequence[Trial]) -> bytes:
    """Draws the front, and plain fewer steps beside it."""
    budget, points = settings.claim.budget, list[Point]()
    best = front(trials)
    for trial in trials:
        if trial.measured.failure or not (trial in best or not trial.candidate.genes) or not trial.loss:
            continue
        speed = 1 / trial.cost
        middle = float(np.median(budget.losses(trial.measured.values)))
        kind = "accelerated" if trial.candidate.genes else "plain"
        points.append(Point(trial.candidate.label, kind, (speed,) * 3, (trial.loss, middle, trial.loss)))
    name = {"psnr": "RMS error", "ssim": "1 - SSIM"}.get(budget.quality, budget.quality)
    return draw_plot(points, "speed-up by floating-point operations",
                     f"{name}, expected of the worst of {settings.images}", True, False)  # fmt: skip


def _why(settings: Settings, trials: Sequence[Trial], choice: Choice) -> str:
    """Returns why there is no plan."""
    if choice.winner is not None:
        return f"{choice.winner.label} meets {settings.budget}, and is no faster than the plain run"
    if choice.tests:
        last = choice.tests[-1]["label"]
        return f"no plan for {settings.budget}: {last} failed the final test; allow more, or see front.png"
    return (f"no plan for {settings.budget}: none of {len(trials)} candidates comes near it; allow more, or "
            "see front.png")  # fmt: skip


def lines_of(record: dict[str, Any], out: Path) -> list[str]:
    """Returns what was found as lines of text."""
    plan = record["plan"]
    promise, cost = plan["promise"], plan["cost"]
    sides = "at least" if promise["metric"] in ("psnr", "ssim") else "at most"
    return [
        f"plan: {plan['label']}",
        f"{promise['metric']} {sides} {float(promise['bound']):.4g} in {100 * promise['coverage']:g} % of "
        f"images, with confidence {promise['confidence']:g}; worst of {promise['images']} test images: "
        f"{float(promise['worst']):.4g}",
        f"{cost['evaluated']:.4g} of {cost['evaluated_plain']:.4g} evaluations, speed-up "
        f"{cost['speedup']:.2f} ({len(cost['speedups'])} rounds of {cost['batch']} images)",
        f"tuned in {record['seconds']:.0f} s",
        f'use accel="{out / "plan.json"}"; front: {out / "front.png"}',
    ]  # fmt: skip

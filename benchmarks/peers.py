"""Peers in one run: training-free accelerators of others, fewer steps, and ours, on one noise and one clock.

``python benchmarks/peers.py measure tiny-fashion-sd tiny-fashion-dit`` writes ``peers-<model>.json`` here:
all methods at several settings, at 50 and at 20 steps, batch by batch in turn, so that the plain run and all
others meet the same conditions; the first batch warms up and counts operations, the others are timed; all
make the images that are compared.  ``... measure sdxl sd3 flux`` tells for random weights what runs, what
refuses, and what it costs.  ``... tables`` writes ``docs/benchmarks.md``.  What is measured is kept in
``--work``, so that it goes on where it was stopped.  The peers are in the extra ``peers``.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from described import described
from frechet import frechet_of
from peer_methods import PEERS, Subject
from peer_models import SHAPES, shape
from peer_trials import STEPS, costs, trials
from torch import Tensor

from diffaccel import zoo
from diffaccel.cli.reading import set_scheduler
from diffaccel.eval import (
    Extractor,
    Sampler,
    Timing,
    collect,
    count_calls,
    count_flops,
    fidelity,
    interleave,
    open_images,
    protocol,
    timed,
)
from diffaccel.eval.fidelity import as_bytes, mean_estimate
from diffaccel.eval.perceptual import feature_distance
from diffaccel.eval.provenance import machine, plain, versions
from diffaccel.eval.sampler import default_conditions
from diffaccel.files import whole
from diffaccel.kept import kept_arrays
from diffaccel.pipelines import attached, resolve
from diffaccel.pipelines.accelerator import tag
from diffaccel.samplers.searched import fitting
from diffaccel.zoo.folders import quiet

FOLDER, SEED = Path(__file__).parent, 400_000_000
DOC = FOLDER.parent / "docs" / "benchmarks.md"
GUIDANCE = {"tiny-fashion-sd": 5.0, "tiny-fashion-dit": 2.5}
SHARES = (0.7, 0.5, 0.36, 0.26, 0.2, 0.16, 0.12)
"""Fewer steps, as parts of all."""

TOLERANCES = (0.003, 0.007, 0.014, 0.03, 0.06)
LONGER = ((0.03, 5), (0.06, 5), (0.06, 7))
"""Tolerances with more than three skipped steps in a row."""

OURS: dict[str, list[dict[str, Any]]] = {
    "any": [
        *({"sada": {"tolerance": value}} for value in TOLERANCES),
        *({"sada": {"tolerance": value, "max_skips": count}} for value, count in LONGER),
        {"reuse": {"every": 2}},
    ],
    "transformer": [{"inherit": {"every": every, "order": 1}} for every in (2, 3, 5)],
    "unet": [
        *({"inherit": {"every": every, "order": 1}} for every in (2, 3, 5)), {"inherit": {}},
        {"inherit": {"level": "block", "every": 2, "order": 1}},
    ],
}  # fmt: skip
"""Our accelerators for any model and by kind of denoiser; ``sada`` has its presets at .003, .007 and .014."""


@dataclass(frozen=True)
class Method:
    """A row: a method at one setting.

    Arguments:
        group: "plain", "steps", "peer" or "ours".
        name: The method.
        setting: Its setting, as text.
        steps: The steps of the call.
        attach: Attaches it to the pipeline.
        content: What its setting does not tell: the schedule or the plan, as text.
    """

    group: str
    name: str
    setting: str
    steps: int
    attach: Callable[[], AbstractContextManager[Any]] = nullcontext
    content: str = ""

    @property
    def file(self) -> str:
        """The name that its measurements are kept under."""
        text = f"{self.group} {self.name} {self.setting}"
        digest = hashlib.sha256((text + self.content).encode()).hexdigest()[:8]
        return f"{re.sub('[^A-Za-z0-9.]+', '-', text)[:60]}-{digest}"


def methods(subject: Subject, steps: int, guidance: float, plan: str) -> list[Method]:
    """Returns all rows for a model, the plain run first.

    Arguments:
        subject: The model.
        steps: The steps of the plain run.
        guidance: The guidance scale.
        plan: The file of a plan for ``auto``; empty for none.
    """
    pipe, kind = subject.pipe, subject.kind
    rows = [Method("plain", "plain", "", steps)]
    fewer = sorted({max(2, round(share * steps)) for share in SHARES}, reverse=True)
    rows += [Method("steps", "fewer steps", f"{count} steps", count) for count in fewer]
    for peer in PEERS:
        rows += [Method("peer", peer.name, _text(options), steps,
                        functools.partial(peer.attach, subject, steps, True, **options))
                 for options in peer.curve(kind, steps)]  # fmt: skip
    specs: list[Any] = [*OURS["any"], *OURS[kind], *([{"auto": {"file": plan}}] if plan else [])]
    for spec in specs:
        (stack,) = resolve(spec)
        setting = tag(stack).removeprefix(stack.name).strip("()")
        content = ""
        if stack.name == "auto":
            setting, content = Path(plan).name, Path(plan).read_text(encoding="utf-8")
        rows.append(
            Method("ours", stack.name, setting, steps, functools.partial(attached, pipe, spec), content)
        )
    known = [] if resolve("s3")[0].check(pipe) else fitting(pipe, guidance=guidance)
    rows += [Method("ours", "s3", f"{schedule.evaluations} steps", schedule.evaluations,
                    functools.partial(attached, pipe, "s3"), json.dumps(schedule.to_dict()))
             for schedule in known if schedule.evaluations < steps]  # fmt: skip
    return rows


def _text(options: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


class Runs:
    """All rows of one model at one number of steps.

    Arguments:
        model: A model of the zoo.
        subject: It, loaded.
        steps: The steps of the plain run.
        arguments: The command's.
    """

    def __init__(self, model: str, subject: Subject, steps: int, arguments: argparse.Namespace) -> None:
        self.subject, self.pipe, self.steps = subject, subject.pipe, steps
        self.count, self.batch = arguments.n, arguments.batch
        self.folder = arguments.work / f"{model}-{steps}-{self.count}-{self.batch}"
        conditions = default_conditions(model, self.pipe, self.count)
        self.sampler = Sampler(self.pipe, conditions, steps, GUIDANCE[model], SEED, self.count)
        plan = dict(given.split("=", 1) for given in arguments.plan).get(f"{model}@{steps}", "")
        self.methods = methods(subject, steps, GUIDANCE[model], plan)
        if arguments.only:
            self.methods = [row for row in self.methods
                            if row.group == "plain" or re.search(arguments.only, row.name)]  # fmt: skip
        self.failures: dict[str, str] = {}
        self.plain_seconds: dict[int, float] = {}
        """Of the plain run by batch, in this process."""

    def measure(self) -> None:
        """Runs all batches of all methods, batch by batch in turn."""
        rounds = -(-self.count // self.batch)

        def after(turn: int, position: int, found: dict[str, Any]) -> None:
            method = self.methods[position]
            if "failure" in found:
                self.failures[method.file] = str(found["failure"])
            spent = found.get("failure", f"{float(found.get('seconds', 0)):.2f} s")
            print(f"{self.steps} steps, batch {turn}, {method.name} {method.setting}: {spent}", flush=True)

        # batches are told apart by their turn, which a task is not told: the turns come in order
        turns = {method.file: iter(range(rounds)) for method in self.methods}
        tasks = [functools.partial(self._task, method, turns[method.file]) for method in self.methods]
        interleave(tasks, rounds, after)

    def _task(self, method: Method, turns: Any) -> dict[str, Any]:
        return self.part(method, next(turns))

    def part(self, method: Method, turn: int) -> dict[str, Any]:
        """Returns one batch of a method: images and cost, of the first in operations, not in time."""
        if method.file in self.failures:
            return {"failure": self.failures[method.file]}
        make = functools.partial(self._run, method, turn)
        try:
            return kept_arrays(self.folder / f"{method.file}-{turn}.npz", make)
        except Exception as error:  # a peer's own, which its row reports
            return {"failure": described(error)}

    def _run(self, method: Method, turn: int) -> dict[str, Any]:
        made: list[Tensor] = []

        def call() -> None:
            made.append(self._call(method.steps, turn))

        cost: dict[str, float] = {}
        with method.attach():
            if turn == 0:
                with count_calls(self.subject.model) as calls:
                    flops = count_flops(call)
                cost |= {"flops": flops / len(made[0]), "calls": calls.calls}
            else:
                cost["seconds"] = timed(call, torch.device("cpu"))[1]
        reports = self.sampler.reports
        if reports and method.group == "ours":
            cost["evaluated"] = sum(size * report.evaluated for size, report in reports) / len(made[0])
        if turn and method.group == "plain":
            self.plain_seconds[turn] = cost["seconds"]
        elif turn:
            cost["plain_seconds"] = self._plain(turn)
        return {"images": made[0].numpy(), **cost}

    def _plain(self, turn: int) -> float:
        """Returns the seconds of the plain run in this process, which another row is compared with."""
        if turn not in self.plain_seconds:
            self.part(self.methods[0], turn)  # times it, unless another process has
        if turn not in self.plain_seconds:
            self.plain_seconds[turn] = timed(lambda: self._call(self.steps, turn), torch.device("cpu"))[1]
        return self.plain_seconds[turn]

    def _call(self, steps: int, turn: int) -> Tensor:
        """Returns the images of one batch."""
        start = turn * self.batch
        return self.sampler(steps, self.batch, start, start + self.batch)

    def images(self, method: Method) -> Tensor:
        """Returns all images of a method."""
        rounds = range(-(-self.count // self.batch))
        return torch.cat([torch.from_numpy(self.part(method, turn)["images"]) for turn in rounds])


class Scores:
    """What images of a row are worth, against the plain run of the same noise and against real images."""

    def __init__(self, reference: Tensor) -> None:
        self.reference = reference
        self.extractor = Extractor(protocol("fashion"), "cpu")
        self.real = collect(open_images(zoo.reference()[0]), self.extractor, ("features",))
        self.network = Extractor(protocol("offline"), "cpu")
        self.known: dict[bytes, Any] = {}
        _, self.distance, self.influence = frechet_of(as_bytes(reference), self.extractor, self.real)

    def __call__(self, images: Tensor) -> dict[str, Any]:
        """Returns the scores by name, as plain data."""
        _, distance, influence = frechet_of(as_bytes(images), self.extractor, self.real)
        found = fidelity(images, self.reference)
        seen = feature_distance(images, self.reference, self._features, batch=16)
        return {
            "rms": found.rms, "psnr": found.psnr, "relative": found.relative,
            "ssim": None if found.ssim is None else found.ssim.to_dict(),
            "feature_distance": seen.to_dict(),
            "fd": {"value": distance, "se": mean_estimate(influence).se},
            "fd_minus_plain": {"value": distance - self.distance,
                               "se": mean_estimate(influence - self.influence).se},
        }  # fmt: skip

    def _features(self, pixels: Tensor) -> Any:
        """Returns features, which those of the plain run are kept of."""
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if key not in self.known:
            self.known[key] = self.network(pixels)
        return self.known[key]


def rows_of(runs: Runs) -> list[dict[str, Any]]:
    """Returns the rows of the record, as plain data."""
    first = runs.methods[0]
    scores, rows = Scores(runs.images(first)), []
    rounds = range(1, -(-runs.count // runs.batch))
    times = [float(runs.part(first, turn)["seconds"]) for turn in rounds]
    for method in runs.methods:
        row = {key: getattr(method, key) for key in ("group", "name", "setting", "steps")}
        if method.file in runs.failures:
            rows.append({**row, "failure": runs.failures[method.file]})
            continue
        parts = [runs.part(method, turn) for turn in (0, *rounds)]
        seconds = [float(part["seconds"]) for part in parts[1:]]
        plain_times = [
            float(part.get("plain_seconds", known)) for part, known in zip(parts[1:], times, strict=True)
        ]
        speed = Timing(tuple(a / b for a, b in zip(plain_times, seconds, strict=True)))
        evaluated = [float(part["evaluated"]) for part in parts if "evaluated" in part]
        rows.append({
            **row, "flops": float(parts[0]["flops"]), "calls": int(parts[0]["calls"]),
            "evaluated": statistics.mean(evaluated) if evaluated else int(parts[0]["calls"]),
            "seconds": seconds,
            "speedup": {"median": speed.median, "low": min(speed.values), "high": max(speed.values)},
            **scores(torch.from_numpy(np.concatenate([part["images"] for part in parts]))),
        })  # fmt: skip
    return rows


def measure_model(model: str, arguments: argparse.Namespace) -> None:
    """Measures a model of the zoo, and writes its record after each number of steps."""
    with quiet([]):
        pipe: Any = zoo.load(model)
    pipe.set_progress_bar_config(disable=True)
    if model == "tiny-fashion-sd":
        set_scheduler(pipe, "dpm++(timestep_spacing=trailing)")
    few = default_conditions(model, pipe, 4)
    other = Sampler(pipe, few, 50, GUIDANCE[model], SEED - 1000, 4)
    subject = Subject(pipe, other)
    record = _record(model) | {
        "guidance": GUIDANCE[model], "seed": SEED,
        "scheduler": type(pipe.scheduler).__name__, "scheduler_config": dict(pipe.scheduler.config),
    }  # fmt: skip
    record["trials"] = trials(subject, lambda: other(STEPS, 2, 0, 2))
    for steps in arguments.steps:
        began = time.monotonic()
        runs = Runs(model, subject, steps, arguments)
        runs.measure()
        rows, minutes = rows_of(runs), (time.monotonic() - began) / 60
        found = {"n": runs.count, "batch": runs.batch, "minutes": minutes, "rows": rows}
        record["runs"][str(steps)] = found
        _write(model, record)


def measure_shape(name: str, arguments: argparse.Namespace) -> None:
    """Tries everything on a model with random weights, and writes its record."""
    from tiny_pipelines import run

    case = shape(name)
    pipe = case.build()
    subject = Subject(pipe, lambda steps: run(case, pipe, steps, seed=1))
    began = time.monotonic()

    def call() -> Tensor:
        return run(case, pipe, STEPS)

    record = _record(name) | {"pairs": arguments.pairs}
    record["trials"] = trials(subject, call)
    costs(subject, call, record["trials"], arguments.pairs)
    record["minutes"] = (time.monotonic() - began) / 60
    _write(name, record)


def _record(model: str) -> dict[str, Any]:
    """Returns a record without measurements; those of other numbers of steps stay."""
    file = FOLDER / f"peers-{model}.json"
    known = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}
    found = {name: importlib.metadata.version(name) for name in ("cache-dit", "DeepCache", "tomesd")}
    return {"model": model, "runs": known, "trial_steps": STEPS, "machine": machine(torch.device("cpu")),
            "versions": {**versions(), **found}}  # fmt: skip


def _write(model: str, record: dict[str, Any]) -> None:
    with whole(FOLDER / f"peers-{model}.json") as temporary:
        temporary.write_text(json.dumps(plain(record), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "tables"))
    parser.add_argument("models", nargs="*", help=f"of {', '.join([*GUIDANCE, *SHAPES])}; all by default")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--n", type=int, default=64, help="images; one batch is not timed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of calls, for random weights")
    parser.add_argument(
        "--only", default="", help="a regular expression for names: a record of some rows, to try"
    )
    parser.add_argument("--plan", nargs="*", default=[], help="MODEL@STEPS=FILE: plans for auto")
    parser.add_argument("--work", type=Path, default=Path("out/peers"), help="what is measured")
    arguments = parser.parse_args()
    if arguments.what == "tables":
        from peers_tables import tables

        found = [file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("peers-*.json"))]
        if found:
            DOC.write_text(tables([json.loads(text) for text in found]), encoding="utf-8")
        return
    if arguments.n < 2 * arguments.batch:
        parser.error("--n is at least two batches: the first is not timed")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    for model in arguments.models or [*GUIDANCE, *SHAPES]:
        (measure_shape if model in SHAPES else measure_model)(model, arguments)


if __name__ == "__main__":
    main()

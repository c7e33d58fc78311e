"""S3 against diffusers' schedulers at few evaluations, on noise that the search has not seen.

``python benchmarks/few_evaluations.py tiny-fashion-sd --nfe 5 6`` writes ``s3-tiny-fashion-sd.json`` here:
the distance of the images to the fine solution, and the Fréchet distance to the zoo's reference images with
the paired difference to S3. It goes on where it was stopped: what is measured is kept in ``--work``.
With ``--dtype bfloat16`` the denoiser runs under autocast, with ``--compile`` it is compiled (on two CPU
cores 1.5 times as fast for the DiT, 1.2 times for the UNet); the distances are those of the first
``--distances`` images.  ``... MODEL tables`` writes ``docs/few-evaluations-table.md`` from the records of
all models.
"""

import argparse
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch._inductor.config as inductor_config
from accelerate.utils import convert_outputs_to_fp32
from frechet import frechet_of
from kept import kept

from diffaccel import zoo
from diffaccel.cli.reading import set_scheduler
from diffaccel.cli.tables import Lines, markdown, shown
from diffaccel.errors import DiffaccelError
from diffaccel.eval import Extractor, Sampler, collect, open_images, protocol
from diffaccel.eval.fidelity import mean_estimate
from diffaccel.eval.provenance import machine, versions
from diffaccel.eval.sampler import default_conditions
from diffaccel.files import whole
from diffaccel.pipelines import attached
from diffaccel.pipelines.run import denoisers_of
from diffaccel.samplers import Schedule, solver_schedule
from diffaccel.samplers.family import solver_of
from diffaccel.samplers.gits import gits_grids
from diffaccel.samplers.objective import Objective, fine_schedule
from diffaccel.samplers.searched import fitting
from diffaccel.zoo.folders import quiet

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
SEED = 900_000_000  # far from the seeds of the search
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {"timestep_spacing": "trailing"}),
    ("EulerDiscrete", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistep", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"timestep_spacing": "trailing", "solver_order": 3}),
    ("DPMSolverSinglestep", {}),
    ("UniPCMultistep", {"timestep_spacing": "trailing"}),
    ("UniPCMultistep", {"timestep_spacing": "trailing", "solver_order": 3}),
    ("DEISMultistep", {"timestep_spacing": "trailing"}),
    ("PNDM", {"timestep_spacing": "trailing", "skip_prk_steps": True}),
    ("LMSDiscrete", {"timestep_spacing": "trailing"}),
]
"""diffusers' deterministic schedulers with one evaluation a step, on the grid that suits them.

Left out are copies (DDIMParallel), those of other kinds of models (EDM, TCD), IPNDM, whose noise levels are
its own, DPMSolverSDE, which needs torchsde, and FlowMatchEuler and FlowMatchHeun, with which `DiTPipeline`
does not run.
"""

OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("HeunDiscrete", {"timestep_spacing": "trailing"}),
    ("KDPM2Discrete", {"timestep_spacing": "trailing"}),
    ("SASolver", {"timestep_spacing": "trailing"}),
    ("DDPM", {"timestep_spacing": "trailing"}),
    ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
]
"""Those with two evaluations a step, and random ones, which are no solvers of what distances compare with.

They have rows where S3 is to be better than every other, at 5 and 6 evaluations.
"""

GITS = 6
"""The most evaluations for which there are rows of GITS' grids, which gain nothing from more."""

OURS = ("S3", "S3 before polishing")
"""The rows of searched schedules: those that ship, and those that steps were only fitted for."""


class Runs:
    """Images of one model by several schedulers, and their scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.batch, self.device = arguments.model, arguments.batch, arguments.device
        count, guidance, dtype = arguments.n, arguments.guidance, arguments.dtype
        self.work = arguments.work / f"{self.model}-{count}-{guidance}-{dtype}"
        self.pipe = prepared(self.model, self.device, dtype, arguments.compile)
        self.plain = self.pipe.scheduler
        conditions = default_conditions(self.model, self.pipe, count)
        self.sampler = Sampler(self.pipe, conditions, 10, guidance, SEED, count)
        self.extractor = Extractor(protocol("fashion"), self.device)
        images, _ = zoo.reference()
        self.reference = collect(open_images(images), self.extractor, ("features",))
        self.distances = min(arguments.distances, count)
        self.fine = torch.from_numpy(self._kept(f"fine-{self.distances}", self._fine)["images"])

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns what was measured under a name, measured now if it was not."""
        return kept(self.work / f"{name}.npz", make)

    def _fine(self) -> dict[str, Any]:
        """Returns the images of the fine solution."""
        return {"images": self._solved(fine_schedule(self.pipe, 100), 100, self.distances).numpy()}

    def _solved(self, schedule: Schedule, steps: int, stop: int | None = None) -> torch.Tensor:
        self.pipe.scheduler = solver_of(self.plain, schedules=[schedule.to_dict()])
        try:
            return self.sampler(steps, self.batch, stop=stop)
        finally:
            self.pipe.scheduler = self.plain

    def score(self, images: torch.Tensor) -> dict[str, Any]:
        """Returns the distance to the fine solution, and what the Fréchet distance needs."""
        square = (images[: self.distances] - self.fine).double().square().flatten(1).mean(1)
        _, distance, influence = frechet_of(images.clamp(0, 1), self.extractor, self.reference)
        return {"rms": float(square.mean().sqrt()), "fd": distance, "influence": influence}

    def s3(self, steps: int, file: str) -> dict[str, Any]:
        """Returns the scores of the searched schedule."""

        def make() -> dict[str, Any]:
            with attached(self.pipe, f"s3:{file}" if file else "s3"):
                return self.score(self.sampler(steps, self.batch))

        schedules = fitting(self.pipe, file, self.sampler.guidance)
        text = json.dumps([schedule.to_dict() for schedule in schedules if schedule.evaluations == steps])
        return self._kept(f"s3-{steps}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", make)

    @functools.cached_property
    def objective(self) -> Objective:
        """What a grid is chosen by, on noise of the search."""
        conditions = default_conditions(self.model, self.pipe, 64)
        return Objective(self.pipe, conditions, self.sampler.guidance, 7_000_000, 64)

    def gits(self, steps: int, solver: str) -> dict[str, Any]:
        """Returns the scores of a known solver on the best of GITS' grids; chosen on noise of the search."""

        def make() -> dict[str, Any]:
            grids = gits_grids(self.objective.trajectory, solver_of(self.plain).path, steps)
            best = min((solver_schedule(solver, nodes) for nodes in grids), key=self.objective)
            return self.score(self._solved(best, steps))

        return self._kept(f"gits-{solver}-{steps}", make)

    def known(self, name: str, options: dict[str, Any], steps: int) -> dict[str, Any]:
        """Returns the scores of one of diffusers' schedulers."""

        def make() -> dict[str, Any]:
            try:
                set_scheduler(self.pipe, f"{name}Scheduler")
                cls = getattr(diffusers, f"{name}Scheduler")
                with quiet([]):
                    self.pipe.scheduler = cls.from_config(self.pipe.scheduler.config, **options)
                if cls.order == 2 and steps % 2 == 0:  # two evaluations in each step but the last
                    raise ValueError(f"it takes no even number of evaluations, such as {steps}")
                return self.score(self.sampler((steps + cls.order - 1) // cls.order, self.batch))
            finally:
                self.pipe.scheduler = self.plain

        return self._kept(f"{label_of(name, options)}-{steps}", make)


def prepared(model: str, device: str, dtype: str, compiled: bool) -> Any:
    """Returns a pipeline of the zoo whose denoiser runs in a type, and compiled if that is wanted."""
    with quiet([]):
        pipe: Any = zoo.load(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    networks = list(denoisers_of(pipe).values())
    if compiled:
        compile_frozen(networks)
    if dtype != "float32":
        autocast(networks, device, getattr(torch, dtype))
    return pipe


def autocast(networks: Iterable[torch.nn.Module], device: str, dtype: torch.dtype) -> None:
    """Lets networks run under autocast; what they return is float32, so that solvers work in it."""
    for network in networks:
        network.forward = convert_outputs_to_fp32(torch.autocast(device, dtype)(network.forward))


def compile_frozen(networks: Iterable[torch.nn.Module]) -> None:
    """Compiles networks for batches of one size, with their weights as constants."""
    inductor_config.freezing = True
    for network in networks:
        network.forward = torch.compile(network.forward, dynamic=False)


def compare(runs: Runs, steps: int, files: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows of one number of evaluations, those of S3 first."""
    chosen: dict[Schedule, str] = {}
    for file in files:
        for schedule in fitting(runs.pipe, file, runs.sampler.guidance):
            if schedule.evaluations == steps:
                chosen.setdefault(schedule, file)  # one row where nothing was polished
    ours = [runs.s3(steps, file) for file in chosen.values()]
    rows = [row_of(label, steps, own, ours) for label, own in zip(OURS, ours, strict=False)]
    rows += [row_of(f"{solver} on GITS' grid", steps, runs.gits(steps, solver), ours)
             for solver in ("dpm++2m", "unipc2") if steps <= GITS]  # fmt: skip
    for name, options in [*SCHEDULERS, *(OTHERS if steps in (5, 6) else ())]:
        label = label_of(name, options)
        try:
            rows.append(row_of(label, steps, runs.known(name, options, steps), ours))
        except (DiffaccelError, ValueError, RuntimeError, IndexError) as error:
            print(f"{label}: {' '.join(str(error).split())[:100]}")
    return rows


def label_of(name: str, options: dict[str, Any]) -> str:
    """Returns the name of a row."""
    return ", ".join([name, *(f"{key}={value}" for key, value in options.items())])


def row_of(label: str, steps: int, found: dict[str, Any], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row as plain data; the differences are this one minus those of S3, paired."""
    h = found["influence"]
    row = {
        "label": label, "evaluations": steps, "rms": found["rms"],
        "fd": {"value": found["fd"], "se": mean_estimate(h).se},
        "fd_minus": [{"value": found["fd"] - own["fd"], "se": mean_estimate(h - own["influence"]).se}
                     for own in ours],
    }  # fmt: skip
    differences = " ".join(shown(difference, True) for difference in row["fd_minus"])
    print(f"{steps} {label:60} rms {row['rms']:.4f}  FD {shown(row['fd'])}  - S3 {differences}", flush=True)
    return row


def tables() -> None:
    """Writes ``docs/few-evaluations-table.md`` from the records."""
    texts = []
    for file in sorted(FOLDER.glob("s3-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        texts.append(
            f"## `{record['model']}`, guidance {record['guidance']:g}\n\n"
            f"{record['n']} images, protocol `{record['protocol']}`, reference images of the zoo; distances "
            f"of {record['distances']} of them to the fine solution, 100 steps of UniPC 3; denoiser in "
            f"{record['dtype']}, {record['machine']['device']}. Noise that no search has seen.\n"
        )
        texts += [_table(steps, rows) for steps, rows in _by_evaluations(record["rows"]).items()]
    (DOCS / "few-evaluations-table.md").write_text("\n".join(texts), encoding="utf-8")


def _by_evaluations(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["evaluations"], []).append(row)
    return found


def _table(steps: int, rows: list[dict[str, Any]]) -> str:
    """Returns the table of one number of evaluations, the nearest to the fine solution first."""
    ours, known = rows[0], [row for row in rows if row["label"].split(",")[0] in dict([*SCHEDULERS, *OTHERS])]
    known = [row for row in known if math.isfinite(row["rms"])]
    broken = [row["label"] for row in rows if not math.isfinite(row["rms"])]
    best = min(known, key=lambda row: row["rms"])
    head = [f"{steps} evaluations", "RMS to the fine solution", "FD"]
    head += [f"FD - that of {label}, paired" for label, _ in zip(OURS, ours["fd_minus"], strict=False)]
    cells = [[row["label"], f"{row['rms']:.4f}", shown(row["fd"]), *(shown(d, True) for d in row["fd_minus"])]
             for row in sorted(rows, key=lambda row: row["rms"]) if math.isfinite(row["rms"])]  # fmt: skip
    part = 100 * ours["rms"] / best["rms"]
    text = f"S3's distance is {part:.0f} % of that of the best of diffusers' schedulers, {best['label']}."
    if broken:
        text += f" Not finite: {', '.join(broken)}."
    return f"{markdown(Lines('few', head, [('plain', line) for line in cells], ()))}\n{text}\n"


def measure(arguments: argparse.Namespace) -> None:
    """Measures and writes the record, number by number."""
    runs = Runs(arguments)
    rows: list[dict[str, Any]] = []
    for steps in arguments.nfe:
        rows += compare(runs, steps, [arguments.file, *arguments.fitted])
        record = {
            "model": arguments.model, "guidance": arguments.guidance, "n": arguments.n, "seed": SEED,
            "dtype": arguments.dtype, "distances": runs.distances, "rows": rows, "protocol": "fashion",
            "machine": machine(torch.device(arguments.device)), "versions": versions(),
        }  # fmt: skip
        with whole(FOLDER / f"s3-{arguments.model}.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=zoo.names())
    parser.add_argument("what", nargs="?", choices=("measure", "tables"), default="measure")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--file", default="", help="schedules; those that ship by default")
    parser.add_argument("--fitted", nargs=1, default=[], help="schedules before polishing, for a row more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="let --batch divide --n")
    parser.add_argument("--distances", type=int, default=256, help="images whose distance is measured")
    parser.add_argument("--work", type=Path, default=Path("out/few"), help="what is measured")
    arguments = parser.parse_args()
    if arguments.what == "tables":
        tables()
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

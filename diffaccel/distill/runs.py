"""From settings to a run: the networks, the data and the folder, for a beginning and for going on."""

import copy
import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .. import zoo
from ..errors import ModelError, OptionError
from ..eval.provenance import model_digest
from ..files import read_object, whole
from ..pipelines.branches import is_embedded
from . import checkpoints
from .adapters import add_lora
from .assembly import averaged, check_grids
from .checkpoints import CheckpointError
from .config import Config, merge
from .data import PairData
from .denoiser import Denoiser
from .export import export, export_lora
from .grid import fixed_grid
from .host import Host
from .method import Method, Setup
from .pair_store import PairStore
from .students import check_border, prune, student_like
from .trainer import Trainer
from .units import Units

__all__ = ["Run", "export_run", "guidance_of", "read_config", "resume", "start"]

SETTINGS = "config.json"
STUDENT = "student"
"""The name of the student's LoRA adapter."""

_COURSE = (
    "method", "options", "student", "student_changes", "lora_rank", "batch", "images", "optimizer",
    "optimizer_options", "lr", "warmup_images", "lr_decay", "clip", "ema_images", "precision", "seed",
)  # fmt: skip
"""The settings that decide the course of a run; the others may change when it goes on."""


@dataclass(frozen=True)
class Run:
    """A run, ready to train.

    Arguments:
        config: The settings.
        folder: Its folder.
        pipe: The teacher's pipeline.
        host: How that uses its network.
        method: The method.
        trainer: What trains.
        store: The pairs.
    """

    config: Config
    folder: Path
    pipe: Any
    host: Host
    method: Method
    trainer: Trainer
    store: PairStore


def start(config: Config) -> Run:
    """Begins a run in a new folder.

    Raises:
        CheckpointError: If the folder holds a run.
        DiffaccelError: If settings, teacher and data do not go together.
    """
    folder = _folder(config)
    if checkpoints.find(folder):
        raise CheckpointError(f"{str(folder)!r} holds a run; go on with 'diffaccel distill resume {folder}'")
    run = _build(config, folder)
    if run.trainer.accelerator.is_main_process:
        _write(config, folder)
        (folder / "log.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / "raw", ignore_errors=True)  # of a run that came to no checkpoint
    run.trainer.accelerator.wait_for_everyone()
    return run


def resume(folder: Path, overrides: tuple[str, ...] = (), training: bool = True) -> Run:
    """Goes on with a run from its newest checkpoint that can be read.

    Arguments:
        folder: The folder of the run.
        overrides: Settings that do not decide the course, as ``key=value``.
        training: Whether it is to be trained on; if not, any number of processes, on any device, will do.

    Raises:
        CheckpointError: If there is no checkpoint that can be read, or it is of other settings.
    """
    found = checkpoints.find(folder)
    if not found:
        raise CheckpointError(f"no checkpoint in {str(folder)!r}; expected the folder of a run")
    config = read_config(folder)
    settings = asdict(config) if training else {**asdict(config), "precision": "no"}
    changed = merge(settings, overrides, run=str(folder))
    problems = []
    for checkpoint in found:
        run = _build(changed, folder)  # anew, since a damaged checkpoint may leave it half loaded
        try:
            checkpoints.load(run.trainer, checkpoint, training)
        except CheckpointError as error:
            if "another run" in str(error):
                raise
            problems.append(str(error))
            continue
        if training and run.trainer.accelerator.is_main_process:
            _write(changed, folder)
            _cut_log(folder / "log.jsonl", run.trainer.images)
            for later in found[: found.index(checkpoint)]:  # damaged; the name is needed again
                damaged = later.with_name(f"damaged-{later.name}")
                shutil.rmtree(damaged, ignore_errors=True)
                later.rename(damaged)
        return run
    raise CheckpointError("; ".join(problems))


def export_run(run: Run, out: Path, dtype: torch.dtype = torch.float16, lora: bool = False,
               overwrite: bool = False, network: nn.Module | None = None,
               about: Mapping[str, Any] | None = None) -> Path:  # fmt: skip
    """Writes the average of a run's student as a pipeline folder, and returns the folder.

    Arguments:
        run: The run.
        out: The folder.
        dtype: The type of the weights.
        lora: Whether a LoRA student leaves as an adapter for ``load_lora_weights``, not merged.
        overwrite: Whether an existing folder may be replaced.
        network: What leaves in the student's place: a network of its kind, without adapters.
        about: What its card says otherwise.

    Raises:
        OptionError: If the student is no adapter, and ``lora`` asks for one; or if rounding would
            decide which expert makes a step.
        ModelError: If the folder exists, or the loaded pipeline makes other images than the student.
    """
    config, facts = run.config, run.store.settings
    grids = [run.method.grid(n) for n in config.steps]
    guided = "" if run.store.guidance is None else f", guidance {run.store.guidance:g} (in the samples)"
    what = f"noise and the teacher's sample, {facts.get('steps')} steps"
    if run.store.kind == "real":
        what = "data and the noise that they lead back to"
    card = {
        "teacher": config.teacher, "method": config.method, "images": run.trainer.images,
        "data": f"{len(run.store)} pairs of {what}{guided}",
        "licence": "that of the teacher", "hours": f"{run.trainer.seconds / 3600:.2f}",
        "figures": run.trainer.figures, "limits": f"trained for {', '.join(map(str, config.steps))} steps",
        **(about or {}),
    }  # fmt: skip
    options: dict[str, Any] = {
        "options": run.store.options,
        "guidance": guidance_of(run.pipe), "card": card, "dtype": dtype, "overwrite": overwrite,
        "conditions": _tried(run),
    }  # fmt: skip
    experts, component = run.method.experts(), run.host.component
    check_grids(experts, run.host.units, grids)
    if lora and not config.lora_rank:
        raise OptionError("the student has weights of its own; only one with lora_rank leaves as an adapter")
    if network is not None:
        return export(network, run.pipe, component, grids, out, **options)
    with averaged(run.trainer, run.host.units) as student:
        if len(experts) == 1 and config.lora_rank:
            network = run.trainer.roles["student"].network
            if lora:
                return export_lora(network, STUDENT, run.pipe, component, grids, out, **options)
            return export(network, run.pipe, component, grids, out, lora=STUDENT, **options)
        if lora:
            return export_lora(student, None, run.pipe, component, grids, out, **options)
        return export(student, run.pipe, component, grids, out, **options)


def _tried(run: Run) -> list[str]:
    """Returns conditions to try a student on, one of each expert at least."""
    parts = [expert.conditions or () for expert in run.method.experts()]
    tried = [own[0] for own in parts if own] if len(parts) > 1 else []
    return [str(condition) for condition in tried or run.store.conditions[:2] if condition is not None]


def guidance_of(pipe: Any) -> float:
    """Returns the guidance scale to call a student with: 1, or the default where the network takes it."""
    scale = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return float(scale.default) if scale is not None and is_embedded(pipe) else 1.0


def read_config(folder: Path) -> Config:
    """Returns the settings of a run.

    Raises:
        CheckpointError: If the folder is none of a run.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise CheckpointError(f"no {SETTINGS} in {str(folder)!r}; expected the folder of a run")
    settings = read_object(file, CheckpointError)
    return merge({**settings, "run": str(folder)})


def _folder(config: Config) -> Path:
    if not config.run:
        raise OptionError("give the folder of the run: run=FOLDER")
    return Path(config.run)


def _build(config: Config, folder: Path) -> Run:
    if not config.pairs:
        raise OptionError(
            f"{config.method} needs pairs=FOLDER; see 'diffaccel distill pairs {config.teacher}'"
        )
    store = PairStore(config.pairs)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision, log_with=config.tracker or None, project_dir=folder
        )
    except (ValueError, ImportError) as error:
        raise OptionError(
            f"accelerate refuses precision={config.precision!r}, tracker={config.tracker!r}: {error}"
        ) from error
    with zoo.folders.quiet([]):
        pipe: Any = zoo.load_pipeline(config.teacher)
    digest = model_digest(pipe)
    pipe.to(accelerator.device)
    host = Host(pipe, store.options)
    if host.shape != store.shape:
        raise OptionError(f"the pairs have samples {store.shape}, but {config.teacher!r} makes {host.shape}")
    folder.mkdir(parents=True, exist_ok=True)
    method = _begun(config, host, store, accelerator.device)
    fixed_grid(pipe.scheduler, [method.grid(n) for n in config.steps])  # raises now, not after the training
    course = (*_COURSE, "steps") if method.bound else _COURSE
    facts = {**{key: asdict(config)[key] for key in course}, "teacher": digest, "pairs": store.digest}
    data = PairData(store, host, config.seed, accelerator.device, method.conditions)
    trainer = Trainer(config, method, data, accelerator, folder, json.loads(json.dumps(facts)))
    if config.tracker:
        accelerator.init_trackers("diffaccel")
    return Run(config, folder, pipe, host, method, trainer, store)


def _begun(config: Config, host: Host, store: PairStore, device: torch.device) -> Method:
    """Returns the method with its networks."""
    method, teacher = config.make_method(), host.network.requires_grad_(False)
    student, adapter = _student(config, host, store.options), STUDENT if config.lora_rank else None
    method.begin(Setup(
        host, Denoiser(teacher, host.units, "" if config.lora_rank else None),
        Denoiser(student.to(device), host.units, adapter), store.guidance, config.images,
        tuple(config.steps), config.seed, tuple(store.conditions),
    ))  # fmt: skip
    if config.gradient_checkpointing:
        for denoiser in method.networks.values():
            _checkpoint(denoiser.network)
    return method


def _checkpoint(network: Any) -> None:
    if not hasattr(network, "enable_gradient_checkpointing"):
        raise OptionError(f"{type(network).__name__} has no gradient checkpointing")
    network.enable_gradient_checkpointing()


def _student(config: Config, host: Host, options: Mapping[str, Any]) -> Any:
    """Returns the student's network."""
    teacher = host.network
    if config.lora_rank:
        add_lora(teacher, STUDENT, config.lora_rank)
        return teacher
    if config.student == "teacher":
        if config.student_changes:
            raise OptionError("student_changes go with student=random or student=pruned")
        return copy.deepcopy(teacher).requires_grad_(True)
    if config.student in ("random", "pruned"):
        student = student_like(teacher, **config.student_changes)
        check = prune if config.student == "pruned" else check_border
        check(teacher, student)
        return student.requires_grad_(True)
    with zoo.folders.quiet([]):
        other: Any = zoo.load_pipeline(config.student)
    network: Any = getattr(other, host.component, None)
    there = Host(other, options) if isinstance(network, nn.Module) else None
    if there is None or there.shape != host.shape:
        raise ModelError(f"{config.student!r} has no {host.component!r} for samples {host.shape}")
    network = there.network  # of two by noise level, both
    if type(network) is not type(host.network) or not _agree(there.units, host.units):
        raise ModelError(
            f"{config.student!r} has a {type(network).__name__} of other levels of noise, or of another "
            f"prediction, than the {type(host.network).__name__} of {config.teacher!r}"
        )
    return network.requires_grad_(True)


def _agree(first: Units, second: Units) -> bool:
    """Returns whether two networks of these units make the same of what they predict."""
    t = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    levels = zip(first.level(1 - t, t), second.level(1 - t, t), strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6) for a, b in levels)


def _write(config: Config, folder: Path) -> None:
    with whole(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def _cut_log(log: Path, images: int) -> None:
    """Removes from a log what came after some images, and lines that were cut off."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    with whole(log) as temporary:
        kept = "".join(f"{line}\n" for line in lines if _images(line) <= images)
        temporary.write_text(kept, encoding="utf-8")


def _images(line: str) -> float:
    try:
        return float(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

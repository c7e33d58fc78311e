"""From saved checkpoints to a pipeline folder: `diffaccel combine` as a function."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import zoo
from ..errors import MissingReference, ModelError, OptionError
from ..eval.protocols import Extractor, protocol
from ..eval.provenance import plain, versions
from ..eval.reference import zoo_statistics
from ..eval.sampler import default_conditions
from ..eval.scoring import reference_of
from ..eval.statistics import Statistics
from ..files import whole_folder
from ..options import check_options, option
from ..pipelines.run import denoisers_of
from .assembly import settled
from .checkpoint_files import expand, open_checkpoint
from .checkpoint_matrix import RESIDENT, CheckpointMatrix
from .checkpoints import CheckpointError
from .combination import METHODS, Combination, Found
from .deployment import SCORES, Deployment, Judge, groups_of, halves, images_needed
from .export import amend
from .lora_stack import LoraStack, is_lora
from .runs import SETTINGS, Run, export_run, guidance_of, resume
from .trial import cast
from .validation import conditions_of, student_pipe

__all__ = [
    "COMBINATION",
    "SEARCH",
    "Host",
    "Plan",
    "combine",
    "host_of",
    "host_of_run",
    "judge_of",
    "source_of",
]

COMBINATION, SEARCH = "combination.json", "search.json"
_ADAPTER = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Plan:
    """How checkpoints are combined.

    Arguments:
        steps: The steps of the deployment.
        metric: What is searched for, a name of `deployment.SCORES`.
        watch: A second score, which is only reported; "" for none.
        method: "lcsc", "lcsc-ga", "ema", "mwa", "swad" or "uniform", see `Combination`.
        budget: Evaluations of the search.
        images: Images of an evaluation; five times as many are made to score anew.
        batch: Images a call of the pipeline.
        guidance: The guidance scale, -1 for the pipeline's own.
        protocol: The protocol of the metric.
        seed: Decides everything.
        singles: Whether each checkpoint is scored first.
        cap: The largest sum of absolute coefficients; 0 for no limit.
        last: Only the last so many checkpoints; 0 for all.
        groups: Beginnings of names of tensors, each with coefficients of its own.
    """

    steps: int = option(1, low=1)
    metric: str = option("fd", choices=tuple(SCORES))
    watch: str = option("kid", choices=("", *SCORES))
    method: str = option("lcsc", choices=METHODS)
    budget: int = option(300, low=1)
    images: int = option(1000, low=2)
    batch: int = option(250, low=1)
    guidance: float = option(-1.0)
    protocol: str = option("offline")
    seed: int = option(0, low=0)
    singles: bool = option(False)
    cap: float = option(0.0, low=0.0)
    last: int = option(0, low=0)
    groups: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            OptionError: If one is of a wrong type or not allowed.
        """
        check_options(self, "the combination")
        if 0 < self.cap < 1:
            raise OptionError(f"cap is {self.cap}; coefficients sum to 1: expected 1 or more, or 0 for none")


@dataclass(frozen=True)
class Host:
    """A pipeline that combined weights are tried in.

    Arguments:
        pipe: The pipeline.
        component: The name of the network in it.
        network: The network, which is written to.
        conditions: What gives so many conditions.
        options: Further arguments of a call.
        guidance: The guidance scale, None for the pipeline's own.
        save: Writes the pipeline as it is to a folder, with weights of a type; its name, and its record.
        reference: The reference images, None for those of the zoo, or "" if there are none.
    """

    pipe: Any
    component: str
    network: nn.Module
    conditions: Callable[[int], list[str]]
    options: Mapping[str, Any]
    guidance: float | None
    save: Callable[[Path, torch.dtype, str, Mapping[str, Any]], None]
    reference: str | None


def host_of(model: str, component: str = "", device: str = "cpu",
            conditions: Sequence[str] | None = None) -> Host:  # fmt: skip
    """Returns the host of a model: a name of the zoo, a pipeline folder, a hub id, or the folder of a run.

    Arguments:
        model: The model.
        component: The name of the network, if the pipeline has several.
        device: Where it runs.
        conditions: Prompts or labels, instead of the model's own.

    Raises:
        DiffaccelError: If there is no such model.
        OptionError: If the pipeline has several networks and none is named.
    """
    if (Path(model) / SETTINGS).is_file() and (Path(model) / "checkpoints").is_dir():
        return host_of_run(resume(Path(model), training=False), device, conditions)
    pipe: Any = zoo.load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    networks = denoisers_of(pipe)
    if not component and len(networks) != 1:
        raise OptionError(f"{model!r} has the networks {', '.join(networks)}; give --component")
    name = component or next(iter(networks))
    if name not in networks:
        raise OptionError(f"{model!r} has no network {name!r}; known: {', '.join(networks)}")

    def save(folder: Path, dtype: torch.dtype, name: str, record: Mapping[str, Any]) -> None:
        whole = cast(pipe, dtype)
        whole.save_pretrained(folder)
        amend(folder, whole)

    def cycle(count: int) -> list[str]:
        return default_conditions(model, pipe, count) if conditions is None else list(conditions)

    network = networks[name].requires_grad_(False).eval()
    return Host(pipe, name, network, cycle, {}, None, save, None if model in zoo.names() else "")


def host_of_run(run: Run, device: str = "cpu", conditions: Sequence[str] | None = None) -> Host:
    """Returns the host of a run of distillation, whose own networks are left as they are.

    Arguments:
        run: The run.
        device: Where it runs.
        conditions: Prompts or labels, instead of those of the validation.

    Raises:
        OptionError: If its student is several experts, of which raw weights are not kept.
    """
    if len(run.method.experts()) != 1:
        raise OptionError(f"the student of {str(run.folder)!r} is several experts; only one can be combined")
    component, config = run.host.component, run.config
    network = settled(run.trainer.roles["student"].network, None).to(device)
    pipe = student_pipe(run.pipe, component, network, run.method, config.steps).to(device)

    def save(folder: Path, dtype: torch.dtype, name: str, record: Mapping[str, Any]) -> None:
        run.pipe.to(device)
        inner = folder / name  # its card calls it so
        export_run(run, inner, dtype, network=network, about=_about(config.method, record))
        for part in inner.iterdir():
            part.rename(folder / part.name)
        inner.rmdir()

    def chosen(count: int) -> list[str]:
        return conditions_of(run, count) if conditions is None else list(conditions)

    reference = config.reference or (None if config.teacher in zoo.names() else "")
    takes = "guidance_scale" in inspect.signature(pipe.__call__).parameters
    guided = guidance_of(run.pipe) if takes else None
    return Host(pipe, component, network, chosen, run.store.options, guided, save, reference)


def _about(method: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the card of a combined student says otherwise."""
    count, plan = len(record["checkpoints"]), record["plan"]
    figures = {f"{name}, {plan['steps']} steps, held-out noise and reference": f"{found['value']:.5g}"
               for name, found in record["scores"]["held_out"].items()}  # fmt: skip
    return {"method": f"{method}; linear combination of {count} checkpoints ({record['origin']})",
            "figures": figures}  # fmt: skip


def source_of(paths: Sequence[str | Path], component: str, plan: Plan, device: str = "cpu",
              resident: int = RESIDENT) -> CheckpointMatrix | LoraStack:  # fmt: skip
    """Returns checkpoints as what combines them: adapters, or all weights.

    Arguments:
        paths: The checkpoints in the order of training: safetensors files, folders of pipelines or networks,
            or a run's folder for all raw weights that it has kept.
        component: The name of the network in its pipeline.
        plan: The plan, for ``last`` and ``groups``.
        device: Where combinations are computed.
        resident: The largest matrix that is kept in memory, in bytes.

    Raises:
        CheckpointError: If they are not of one network, or cannot be read.
    """
    found = [open_checkpoint(path, component) for path in expand(paths)][-plan.last or None :]
    kinds = {is_lora(checkpoint) for checkpoint in found}
    if len(kinds) > 1:
        raise CheckpointError("some checkpoints are LoRA adapters and some are not; combine one kind")
    if kinds == {True}:
        return LoraStack(found, component, plan.groups, device)
    return CheckpointMatrix(found, plan.groups, device, resident)


def judge_of(plan: Plan, reference: Any, device: str = "cpu") -> Judge:
    """Returns the judge of a plan.

    Arguments:
        plan: The plan.
        reference: Images or statistics; None for those of the zoo's models.
        device: Where features are computed.

    Raises:
        MissingReference: If there is none.
    """
    if isinstance(reference, str) and not reference:
        raise MissingReference(
            "give --reference, images or statistics; only models of the zoo have their own"
        )
    watch = [plan.watch] if plan.watch else []
    groups = groups_of([plan.metric, *watch])
    extractor = Extractor(protocol(plan.protocol), device)
    found: Statistics = (zoo_statistics(extractor, groups) if reference is None
                         else reference_of(reference, extractor, groups))  # fmt: skip
    return Judge(plan.metric, extractor, halves(found, plan.seed), watch)


def combine(plan: Plan, checkpoints: Sequence[str | Path], host: Host, out: str | Path, *,
            score: Callable[[Tensor], float] | None = None, reference: Any = None, device: str = "cpu",
            dtype: torch.dtype = torch.float32,
            advance: Callable[[int], None] = lambda count: None) -> dict[str, Any]:  # fmt: skip
    """Searches a combination and writes it: a pipeline folder with `COMBINATION` in it. Returns that record.

    A search that was stopped goes on from `SEARCH` in the folder, also with a larger budget.

    Arguments:
        plan: The plan.
        checkpoints: See `source_of`.
        host: The pipeline.
        out: The folder.
        score: A function of images (N, 3, H, W) in [0, 1] instead of the plan's metric, less being better.
        reference: Images or statistics instead of the host's.
        device: Where all is computed; the host's.
        dtype: The type of the weights that are written.
        advance: Told the number of candidates that were scored.

    Raises:
        DiffaccelError: If plan, checkpoints and host do not go together, or the folder holds something else.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / SEARCH).is_file() or not any(out.iterdir()))):
        raise ModelError(f"{str(out)!r} exists and holds no search for a combination; give another folder")
    source = source_of(checkpoints, host.component, plan, device)
    targets = source.targets(host.network)
    judge = score or judge_of(plan, host.reference if reference is None else reference, device)
    deployment = Deployment(
        host.pipe, lambda rows: source.write(rows, targets), judge, plan.steps, images=plan.images,
        conditions=host.conditions(images_needed(plan.images)), seed=plan.seed, batch=plan.batch,
        guidance=host.guidance if plan.guidance < 0 else plan.guidance, options=host.options,
    )  # fmt: skip
    search = Combination(
        source.count, deployment, plan.method, source.groups, plan.budget, plan.seed, plan.singles, plan.cap,
        file=out / SEARCH, facts=_facts(plan, source, score, host.pipe),
    )  # fmt: skip
    search.search(advance)
    found = search.winner()
    record = _record(plan, source, search, found, deployment)
    adapter = _adapter(source, found, targets, deployment, record)
    source.write(found.coefficients, targets)
    state = (out / SEARCH).read_text(encoding="utf-8")
    with whole_folder(out) as folder:
        host.save(folder, dtype, out.name, record)
        if adapter:
            save_file(adapter, folder / _ADAPTER, metadata={"format": "pt"})
        (folder / COMBINATION).write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
        (folder / SEARCH).write_text(state, encoding="utf-8")
    return record


def _facts(plan: Plan, source: Any, score: Any, pipe: Any) -> dict[str, Any]:
    """Returns what a search that goes on must have the same; its budget may grow."""
    facts = {key: value for key, value in asdict(plan).items() if key not in ("budget", "watch", "batch")}
    facts["metric"] = plan.metric if score is None else getattr(score, "__name__", type(score).__name__)
    return plain({**facts, "checkpoints": source.digest, "scheduler": dict(pipe.scheduler.config)})


def _record(plan: Plan, source: Any, search: Combination, found: Found,
            deployment: Deployment) -> dict[str, Any]:  # fmt: skip
    """Returns the coefficients with both scores, and those of known averages on the same images."""
    known = {name: {"search": score, "held_out": deployment.report(rows)}
             for name, (rows, score) in search.averages().items()}  # fmt: skip
    rows = found.coefficients
    return plain({
        "kind": "combination", "plan": asdict(plan), "origin": found.origin or plan.method,
        "checkpoints": [checkpoint.label for checkpoint in source.checkpoints],
        "groups": [*plan.groups, "rest"][: source.groups] if plan.groups else [],
        "coefficients": rows.tolist() if plan.groups else rows[0].tolist(),
        "absolute_sum": np.abs(rows).sum(1).max(),
        "scores": {"search": found.search, "fresh": found.fresh, "held_out": deployment.report(rows)},
        "evaluations": dict(zip(("search", "fresh"), found.evaluations, strict=True)),
        "averages": known, "versions": versions(),
    })  # fmt: skip


def _adapter(source: Any, found: Found, targets: Mapping[str, Tensor], deployment: Deployment,
             record: dict[str, Any]) -> dict[str, Tensor]:  # fmt: skip
    """Returns the combined adapter at the rank of the others, and adds its score to the record."""
    if not isinstance(source, LoraStack):
        return {}
    saved = source.write_reduced(found.coefficients, targets)
    record["scores"]["held_out_of_adapter"] = plain(deployment.report())
    return saved

"""Students leave as ordinary pipeline folders, or as adapters; they are loaded again and compared first.

`export` writes the teacher's pipeline with the student in its place, and with a scheduler that has exactly
the trained grids, a stock one if there is one. Then the folder is loaded as a user loads it, and has to make,
at the trained times, the images that the student makes in training, up to what rounding explains. Of a
folder that does not, nothing is left behind.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ..errors import ModelError, OptionError, UnsupportedPipeline, closest
from ..eval.sampler import device_of
from ..files import read_object, whole_folder
from ..pipelines import NoiseExperts
from ..pipelines.identity import GUIDANCE_KEY, STEPS_KEY
from ..pipelines.routed import Routed
from ..pipelines.run import denoisers_of
from ..pipelines.unguided import NULL_LABEL
from ..samplers import FixedGridScheduler
from ..zoo.adapted import ADAPTED
from ..zoo.folders import load_pipeline, quiet
from .adapters import adapters_of, merged, saved_adapter
from .assembly import settled
from .card import Card, call_code, card_text
from .fixed_guidance import ignores_guidance
from .grid import Calls, Grid, fixed_grid, scheduler_for
from .trial import Student, cast, compare, images, in_training, with_network, with_parts

__all__ = ["Grid", "amend", "export", "export_lora", "scheduler_for"]

_CONFIGURATIONS = ("model_index.json", "config.json", "scheduler_config.json")

Writer = Callable[[Path, Any], tuple[Any, list[str], dict[str, str]]]
"""Writes a pipeline into a folder; returns it loaded, the code for that, and facts for the card."""


def export(
    student: nn.Module, teacher_pipe: Any, component: str, grids: Grid | Sequence[Grid], out: str | Path, *,
    guidance: float, card: Mapping[str, Any], lora: str | None = None, dtype: torch.dtype = torch.float16,
    conditions: Sequence[str] = (), options: Mapping[str, Any] | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Writes a student as a pipeline folder, complete or not at all, and returns the folder.

    The student and the teacher's pipeline are left as they are. Where the network's class allows it, the
    folder's pipeline makes the same images for every guidance scale (see `fixed_guidance`); else its card and
    its scheduler's configuration (`GUIDANCE_KEY`) say which one to give.

    Arguments:
        student: The student; one of several experts is a `NoiseExperts` or `ConditionExperts` of them.
        teacher_pipe: The teacher's pipeline, of which all other components are taken.
        component: The name of the network in the pipeline, as "unet".
        grids: The grids of all numbers of steps that were trained.
        out: The folder.
        guidance: The guidance scale that the student is called with: 1 for one that was trained without.
        card: What the model card says: the entries of `Card`.
        lora: The adapter to merge, if the student is an adapter of its network.
        dtype: The type of the weights.
        conditions: Prompts or class names to try the student on, of which the first is the card's example;
            some of our own if there are none.
        options: Further arguments of the trial's calls, as height and width.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        ModelError: If the folder exists, or the loaded pipeline makes other images than the student.
        OptionError: If an argument does not fit the pipeline.
        UnsupportedPipeline: If the pipeline is accelerated, or its path neither straight nor
            variance-preserving.
    """
    about, target = Card.of(card), _target(out, overwrite)
    trained = _student(student, lora, teacher_pipe, component, grids, guidance, conditions, options or {})
    network = settled(student, lora, trained.guidance, apart="boundary_ratio" in teacher_pipe.config)

    def write(folder: Path, pipe: Any) -> tuple[Any, list[str], dict[str, str]]:
        pipe.save_pretrained(folder)
        amend(folder, pipe)
        code = ["from diffusers import DiffusionPipeline", "",
                f'pipe = DiffusionPipeline.from_pretrained("{target.name}")']  # fmt: skip
        if own := _own_parts(pipe):  # diffusers loads from imported modules alone
            what = f"the {own[0]} is one" if len(own) == 1 else f"{' and '.join(own)} are some"
            code = [f"import diffaccel  # pip install diffaccel: {what} of its own", *code]
        return load_pipeline(folder, dtype), code, _facts(network, teacher_pipe)

    return _publish(trained, network, target, about, dtype, write)


def export_lora(
    student: nn.Module, name: str | None, teacher_pipe: Any, component: str, grids: Grid | Sequence[Grid],
    out: str | Path, *, guidance: float, card: Mapping[str, Any], dtype: torch.dtype = torch.float16,
    conditions: Sequence[str] = (), options: Mapping[str, Any] | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Writes an adapter as a folder for ``pipe.load_lora_weights``, with the student's scheduler beside it.

    The adapters of several experts are a folder for ``NoiseExperts.on``. What is written is loaded onto the
    teacher's network and compared. The card's ``teacher`` has to be what users load: our commands and
    `load_pipeline`, which take such a folder for a model, load it by that name.

    Arguments:
        student: The network with the adapter, or a `NoiseExperts` of adapters.
        name: The adapter; None for those of experts.
        teacher_pipe: The teacher's pipeline.
        component: The name of the network in the pipeline, as "unet".
        grids: The grids of all numbers of steps that were trained.
        out: The folder.
        guidance: The guidance scale that the student is called with: 1 for one that was trained without.
        card: What the model card says: the entries of `Card`.
        dtype: The type of the weights.
        conditions: Prompts to try the student on, of which the first is the card's example.
        options: Further arguments of the trial's calls, as height and width.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        ModelError: If the folder exists, or the loaded adapter makes other images than the student.
        OptionError: If there is no such adapter, or an argument does not fit the pipeline.
        UnsupportedPipeline: If the pipeline loads no adapters of this component; merge it then.
    """
    about, target = Card.of(card), _target(out, overwrite)
    trained = _student(student, name, teacher_pipe, component, grids, guidance, conditions, options or {})
    if isinstance(student, Routed):
        own = _experts_writer(student, trained, about, target, dtype)
        return _publish(trained, settled(student, None), target, about, dtype, own)
    assert name is not None
    save, (layers, settings) = _saver(teacher_pipe, component), saved_adapter(student, name, dtype)

    def write(folder: Path, pipe: Any) -> tuple[Any, list[str], dict[str, str]]:
        save(folder, layers, settings)
        _name_base(folder, about, component)
        pipe.scheduler.save_pretrained(folder / "scheduler")
        base = settled(getattr(teacher_pipe, component), None)
        loaded = cast(with_parts(pipe, **{component: base}), dtype)
        loaded.load_lora_weights(folder)
        loaded.scheduler = type(pipe.scheduler).from_pretrained(folder, subfolder="scheduler")
        code = _adapter_code(about.teacher, target.name, type(pipe.scheduler))
        return loaded, code, {"adapter": f"rank {settings['r']}, alpha {settings['lora_alpha']:g}"}

    return _publish(trained, settled(student, name), target, about, dtype, write)


def _experts_writer(student: Routed, trained: Student, about: Card, target: Path,
                    dtype: torch.dtype) -> Writer:  # fmt: skip
    """Returns what writes the adapters of experts."""
    kind, component = type(student), trained.component
    student.check_adapters()

    def write(folder: Path, pipe: Any) -> tuple[Any, list[str], dict[str, str]]:
        student.save_adapters(folder, dtype)
        _name_base(folder, about, component)
        pipe.scheduler.save_pretrained(folder / "scheduler")
        base = nn.Module.to(settled(getattr(trained.pipe, component), None), dtype)
        loaded = cast(with_parts(pipe, **{component: kind.on(base, folder)}), dtype)
        loaded.scheduler = type(pipe.scheduler).from_pretrained(folder, subfolder="scheduler")
        code = _adapter_code(about.teacher, target.name, type(pipe.scheduler))
        place = next(number for number, line in enumerate(code) if "load_lora_weights" in line)
        code[place] = f'pipe.{component} = {kind.__name__}.on(pipe.{component}, "{target.name}")'
        return (
            loaded,
            [f"from diffaccel.pipelines import {kind.__name__}", *code],
            {"experts": student.summary()},
        )

    return write


def _saver(pipe: Any, component: str) -> Callable[[Path, Any, Any], None]:
    """Returns what saves the adapter of a component as its pipeline loads it."""
    save: Any = getattr(pipe, "save_lora_weights", None)
    if save is None or f"{component}_lora_layers" not in inspect.signature(save).parameters:
        name = type(pipe).__name__
        raise UnsupportedPipeline(
            f"{name} loads no adapters of {component!r}; merge it: export(..., lora=...)"
        )
    parts = (f"{component}_lora_layers", f"{component}_lora_adapter_metadata")
    return lambda folder, layers, settings: save(folder, **dict(zip(parts, (layers, settings), strict=True)))


def _name_base(folder: Path, about: Card, component: str) -> None:
    text = json.dumps({"base": about.teacher, "component": component}, indent=2)
    (folder / ADAPTED).write_text(f"{text}\n", encoding="utf-8")


def _adapter_code(teacher: str, name: str, kind: type) -> list[str]:
    own = kind is FixedGridScheduler
    return [
        f"from diffusers import DiffusionPipeline{'' if own else f', {kind.__name__}'}",
        *([f"from diffaccel.samplers import {kind.__name__}"] if own else []), "",
        f'pipe = DiffusionPipeline.from_pretrained("{teacher}")',
        f'pipe.load_lora_weights("{name}")',
        f'pipe.scheduler = {kind.__name__}.from_pretrained("{name}", subfolder="scheduler")',
    ]  # fmt: skip


def _target(out: str | Path, overwrite: bool) -> Path:
    target = Path(out)
    if target.exists() and not overwrite:
        raise ModelError(f"{str(target)!r} exists; give another folder, or overwrite=True")
    return target


def _student(network: nn.Module, adapter: str | None, pipe: Any, component: str, grids: Grid | Sequence[Grid],
             guidance: float, conditions: Sequence[str], options: Mapping[str, Any]) -> Student:  # fmt: skip
    """Returns the student, checked."""
    name, call = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    if hasattr(type(pipe), "_diffaccel_base"):
        raise UnsupportedPipeline(f"this {name} is accelerated; take the plain one: accelerate(pipe, None)")
    parts = {key: part for key, part in pipe.components.items() if isinstance(part, nn.Module)}
    if component not in parts:
        raise OptionError(f"{name} has no network {component!r}; {closest(component, parts)}")
    kind = type(getattr(network, "leading", network))
    if kind is not type(parts[component]):
        kinds = (kind.__name__, type(parts[component]).__name__)
        raise OptionError(f"the student is a {kinds[0]}; the {component} of {name} is a {kinds[1]}")
    if adapter is None and adapters_of(network):
        raise OptionError(f"the network has the adapters {', '.join(adapters_of(network))}; name one as lora")
    takes = "guidance_scale" in call
    if not takes and guidance != 1:
        raise OptionError(f"{name} takes no guidance scale; expected guidance=1")
    if not conditions and "class_labels" in call:
        conditions = sorted(getattr(pipe, "labels", None) or {})[:2] or ["0", "1"]
    elif not conditions and "prompt" in call:
        conditions = ["a photo of a cat", "a house by the sea"]
    experts = len(network.members) if isinstance(network, Routed) else 1
    scale, chosen = guidance if takes else None, tuple(conditions[: max(2, experts)])
    return Student(network, adapter, pipe, component, _all(grids), scale, chosen, options)


def _all(grids: Grid | Sequence[Grid]) -> tuple[Grid, ...]:
    return (grids,) if isinstance(grids, Grid) else tuple(grids)


@torch.no_grad()
def _publish(trained: Student, network: nn.Module, target: Path, about: Card, dtype: torch.dtype,
             write: Writer) -> Path:  # fmt: skip
    """Writes a folder and its card, unless what is loaded of it is not the student."""
    teacher, name = trained.pipe.scheduler, str(dtype).removeprefix("torch.")
    with quiet([]), whole_folder(target) as folder:
        wanted, calls = in_training(trained)
        pipe = cast(with_network(trained.pipe, trained.component, network), dtype)
        rounded = images(trained, with_parts(pipe, scheduler=fixed_grid(teacher, trained.grids)))
        pipe.scheduler = _scheduler(trained, calls)
        pipe.scheduler.register_to_config(**_notes(trained))
        loaded, code, facts = write(folder, pipe)
        made = images(trained, with_parts(loaded.to(device_of(trained.pipe))))
        facts |= {"weights": name, "checked": compare(made, wanted, rounded, name)}
        fixed = ignores_guidance(loaded, trained.component)
        scale = None if fixed else trained.guidance
        code.append(call_code(pipe, trained.conditions, len(trained.grids[-1]), scale))
        text = card_text(about, target.name, pipe, trained.grids, trained.guidance, fixed, code, facts)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return target


def _scheduler(trained: Student, calls: Calls) -> Any:
    """Returns the scheduler to leave with: where noise decides on the expert, one that has no other grids."""
    teacher = trained.pipe.scheduler
    if isinstance(trained.network, NoiseExperts) and len(trained.network.members) > 1:
        return fixed_grid(teacher, trained.grids)
    return scheduler_for(teacher, trained.grids, calls)


def _notes(trained: Student) -> dict[str, Any]:
    """Returns what the scheduler's configuration says besides."""
    scale = {} if trained.guidance is None else {GUIDANCE_KEY: trained.guidance}
    return {**scale, STEPS_KEY: [len(grid) for grid in trained.grids]}


def amend(folder: Path, pipe: Any) -> None:
    """Removes the paths of this machine, and adds the names of classes, which DiTPipeline does not save."""
    for file in (found for name in _CONFIGURATIONS for found in folder.rglob(name)):
        content = read_object(file, ModelError)
        content.pop("_name_or_path", None)
        if file.parent == folder and getattr(pipe, "labels", None):
            names: dict[str, list[str]] = {}
            for word, number in pipe.labels.items():
                names.setdefault(str(number), []).append(word)
            content["id2label"] = {key: ", ".join(names[key]) for key in sorted(names, key=int)}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _own_parts(pipe: Any) -> list[str]:
    """Returns what in a pipeline stock diffusers does not have."""
    parts = {"scheduler": FixedGridScheduler, "network": Routed}
    components = list(pipe.components.values())
    return [name for name, kind in parts.items() if any(isinstance(part, kind) for part in components)]


def _facts(network: nn.Module, teacher: Any) -> dict[str, str]:
    """Returns rows of the card's table, for a student and its teacher's pipeline."""
    whole = sum(
        value.numel() for part in denoisers_of(teacher).values() for value in merged(part, None).values()
    )
    own = sum(value.numel() for value in network.state_dict().values())
    inner = getattr(network, "leading", network)
    name, config = type(inner).__name__, getattr(network, "config", None)
    facts = {"network": f"`{name}`, {own / 1e6:.3g} M weights, {own / whole:.0%} of its teacher's"}
    if isinstance(network, Routed):
        facts["experts"] = network.summary()
    classes = getattr(config, "num_embeds_ada_norm", None) or NULL_LABEL
    if isinstance(inner, DiTTransformer2DModel) and classes < NULL_LABEL:
        facts["classes"] = f"{classes}; none for no class, so that a call with guidance is an error"
    return facts

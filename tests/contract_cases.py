"""The pipelines and accelerators that the contract is tested on, and what may be left behind."""

import copy
import functools
import inspect
import json
import tempfile
from pathlib import Path

from tiny_pipelines import TINY, fresh, run
from torch import nn

from diffaccel.pipelines import registry
from diffaccel.samplers.family import solver_of
from diffaccel.samplers.grids import grid
from diffaccel.samplers.presets import solver_schedule

STEPS = 12
FAMILIES = ("sd", "dit", "ddim", "flux_true_cfg", "wan")
EAGER: dict = {"sada": {"tolerance": 1e9}, "reuse": {}}  # options with which each is sure to skip
ONE_LENGTH = ("auto", "autodiffusion", "disa", "few-step")  # for some numbers of steps, or pipelines, only
ACCELERATORS = [name for name in registry() if name not in ONE_LENGTH]
REFUSED = {("apg", "ddim")}  # a pipeline without guidance
SETTINGS = [f"{a}-{f}" for a in ACCELERATORS for f in FAMILIES if (a, f) not in REFUSED]


@functools.cache
def schedules():
    """A file of schedules for all families, of the numbers of evaluations in these tests."""
    found = {}
    for case in TINY.values():
        path = solver_of(case.build().scheduler).path
        for count in (4, 6, 8, STEPS, STEPS + 5):
            schedule = solver_schedule("unipc2", grid("trailing", count, path))
            facts = {"family": {"path": path.name}}
            found[path.name, count] = {**schedule.to_dict(), "facts": facts}
    file = Path(tempfile.mkdtemp()) / "schedules.json"
    file.write_text(json.dumps(list(found.values())))
    return str(file)


def spec(name):
    return {name: {"file": schedules()} if name == "s3" else EAGER.get(name, {})}


@functools.cache
def plain_of(name):
    """The output without an accelerator."""
    return run(TINY[name], fresh(name), STEPS)


@functools.cache
def fast_of(name, accel):
    """The output with an accelerator."""
    return run(TINY[name], fresh(name).to(accel=spec(accel)), STEPS)


def sibling_of(pipe):
    """A plain pipeline that shares all networks with another.

    Tokenizers are its own: threads that share one get each other's padding, without any code of ours.
    """
    base = getattr(type(pipe), "_diffaccel_base", type(pipe))
    own = [name for name in pipe.components if name == "scheduler" or name.startswith("tokenizer")]
    parts = {**pipe.components, **{name: copy.deepcopy(getattr(pipe, name)) for name in own}}
    config = {name: value for name, value in pipe.config.items() if name not in parts and name[0] != "_"}
    options = {name: value for name, value in config.items() if name in inspect.signature(base).parameters}
    sibling = base(**parts, **options)
    if hasattr(pipe, "labels"):
        sibling.labels = pipe.labels
    sibling.set_progress_bar_config(disable=True)
    return sibling


def traces(pipe, own=True):
    """Everything that an accelerator could leave behind on a pipeline, its components and their parts."""
    objects = {"pipe": pipe} if own else {}
    for name, part in pipe.components.items():
        modules = part.named_modules() if isinstance(part, nn.Module) else [("", part)]
        objects |= {f"{name}.{inner}": item for inner, item in modules if hasattr(item, "__dict__")}
    return {
        name: (type(item), {key: value if callable(value) else None for key, value in vars(item).items()})
        for name, item in objects.items()
    }


def code(pipe):
    """All attributes of all classes of a pipeline and its components."""
    classes = {cls for part in (pipe, *pipe.components.values()) for cls in type(part).__mro__}
    return {cls: {key: id(value) for key, value in vars(cls).items()} for cls in classes}


def skips_steps(name):
    """Whether an accelerator skips evaluations; one of the kind "solver" does all of them, elsewhere, and one
    of the kind "blocks" does all of them in part."""
    return registry()[name].exclusive not in ("guidance", "solver", "blocks")


def assert_skipping(pipe):
    assert pipe.accel.report.evaluated > 0
    if skips_steps(pipe.accel.stack[0].name):
        assert pipe.accel.report.skipped > 0

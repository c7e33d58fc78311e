"""Which pipelines of diffusers run under which accelerators: all classes, tiny, with random weights.

``python benchmarks/compatibility.py measure`` builds every pipeline class that diffusers exports (as
``tests/tiny`` does it), runs it plain and with each registered accelerator, takes the accelerator off and
runs it again; ``... tables`` writes ``docs/compatibility.md``.  Each class has a process of its own and a
limit of processor time; ``--only REGEX`` measures some and keeps what is known of the others.
"""

import argparse
import inspect
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from described import described
from torch.utils import _pytree as pytree

from diffaccel.errors import DiffaccelError
from diffaccel.eval.provenance import versions
from diffaccel.files import whole
from diffaccel.pipelines import attached, registry
from diffaccel.samplers.family import solver_of
from diffaccel.samplers.grids import grid
from diffaccel.samplers.paths import TrainingPath
from diffaccel.samplers.presets import solver_schedule
from diffaccel.samplers.thinning import ThinnedSchedule

FOLDER = Path(__file__).parent
RECORD, DOC = FOLDER / "compatibility.json", FOLDER.parent / "docs" / "compatibility.md"
STEPS = 8
EAGER: dict[str, dict[str, Any]] = {"sada": {"tolerance": 1e9}}
"""Options with which an accelerator skips whatever it may; the networks have learned nothing."""

STANDS_FOR_OTHERS = ("auto",)
"""Accelerators that do what a plan says, with others."""

FROM_IMAGES = ("Img2Img", "I2I", "Edit", "Kontext", "Upscale", "Upsampl", "SuperRes", "Pix2Pix", "Variation",
               "Depth2", "Cycle", "Marigold", "Refiner", "Redux", "Emb2Emb", "VisualCloze")  # fmt: skip
"""Parts of the names of pipelines that start from a picture."""

sys.path.insert(0, str(FOLDER.parent / "tests"))


def measure_class(name: str) -> dict[str, Any]:
    """Returns what happened to a pipeline class."""
    from tiny.catalog import NotBuilt, arguments, build, pipelines

    cls = pipelines()[name]
    try:
        pipe, call = build(cls), arguments(cls)
    except NotBuilt as error:
        return {"built": False, "reason": str(error)}
    except Exception as error:
        return {"built": False, "reason": f"cannot be made here: {described(error)}"}
    try:
        plain = _output(pipe, call)
        found = {"built": True, "finite": _finite(plain), "accelerators": {}}
        for accel in (name for name in registry() if name not in STANDS_FOR_OTHERS):
            found["accelerators"][accel] = _measure(pipe, call, accel, plain)
        found["restored"] = _equal(plain, _output(pipe, call))
        found["repeatable"] = found["restored"] or _equal(
            _output(build(cls), call), _output(build(cls), call)
        )
    except Exception as error:
        return {"built": False, "reason": f"fails without diffaccel: {described(error)}"}
    return found


def _measure(pipe: Any, call: dict[str, Any], accel: str, plain: list[np.ndarray]) -> dict[str, Any]:
    """Returns what happened to a pipeline under one accelerator, which is taken off again."""
    try:
        with attached(pipe, specification(pipe, accel)):
            fast = _output(pipe, call)
            report = pipe.accel.report
    except DiffaccelError as error:
        return {"status": "refused", "reason": _short(str(error), pipe, accel)}
    except Exception as error:
        return {"status": "crashed", "reason": described(error)}
    row = {
        "status": "runs" if report.updates and report.requested else "idle",
        "requested": report.requested,
        "evaluated": round(report.evaluated, 4),
        "updates": report.updates,
        "same": _equal(plain, fast),
    }
    if _finite(plain) and not _finite(fast):
        row |= {"status": "crashed", "reason": "the output is not finite"}
    return row


def specification(pipe: Any, accel: str) -> Any:
    """Returns an accelerator with its options; one that needs a searched schedule gets one for the path."""
    if accel == "inherit" and getattr(pipe, "unet", None) is None:
        return {accel: {"outer": 0}}  # of the few blocks of a tiny transformer none is kept out
    if accel not in ("s3", "autodiffusion"):
        return {accel: EAGER.get(accel, {})}
    try:
        path = solver_of(pipe.scheduler).path
    except (AttributeError, DiffaccelError):
        path = TrainingPath(1000)  # the accelerator will say what is wrong
    schedule = solver_schedule("unipc2", grid("trailing", STEPS, path))
    facts = {"family": {"path": path.name}}
    data: Any = [{**schedule.to_dict(), "facts": facts}]
    if accel == "autodiffusion":
        data = ThinnedSchedule(schedule, ((),) * STEPS, facts).to_dict()
    file = Path(tempfile.mkdtemp()) / f"{accel}.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    return {accel: {"file": str(file)}}


def _output(pipe: Any, call: dict[str, Any]) -> list[np.ndarray]:
    """Returns all arrays of a call's output."""
    torch.manual_seed(0)
    steps = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    names = inspect.signature(type(pipe).__call__).parameters
    with torch.no_grad():
        output = pipe(**{key: value for key, value in steps.items() if key in names}, **call)
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else tuple(output))
    return [np.asarray(leaf) for leaf in leaves if leaf is not None]


def _equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether two outputs are the same bits."""
    same = [a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
            for a, b in zip(one, other, strict=False)]  # fmt: skip
    return len(one) == len(other) and all(same)


def _finite(arrays: list[np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")


def _short(text: str, pipe: Any, accel: str) -> str:
    """Returns our reason without what the table says anyway."""
    name = type(pipe).__name__
    text = (
        " ".join(text.split())
        .split("; supported:")[0]
        .removeprefix(f"{accel} cannot accelerate this {name}: ")
    )
    text = re.sub(r"'?/tmp/\S+\.json'?", "the file", text)
    return text.replace(f"this {name}", "this pipeline").replace(name, "the pipeline")


def task_of(cls: Any) -> str:
    """Returns what a pipeline class is for."""
    name, parameters = cls.__name__, inspect.signature(cls.__call__).parameters
    given = [key for key in ("image", "video", "images") if key in parameters]
    if re.search(r"Audio|Music|AceStep|DanceDiffusion", name):
        return "sound"
    if re.search(r"Control|Adapter|Transfer|VACE|Animate$", name.removesuffix("Pipeline")):
        return "ControlNets and other control"
    if re.search(r"Inpaint|Fill|RePaint|PaintBy|DiffEdit", name):
        return "inpainting"
    if {"num_frames", "video_length", "frames"} & parameters.keys() or "Video" in name:
        needed = [key for key in given if parameters[key].default is inspect.Parameter.empty]
        source = needed or re.search(r"(Image|Video)\w*ToV|Video2|Image2V|I2V|TemporalRefine", name)
        return "image or video to video" if source else "text to video"
    needs_image = "image" in parameters and parameters["image"].default is inspect.Parameter.empty
    if needs_image or re.search("|".join(FROM_IMAGES), name):
        return "image to image"
    return "text to image" if "prompt" in parameters else "other"


def measure(only: str, limit: int) -> None:
    """Measures the classes whose names match, and writes the record after each."""
    from tiny.catalog import pipelines

    context = multiprocessing.get_context("fork")
    for name, cls in pipelines().items():
        if not re.search(only, name):
            continue
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, sender, limit))
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            found = {"built": False, "reason": f"takes more than {limit} s of a processor, even tiny"}
        process.join()
        _keep(name, {"task": task_of(cls), **found})
        states = {accel: row["status"] for accel, row in found.get("accelerators", {}).items()}
        print(name, states or found["reason"], flush=True)


def _work(name: str, sender: Any, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    torch.set_num_threads(1)
    sender.send(measure_class(name))


def _keep(name: str, found: dict[str, Any]) -> None:
    """Puts what was found into the record; classes that diffusers no longer has leave it."""
    from tiny.catalog import pipelines

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"pipelines": {}}
    known = {key: value for key, value in record["pipelines"].items() if key in pipelines()}
    record = {"steps": STEPS, "options": EAGER, "versions": versions(),
              "pipelines": dict(sorted({**known, name: found}.items()))}  # fmt: skip
    with whole(RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "tables"))
    parser.add_argument("--only", default="", help="a regular expression for names of classes")
    parser.add_argument("--limit", type=int, default=120, help="processor seconds for a class")
    arguments = parser.parse_args()
    if arguments.what == "tables":
        from compatibility_tables import tables

        DOC.write_text(tables(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    measure(arguments.only, arguments.limit)


if __name__ == "__main__":
    main()

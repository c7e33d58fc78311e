"""``diffaccel combine``: saved checkpoints become one pipeline that is better than each of them."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import zoo
from ..distill.combine import Plan, combine, host_of, host_of_run
from ..distill.runs import Run
from ..errors import MissingReference, OptionError
from ..zoo.folders import quiet
from .reading import check_options, read_prompts
from .scoring import reference_data
from .writing import check_output, counting

__all__ = ["COMBINED", "at_end", "check_run", "lines_of", "run"]

COMBINED = "combined"
"""The folder in that of a run, for what its checkpoints are combined to."""


def run(checkpoints: Sequence[Path], model: str, out: Path, metric: str, component: str, prompts: Path | None,
        reference: Path | None, device: str, dtype: str, **options: Any) -> list[str]:  # fmt: skip
    """Searches or goes on, writes the pipeline folder, and returns lines on it.

    Arguments:
        checkpoints: The checkpoints.
        model: What they are tried in.
        out: The folder.
        metric: The name of a score, or MODULE:FUNCTION of images.
        component: The network of a pipeline of several.
        prompts: A file of prompts or labels.
        reference: Images or statistics.
        device: Where to run.
        dtype: The type of the weights that are written.
        options: The options of `Plan`.

    Raises:
        DiffaccelError: For any mistake in the arguments.
    """
    check_options(device, dtype, options["guidance"], None)
    score = _function(metric)
    if options["guidance"] is None:
        del options["guidance"]
    if score is not None:
        options["watch"] = ""
    plan = Plan(**options) if score else Plan(metric=metric, **options)
    conditions = None if prompts is None else read_prompts(prompts)
    check_output(out)
    data = None if reference is None else reference_data(reference)
    with quiet([]):
        host = host_of(model, component, device, conditions)
        with counting("combinations", plan.budget) as advance:
            record = combine(plan, checkpoints, host, out, score=score, reference=data, device=device,
                             dtype=getattr(torch, dtype), advance=advance)  # fmt: skip
    return lines_of(record, out)


def check_run(run: Run) -> None:
    """Checks, before a run trains, that its checkpoints can be combined afterwards, if they are to be.

    Raises:
        MissingReference: If there are no reference images.
        OptionError: If its student is several experts.
    """
    config = run.config
    if config.combine_budget and not config.reference and config.teacher not in zoo.names():
        raise MissingReference("combine_budget needs reference=IMAGES; only models of the zoo have their own")
    if config.combine_budget and len(run.method.experts()) != 1:
        raise OptionError("combine_budget combines one network, and this student is several experts")


def at_end(run: Run) -> list[str]:
    """Combines the raw weights that a finished run has kept, for its first number of steps; returns lines."""
    config, out = run.config, run.folder / COMBINED
    plan = Plan(steps=config.steps[0], budget=config.combine_budget, images=config.combine_images,
                protocol=config.protocol, seed=config.seed)  # fmt: skip
    device = str(run.trainer.accelerator.device)
    with quiet([]), counting("combinations", plan.budget) as advance:
        record = combine(plan, [run.folder], host_of_run(run, device), out, device=device, advance=advance)
    return lines_of(record, out)


def _function(metric: str) -> Callable[[torch.Tensor], float] | None:
    """Returns the function that MODULE:FUNCTION names, or None for the name of a score."""
    module, colon, name = metric.partition(":")
    if not colon:
        return None
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"no function {metric!r}: {error}; expected MODULE:FUNCTION of images") from error
    if not callable(found):
        raise OptionError(f"{metric!r} is a {type(found).__name__}; expected a function of images")
    return found


def lines_of(record: dict[str, Any], out: Path) -> list[str]:
    """Returns the record of a combination as lines of text: averages, the result, and where it is."""
    lines = [f"{name + ':':10} search {entry['search']:.5g}, held out {_scores(entry['held_out'])}"
             for name, entry in record["averages"].items()]  # fmt: skip
    scores, done = record["scores"], record["evaluations"]
    lines.append(
        f"{record['origin'] + ':':10} search {scores['search']:.5g}, fresh {scores['fresh']:.5g}, held out "
        f"{_scores(scores['held_out'])}; {done['search']} + {done['fresh']} evaluations"
    )
    if "held_out_of_adapter" in scores:
        lines.append(f"as an adapter of the same rank: held out {_scores(scores['held_out_of_adapter'])}")
    return [*lines, f"pipeline: {out}"]


def _scores(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value['value']:.5g}" + (f" ± {value['se']:.2g}" if "se" in value else "")
        for name, value in found.items()
    )

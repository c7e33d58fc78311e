"""``diffaccel search ...``: the commands and their options."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Budget, Device, Dtype, Guidance, Model, Prompts, Protocol, Scheduler, Seed

__all__ = ["search_app"]

search_app = typer.Typer(help="Searches what makes a model fast.", no_args_is_help=True)
Nfe = Annotated[list[int] | None, typer.Option(min=2, help="Repeatable: evaluations.")]
SearchImages = Annotated[int, typer.Option(min=1, help="Images of the objective.")]
Objective = Annotated[str, typer.Option(help="distance (to the fine solution), or fd (to a reference).")]
Reference = Annotated[Path | None, typer.Option(help="Images or statistics, for the objective fd.")]
Engine = Annotated[str, typer.Option(help="evolution, or optuna (needs the extra).")]


@search_app.command("s3")
def search_s3_(
    model: Model,
    nfe: Nfe = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    images: SearchImages = 32,
    budget: Budget = 300,
    seed: Seed = 0,
    objective: Objective = "distance",
    protocol: Protocol = "offline",
    reference: Reference = None,
    engine: Engine = "evolution",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option(help="Folder for scheduler and search.")] = Path("out/s3"),
) -> None:
    """Searches a solver schedule for each number of evaluations; goes on after a kill."""
    from .search import Settings, lines_of, search_s3

    settings = Settings(model, tuple(nfe or (5,)), guidance, prompts, images, budget, seed, objective,
                        protocol, reference, engine, device, dtype)  # fmt: skip
    found = search_s3(settings, out)
    for line in lines_of(found, out) if found else ():
        typer.echo(line)


@search_app.command("polish")
def search_polish_(
    model: Model,
    nfe: Nfe = None,
    file: Annotated[str, typer.Option(help="Fitted schedules; those that ship by default.")] = "",
    bound: Annotated[float, typer.Option(min=1, help="Factor of the distance's growth, at most.")] = 1.15,
    near: Annotated[int, typer.Option(min=1, help="Images of that distance.")] = 96,
    depth: Annotated[int, typer.Option(min=1, help="Most steps that are changed, the last ones.")] = 3,
    part: Annotated[float, typer.Option(min=0, max=1, help="How much of the change is made.")] = 1.0,
    guidance: Guidance = None,
    prompts: Prompts = None,
    images: SearchImages = 1000,
    budget: Budget = 240,
    seed: Seed = 0,
    objective: Objective = "fd",
    protocol: Protocol = "offline",
    reference: Reference = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option(help="Folder for scheduler and search.")] = Path("out/polish"),
) -> None:
    """Moves the last steps of searched schedules for an objective; goes on after a kill."""
    from .search import Settings, polish_schedules, polished_lines

    settings = Settings(model, tuple(nfe or (5,)), guidance, prompts, images, budget, seed, objective,
                        protocol, reference, device=device, dtype=dtype)  # fmt: skip
    found = polish_schedules(settings, out, file, bound, near, depth, part)
    for line in polished_lines(found, out) if found else ():
        typer.echo(line)


@search_app.command("autodiffusion")
def search_autodiffusion_(
    model: Model,
    nfe: Nfe = None,
    max_drop: Annotated[float, typer.Option(help="Largest part of the layers dropped at a step.")] = 0.3,
    solver: Annotated[str, typer.Option(help="dpm++2m, unipc2, ddim, ...")] = "dpm++2m",
    guidance: Guidance = None,
    prompts: Prompts = None,
    images: SearchImages = 32,
    budget: Budget = 300,
    seed: Seed = 0,
    objective: Objective = "distance",
    protocol: Protocol = "offline",
    reference: Reference = None,
    engine: Engine = "evolution",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option(help="Folder for the schedules.")] = Path("out/autodiffusion"),
) -> None:
    """Searches timesteps, and layers to leave out, within the work of NFE evaluations."""
    from .search import Settings, layer_lines, search_layers

    budgets = tuple(nfe or (5,))
    settings = Settings(model, budgets, guidance, prompts, images, budget, seed, objective, protocol,
                        reference, engine, device, dtype)  # fmt: skip
    found = search_layers(settings, out, max_drop, solver)
    for line in layer_lines(found, budgets, out) if found else ():
        typer.echo(line)


@search_app.command("inherit")
def search_inherit_(
    model: Model,
    nfe: Nfe = None,
    steps: Annotated[int, typer.Option(min=3, help="Number of inference steps.")] = 20,
    level: Annotated[str, typer.Option(help="What inherits: layer, or block.")] = "layer",
    scheduler: Scheduler = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    images: SearchImages = 32,
    budget: Budget = 300,
    seed: Seed = 0,
    objective: Objective = "distance",
    protocol: Protocol = "offline",
    reference: Reference = None,
    engine: Engine = "evolution",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option(help="Folder for the patterns.")] = Path("out/inherit"),
) -> None:
    """Searches which modules inherit at which step, within the work of NFE evaluations."""
    from .search import Settings, inheritance_lines, search_inheritance

    budgets = tuple(nfe or (10,))
    settings = Settings(model, budgets, guidance, prompts, images, budget, seed, objective, protocol,
                        reference, engine, device, dtype, scheduler)  # fmt: skip
    found = search_inheritance(settings, out, steps, level)
    for line in inheritance_lines(found, budgets, out) if found else ():
        typer.echo(line)

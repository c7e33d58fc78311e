"""``diffaccel distill ...``: the commands that make a few-step student of a pipeline."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["distill_app"]

distill_app = typer.Typer(help="Turns a pipeline into a few-step student.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="The teacher: a name of the zoo, a pipeline folder, or a hub id.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all noise.")]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32, float16 or bfloat16.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]


@distill_app.callback()
def distill_() -> None:
    """Turns a pipeline into a few-step student."""


@distill_app.command("pairs")
def pairs_(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the pairs.")] = Path("out/pairs"),
    n: Annotated[int, typer.Option(min=1, help="Number of pairs.")] = 50_000,
    steps: Annotated[int, typer.Option(min=1, help="The teacher's inference steps.")] = 50,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, baked in; the pipeline's own by default.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="dpm++, ddim, heun, ... (deterministic), or a class name.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt or label a line, in turn.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a call of the pipeline.")] = 64,
    seed: Seed = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs a file.")] = 1024,
    float32: Annotated[
        bool, typer.Option("--float32", help="Store samples in float32, not float16.")
    ] = False,
    real: Annotated[
        Path | None,
        typer.Option(help="Images to lead back to noise, by --steps evaluations; a line of --prompts each."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    verify: Annotated[
        bool, typer.Option("--verify", help="Only compare the checksums of what is in --out.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Makes pairs of noise and the teacher's sample; goes on after a kill, and mends damaged files."""
    from . import pairs as command

    if verify:
        store = command.verify(out, quiet)
    else:
        stored = "float32" if float32 else "float16"
        settings = command.Settings(model, n, steps, guidance, scheduler, prompts, batch, seed, shard_size,
                                    stored, device, dtype)  # fmt: skip
        made = command.pairs if real is None else partial(command.inverted, real=real)
        found = made(settings, out=out, silent=quiet)
        if found is None:
            return
        store = found
    if not quiet:
        typer.echo(command.line_of(store))


Settings = Annotated[Path | None, typer.Argument(help="YAML file of settings; see docs/distillation.md.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, such as lr=1e-4.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Stop after so long; 'resume' goes on.")]

METHODS = ("dmd2", "msd", "phased-dmd", "rectified-flow", "slimflow")


def _add(method: str) -> None:
    @distill_app.command(method, help=f"Trains a student by {method}; 'run=FOLDER' is where.")
    def train_(
        config: Settings = None, overrides: Overrides = None, minutes: Minutes = None, quiet: Quiet = False
    ) -> None:
        from .training import begin

        given = list(overrides or [])
        if config is not None and "=" in str(config):  # no file, settings alone
            config, given = None, [str(config), *given]
        typer.echo(begin(method, config, given, minutes, quiet))


for _name in METHODS:
    _add(_name)


@distill_app.command("resume")
def resume_(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    overrides: Overrides = None,
    minutes: Minutes = None,
    quiet: Quiet = False,
) -> None:
    """Goes on with a run from its newest checkpoint, exactly as if it had not stopped."""
    from .training import go_on

    typer.echo(go_on(run, overrides or [], minutes, quiet))


@distill_app.command("export")
def export_(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    out: Annotated[Path, typer.Argument(help="The folder of the new pipeline.")],
    dtype: Dtype = "float16",
    lora: Annotated[bool, typer.Option("--lora", help="An adapter, not a whole pipeline.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Writes a run's student as an ordinary pipeline folder, loads it again and compares."""
    from .training import leave

    typer.echo(leave(run, out, dtype, lora, overwrite))

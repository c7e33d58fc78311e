"""The command line: ``diffaccel list | generate | bench | demo``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DiffaccelError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Faster diffusers pipelines, measured.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="A name of the zoo, a local pipeline folder, or a hub id.")]
AccelHelp = "name, name:preset, name(option=value, ...), a+b, or JSON; see `diffaccel list`."
Steps = Annotated[int, typer.Option(min=1, help="Number of inference steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own by default.")]
Seed = Annotated[int, typer.Option(help="Seed of all noise.")]
Scheduler = Annotated[str | None, typer.Option(help="ddim, dpm++, unipc, euler, heun, ..., or a class name.")]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]


@app.command("list")
def list_() -> None:
    """Shows the models of the zoo and the accelerators with their options."""
    from .listing import show

    show()


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, or labels.")] = None,
    accel: Annotated[str | None, typer.Option(help=AccelHelp)] = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    scheduler: Scheduler = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and run.json.")] = Path("out/generate"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Makes images and a record that makes them again."""
    from . import generate as module

    paths = module.generate(model, prompts or [], accel, steps, guidance, seed, scheduler, out, device, dtype)
    for path in paths:
        typer.echo(path)


@app.command()
def bench(
    model: Model,
    accel: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {AccelHelp}")] = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    prompts: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="One a line.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Number of images, without --prompts.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 64,
    seed: Seed = 0,
    scheduler: Scheduler = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved timing rounds.")] = 3,
    plain_steps: Annotated[list[int] | None, typer.Option(min=1, help="Further plain step counts.")] = None,
    flops: Annotated[bool, typer.Option(help="Count floating-point operations (one more run a row).")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/bench"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Measures accelerators against the plain pipeline and against plain fewer steps."""
    from .bench import Settings

    _bench(
        Settings(model, tuple(accel or ["sada"]), steps, guidance, prompts, n, batch, seed, scheduler, rounds,
                 tuple(plain_steps or ()), flops, device, dtype),
        out,
    )  # fmt: skip


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/demo")) -> None:
    """Runs a small benchmark on a model of the zoo, in about two minutes on two cores."""
    from .bench import Settings

    accel = ("sada", "sada:fast", "reuse")
    _bench(Settings("tiny-fashion-sd", accel, guidance=5.0, n=16, scheduler="dpm++", rounds=3), out)


def _bench(settings: "object", out: Path) -> None:
    from rich.console import Console

    from .bench import Settings
    from .bench import bench as run
    from .report import table

    assert isinstance(settings, Settings)
    rows = run(settings, out)
    Console().print(table(rows))
    typer.echo(f"report: {out / 'report.html'}   pictures: {out / 'grid.png'}   record: {out / 'bench.json'}")


def main() -> None:
    """Runs the command line; a mistake of the user is one line on stderr and exit code 2."""
    try:
        app()
    except DiffaccelError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)

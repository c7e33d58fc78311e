"""The command line: ``diffaccel list | generate | bench | demo | fid | stats | eval | combine | ...``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..errors import DiffaccelError
from .arguments import Budget, Device, Dtype, Guidance, Model, Prompts, Protocol, Scheduler, Seed
from .distill import distill_app
from .searches import search_app

if TYPE_CHECKING:
    from .bench import Settings

__all__ = ["app", "main"]

app = typer.Typer(
    help="Faster diffusers pipelines, measured.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

AccelHelp = "name, name:preset, name(option=value, ...), a+b, or JSON; with other steps: s3@5."
ProductHelp = "Prompt or label of a product, repeatable; further prompts join it. One image."
Steps = Annotated[int, typer.Option(min=1, help="Number of inference steps.")]


@app.command("list")
def list_() -> None:
    """Shows the models of the zoo and the accelerators with their options."""
    from .listing import show

    show()


@app.command("generate")
def generate_(
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
    product: Annotated[list[str] | None, typer.Option(help=ProductHelp)] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample q^(1/T) with particles.")] = None,
    particles: Annotated[int | None, typer.Option(min=1, help="Particles an image; 8 by default.")] = None,
) -> None:
    """Makes images and a record that makes them again.

    With --product, --temperature or --particles, weighted particles follow the exact density (Feynman-Kac
    correctors); --guidance is the exact geometric average then, and off by default.
    """
    if product or temperature is not None or particles is not None:
        from .products import PARTICLES, generate_products

        paths, remarks = generate_products(
            model, product or [], prompts or [], accel, steps, guidance,
            1.0 if temperature is None else temperature, particles or PARTICLES, seed, scheduler, out,
            device, dtype,
        )  # fmt: skip
    else:
        from .generate import generate

        paths, remarks = generate(
            model, prompts or [], accel, steps, guidance, seed, scheduler, out, device, dtype
        )
    if remarks:
        typer.echo(remarks)
    for path in paths:
        typer.echo(path)


@app.command("bench")
def bench_(
    model: Model,
    accel: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {AccelHelp}")] = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    prompts: Prompts = None,
    n: Annotated[int, typer.Option(min=1, help="Number of images, without --prompts.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 64,
    seed: Seed = 0,
    scheduler: Scheduler = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved timing rounds.")] = 5,
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
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/demo"),
    fast: Annotated[bool, typer.Option(help="12 images and 3 rounds, or 64 images and 5 rounds.")] = True,
) -> None:
    """Runs a small benchmark on a model of the zoo, in about two minutes on two cores."""
    from .bench import Settings

    accel = ("sada", "sada:fast", "reuse", "s3@5")
    n, rounds = (12, 3) if fast else (64, 5)
    scheduler = "dpm++(timestep_spacing=trailing)"
    _bench(Settings("tiny-fashion-sd", accel, guidance=2.5, n=n, scheduler=scheduler, rounds=rounds), out)


def _bench(settings: "Settings", out: Path) -> None:
    from rich.console import Console

    from .bench import bench
    from .tables import bench_lines, table

    console = Console()
    console.print(table(bench_lines(bench(settings, out)["rows"]), console.width))
    for what, name in (("report", "report.html"), ("pictures", "grid.png"), ("table", "table.md"),
                       ("record", "bench.json")):  # fmt: skip
        typer.echo(f"{what + ':':10}{out / name}")


Metrics = Annotated[str, typer.Option(help="Such as fid,kid,pr; those of the protocol by default.")]
Mixed = Annotated[bool, typer.Option("--mixed-sizes", help="Allow images of different sizes.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Features in bfloat16: faster, other numbers, recorded.")]
Count = Annotated[int | None, typer.Option(min=2, help="The first N images only.")]
Batch = Annotated[int, typer.Option(min=1, help="Images at once.")]


@app.command("fid")
def fid_(
    generated: Annotated[Path, typer.Argument(help="Images: folder, zip, npz or npy; or statistics.")],
    reference: Annotated[
        Path, typer.Argument(help="Images, statistics of `diffaccel stats`, or a zoo model.")
    ],
    protocol: Protocol = "clean",
    metrics: Metrics = "",
    n: Count = None,
    batch: Batch = 64,
    mixed: Mixed = False,
    device: Device = "cpu",
    bf16: Bf16 = False,
    json: Annotated[Path | None, typer.Option(help="File for the full record.")] = None,
) -> None:
    """Scores a set of images against a reference, with standard errors."""
    from .scoring import fid, lines_of

    record = fid(generated, reference, protocol, _names(metrics), n, batch, mixed, device, bf16, json)
    for line in lines_of(record):
        typer.echo(line)


@app.command("stats")
def stats_(
    data: Annotated[Path, typer.Argument(help="Images: folder, zip, npz or npy.")],
    out: Annotated[Path, typer.Option(help="The .npz file; clean-fid, pytorch-fid, EDM and ADM read it.")],
    protocol: Protocol = "clean",
    features: Annotated[
        bool, typer.Option("--features", help="Keep each image's features, for kid, pr.")
    ] = False,
    spatial: Annotated[bool, typer.Option("--spatial", help="Keep spatial statistics, for sfid.")] = False,
    n: Count = None,
    batch: Batch = 64,
    mixed: Mixed = False,
    device: Device = "cpu",
    bf16: Bf16 = False,
) -> None:
    """Writes the statistics of a set of images, to be a reference."""
    from .scoring import stats

    typer.echo(stats(data, protocol, features, spatial, n, batch, mixed, device, bf16, out))


@app.command("eval")
def eval_(
    model: Model,
    accel: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {AccelHelp}")] = None,
    steps: Steps = 50,
    plain_steps: Annotated[list[int] | None, typer.Option(min=1, help="Further plain step counts.")] = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt or label a line, in turn.")
    ] = None,
    n: Annotated[int, typer.Option(min=2, help="Number of images of each method.")] = 5000,
    batch: Annotated[int, typer.Option(min=1, help="Images a call, and in a part that is saved.")] = 64,
    seed: Seed = 0,
    protocol: Protocol = "offline",
    metrics: Metrics = "",
    reference: Annotated[
        Path | None, typer.Option(help="Images or statistics; models of the zoo have one.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away the parts of an earlier run.")
    ] = False,
    save_images: Annotated[bool, typer.Option("--save-images", help="Write all images as PNG, too.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record and its parts.")] = Path("out/eval"),
) -> None:
    """Generates and scores the plain pipeline and accelerated ones; goes on after a kill."""
    from rich.console import Console

    from .evaluate import Settings, evaluate
    from .tables import eval_lines, table

    settings = Settings(
        model, tuple(accel or ()), steps, tuple(plain_steps or ()), guidance, scheduler, prompts, n, batch,
        seed, protocol, _names(metrics), reference, device, dtype,
    )  # fmt: skip
    record = evaluate(settings, out, restart, save_images)
    if record:
        console = Console()
        console.print(table(eval_lines(record["rows"]), console.width))
        typer.echo(f"report: {out / 'report.html'}\nrecord: {out / 'eval.json'}")


@app.command("tune")
def tune_(
    model: Model,
    budget: Annotated[str, typer.Option(help='Such as "lpips<=0.05", "psnr>=30", "speedup>=2".')],
    steps: Steps = 50,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    prompts: Prompts = None,
    images: Annotated[int, typer.Option(min=1, help="Images of the test; half as many to search.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Images a call, as they will be used.")] = 8,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of the search.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved timing rounds.")] = 5,
    coverage: Annotated[float, typer.Option(help="Share of images that is to meet the budget.")] = 0.95,
    confidence: Annotated[float, typer.Option(help="Probability that so many do.")] = 0.95,
    seed: Seed = 0,
    protocol: Annotated[str, typer.Option(help="Features of a budget of feature_distance.")] = "offline",
    store: Annotated[bool, typer.Option("--store", help="Store the plan with the model, too.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option(help="Folder for plan, front and measurements.")] = Path("out/tune"),
) -> None:
    """Finds the fastest stack, solver and steps within a budget, and writes a plan for accel="auto"."""
    from .tune import Settings, lines_of, tune

    settings = Settings(model, budget, steps, guidance, scheduler, prompts, images, batch, candidates, rounds,
                        coverage, confidence, seed, protocol, device, dtype)  # fmt: skip
    for line in lines_of(tune(settings, out, store), out):
        typer.echo(line)


app.add_typer(search_app, name="search")
app.add_typer(distill_app, name="distill")


@app.command("combine")
def combine_(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Files, pipeline folders or adapters, oldest first; or a run's folder."),
    ],
    model: Annotated[
        str, typer.Option(help="What they are tried in: zoo name, pipeline folder, hub id, run's folder.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pipeline and combination.json.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the deployment.")] = 1,
    metric: Annotated[
        str, typer.Option(help="fd, kid, recall, ..., or MODULE:FUNCTION of images, less being better.")
    ] = "fd",
    budget: Budget = 300,
    method: Annotated[str, typer.Option(help="lcsc (CMA-ES), lcsc-ga, ema, mwa, swad or uniform.")] = "lcsc",
    watch: Annotated[str, typer.Option(help="A second metric, reported; '' for none.")] = "kid",
    images: Annotated[int, typer.Option(min=2, help="Images of an evaluation.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 250,
    last: Annotated[int, typer.Option(min=0, help="The last N checkpoints only; 0 for all.")] = 0,
    singles: Annotated[
        bool, typer.Option("--singles", help="Score each checkpoint first, for MWA and SWAD as starts.")
    ] = False,
    cap: Annotated[float, typer.Option(min=0, help="Largest sum of |coefficients|; 0 for no limit.")] = 0.0,
    group: Annotated[
        list[str] | None, typer.Option(help="Repeatable: tensors named so have coefficients of their own.")
    ] = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    protocol: Protocol = "offline",
    reference: Annotated[
        Path | None, typer.Option(help="Images or statistics; half of the images are held out.")
    ] = None,
    component: Annotated[str, typer.Option(help="The network, in a pipeline of several.")] = "",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Type of the weights that are written.")] = "float32",
) -> None:
    """Searches the linear combination of saved checkpoints with the best samples; goes on after a kill."""
    from .combine import run

    lines = run(checkpoints, model, out, metric, component, prompts, reference, device, dtype, steps=steps,
                budget=budget, method=method, watch=watch, images=images, batch=batch, last=last,
                singles=singles, cap=cap, groups=tuple(group or ()), guidance=guidance, protocol=protocol,
                seed=seed)  # fmt: skip
    for line in lines:
        typer.echo(line)


convert = typer.Typer(help="Turns official checkpoints into pipeline folders.", no_args_is_help=True)
app.add_typer(convert, name="convert")


@convert.callback()
def convert_() -> None:
    """Turns official checkpoints into pipeline folders."""


@convert.command("mar")
def convert_mar_(
    checkpoint: Annotated[Path, typer.Argument(help="The official file, such as checkpoint-last.pth.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    vae: Annotated[Path | None, typer.Option(help="The autoencoder, kl16.ckpt; else latents only.")] = None,
) -> None:
    """Writes an official MAR checkpoint as a folder that MARPipeline loads."""
    from ..pipelines.mar_convert import convert_mar

    convert_mar(checkpoint, out, vae)
    typer.echo(out)


@app.command("report")
def report_(
    records: Annotated[list[Path], typer.Argument(help="eval.json, bench.json, fid records, folders.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("out/report.html"),
) -> None:
    """Puts records on one HTML page; those that cannot be compared are refused."""
    from .report import report

    typer.echo(report(records, out))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


_USAGE_ERRORS: tuple[type[Exception], ...] = tuple(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)
"""The base of the errors of typer's parser, which is click's or typer's own copy of it."""


_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake of the user is one line on stderr and exit code 2.

    Arguments:
        arguments: The words of the command line, those of the process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words or ["--help"], standalone_mode=False)
    except DiffaccelError as error:
        _fail(str(error))
    except _USAGE_ERRORS as error:
        _fail(error.format_message())  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # typer has turned Ctrl-C into this code
        print("interrupted; no file is half-written", file=sys.stderr)
    if isinstance(code, int) and code:
        sys.exit(code)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

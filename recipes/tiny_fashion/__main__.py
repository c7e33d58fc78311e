"""The command line: ``python -m recipes.tiny_fashion train unet`` and ``export``."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from diffaccel.errors import DiffaccelError, OptionError
from recipes.tiny_fashion import checkpoint, train
from recipes.tiny_fashion.config import Config, merge, read
from recipes.tiny_fashion.export import export as export_run

app = typer.Typer(help="Trains the tiny-fashion models and exports them.", pretty_exceptions_enable=False)
console = Console()


@app.command("train")
def train_command(
    target: Annotated[str, typer.Argument(help="unet, dit, mar, vae, decoder or classifier")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this time; --resume goes on.")] = None,
    images: Annotated[
        int | None, typer.Option(help="Images in all; the learning rate falls to their end.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; another number gives other bits.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of the Fashion-MNIST .gz files.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; runs/TARGET if not given.")] = None,
    init: Annotated[str | None, typer.Option(help="First weights: zoo, scratch or a pipeline.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder or checkpoint to go on with.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Another setting, as lr=3e-4.")] = None,
) -> None:
    """Trains until the planned images are done, the minutes are over, or Ctrl-C; then saves the run."""
    named = {"images": images, "threads": threads, "data": data, "init": init}
    overrides = {
        **_settings(setting or []),
        **{name: value for name, value in named.items() if value is not None},
    }
    if resume is None:
        run = run or Path("runs") / target
        trainer = train.start(read(target, config, overrides), run)
    else:
        if run is not None or config is not None:
            raise OptionError(
                "--resume takes its folder and settings from the run; leave --run and --config out"
            )
        state = checkpoint.read(resume)
        settings = merge(Config(), state["config"])
        trainer = train.resume(merge(settings, {**overrides, "target": target}, begun=True), resume, state)
    outcome = trainer.fit(minutes=minutes)
    console.print(
        f"{outcome} after {trainer.images:,} of {trainer.config.images:,} images; saved in {trainer.run}"
    )
    console.print(_last(trainer.run / "log.jsonl"), highlight=False, soft_wrap=True)
    if outcome != "complete":
        console.print(f"go on with: train {target} --resume {trainer.run}", highlight=False)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Option(help="Run folder or checkpoint.")],
    out: Annotated[Path, typer.Option(help="Pipeline folder to write.")],
    base: Annotated[str, typer.Option(help="Pipeline that receives a trained decoder.")] = "tiny-fashion-sd",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Writes the averaged weights of a run as an ordinary diffusers folder."""
    console.print(export_run(run, out, base, overwrite), highlight=False, soft_wrap=True)


def _settings(pairs: list[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"--set {pair}: expected name=value")
        settings[name] = {"true": True, "false": False}.get(value.lower(), value)
    return settings


def _last(log: Path) -> str:
    measured = [record for line in log.open(encoding="utf-8") if "held_out" in (record := json.loads(line))]
    values = "  ".join(f"{name} {value:.4f}" for name, value in measured[-1]["held_out"].items())
    return f"held-out loss: {values}"


def main() -> None:
    try:
        app()
    except DiffaccelError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

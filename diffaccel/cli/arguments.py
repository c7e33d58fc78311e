"""Arguments and options that several commands have, with their help."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Budget", "Device", "Dtype", "Guidance", "Model", "Prompts", "Protocol", "Scheduler", "Seed"]

Model = Annotated[str, typer.Argument(help="A name of the zoo, a local pipeline folder, or a hub id.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own by default.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all noise.")]
Scheduler = Annotated[
    str | None,
    typer.Option(help="ddim, dpm++, unipc, ..., a class name, or either with (option=value, ...)."),
]
Prompts = Annotated[Path | None, typer.Option(help="Text file, one prompt or label a line.")]
Budget = Annotated[int, typer.Option(min=1, help="Candidates to score.")]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
Protocol = Annotated[str, typer.Option(help="clean, adm, offline, fashion, ...: see docs/evaluation.md.")]

"""SADA's token-wise part: what it saves at equal error, and from which latents on it is faster at all.

``python benchmarks/token_sada.py`` writes ``token-sada.json`` here.

``runs``: pipelines of the zoo, with and without the token-wise part at several tolerances, on one thread.
The error is the root mean square of the images' differences to those of the plain pipeline.  ``gain`` is the
speed over that of the step-wise part alone at the same error, interpolated between its tolerances in the
logarithms.

``evaluations``: one evaluation of random networks of the shapes of a U-Net, a DiT and Flux, in full and with
a part of the tokens, chosen at random; ``ratio`` is the time over that of the plain network.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from kept import kept
from torch import nn

from diffaccel import zoo
from diffaccel.cli.reading import set_scheduler
from diffaccel.eval import Sampler
from diffaccel.eval.provenance import machine, versions
from diffaccel.eval.sampler import default_conditions
from diffaccel.files import whole
from diffaccel.pipelines import attached
from diffaccel.pipelines.run import BlockCall
from diffaccel.pipelines.tokens import Tokens
from diffaccel.samplers.objective import distance
from diffaccel.zoo.folders import quiet

FOLDER = Path(__file__).parent
TOLERANCES = (0.003, 0.005, 0.007, 0.01, 0.014, 0.02, 0.03)
TOKENS = (0.25, 0.5, 1.0)
PARTS = (0.25, 0.5, 0.75)
SCENES = (
    ("tiny-fashion-dit", 32),
    ("tiny-fashion-dit", 64),
    ("tiny-fashion-sd", 32),
    ("tiny-fashion-sd", 64),
)
"""Pipelines and the side of their images, which were trained for 32; latents are half as wide."""


# ---------------------------------------------------------------- whole runs


def sampler(name: str, size: int, images: int, steps: int) -> Sampler:
    """Returns what calls a pipeline always with the same conditions and noise."""
    with quiet([]):
        pipe: Any = zoo.load(name)
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, "dpm++")
    conditions = default_conditions(name, pipe, images)
    if name.endswith("dit"):
        pipe.transformer.register_to_config(sample_size=size // 2)
        return Sampler(pipe, conditions, steps, 2.5, 0)
    return Sampler(pipe, conditions, steps, 5.0, 0, options={"height": size, "width": size})


def curve(name: str, size: int, images: int, steps: int, repeats: int, work: Path) -> list[dict[str, Any]]:
    """Returns the rows of one pipeline; what was measured is kept in a folder."""
    sample, rows = sampler(name, size, images, steps), list[dict[str, Any]]()
    plain = functools.cache(lambda: sample(batch=images))

    def row(tolerance: float, tokens: float) -> dict[str, Any]:
        reference, seconds = plain(), []
        with attached(sample.pipe, {"sada": {"tolerance": tolerance, "tokens": tokens}}):
            for _ in range(repeats):
                begin = time.process_time()
                made = sample(batch=images)
                seconds.append(time.process_time() - begin)
        ((_, report),) = sample.reports
        return {"rms": distance(made, reference), "evaluated": report.evaluated, "computed": report.tokens,
                "seconds": min(seconds), "repeats": repeats}  # fmt: skip

    for tolerance, tokens in itertools.product(TOLERANCES, (0.0, *TOKENS)):
        options = {"tolerance": tolerance, "tokens": tokens}
        file = work / f"{name}-{size}-{images}-{steps}" / f"{tolerance}-{tokens}.npz"
        measured = kept(file, functools.partial(row, **options))
        rows.append({"model": name, "size": size, **options, **measured})
        print(rows[-1], flush=True)
    known = sorted((row["rms"], row["seconds"]) for row in rows if not row["tokens"])
    errors, times = np.log([[max(value, 1e-9) for value in pair] for pair in known]).T
    for row in rows:
        error = np.log(max(row["rms"], 1e-9))
        inside = errors[0] <= error <= errors[-1]
        expected = float(np.exp(np.interp(error, errors, times)))
        row["gain"] = expected / row["seconds"] - 1 if inside else None
    return rows


# ---------------------------------------------------------------- single evaluations


def unet(side: int) -> tuple[nn.Module, dict[str, Any]]:
    """Attention at the latents' resolution and at half of it."""
    network = diffusers.UNet2DConditionModel(
        sample_size=side, block_out_channels=(128, 256), layers_per_block=1, cross_attention_dim=256,
        attention_head_dim=32, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    return network, {"sample": torch.randn(2, 4, side, side), "timestep": torch.tensor(500),
                     "encoder_hidden_states": torch.randn(2, 16, 256)}  # fmt: skip


def dit(side: int) -> tuple[nn.Module, dict[str, Any]]:
    """Patches of 2."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=4, sample_size=side, in_channels=4
    )
    return network, {"hidden_states": torch.randn(2, 4, side, side), "timestep": torch.tensor([500, 500]),
                     "class_labels": torch.tensor([1, 2])}  # fmt: skip


def flux(side: int) -> tuple[nn.Module, dict[str, Any]]:
    """Latents packed by 2 x 2, and a prompt of 32 tokens."""
    network = diffusers.FluxTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=16, num_layers=2, num_single_layers=2,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(side // 2), torch.arange(side // 2)).float()
    return network, {
        "hidden_states": torch.randn(2, len(grid), 16), "encoder_hidden_states": torch.randn(2, 32, 64),
        "pooled_projections": torch.randn(2, 64), "timestep": torch.tensor([0.5, 0.5]), "img_ids": grid,
        "txt_ids": torch.zeros(32, 3),
    }  # fmt: skip


SHAPES = {"unet": unet, "dit": dit, "flux": flux}


@contextmanager
def through(tokens: Tokens) -> Iterator[None]:
    """Sends the calls of blocks through the token-wise part, as gates do in a run."""

    def enter(module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = BlockCall(None, module, args, kwargs, 0, 0)  # type: ignore[arg-type]
        return tokens.block(call, lambda changed: original(*changed.args, **changed.kwargs))

    for module in tokens.modules:
        module.__dict__["forward"] = functools.partial(enter, module, module.forward)
    yield
    for module in tokens.modules:
        del module.__dict__["forward"]


def evaluation(family: str, side: int, repeats: int) -> list[dict[str, Any]]:
    """Returns the rows of one shape: seconds of the plain network, in full, and with parts of the tokens."""
    torch.manual_seed(0)
    network, given = SHAPES[family](side)
    network.eval().requires_grad_(False)
    tokens = Tokens({"denoiser": network}, 2)
    cells = tokens.cells("denoiser", next(iter(given.values())).shape)
    random, found = np.random.default_rng(0), dict[float, list[float]]()
    parts = (0.0, 1.0, *PARTS)  # the plain network, all tokens remembered, some tokens
    for number in range(repeats + 1):
        for part in parts:
            wanted = random.random((cells.batch, cells.count)).argsort(1) < part * cells.count
            begin = time.process_time()
            if not part:
                network(**given)
            else:
                some = wanted if part < 1 else None
                with (
                    through(tokens),
                    tokens.part(("denoiser", 0), number + part, True, cells, None, some),
                ):
                    network(**given)
            if number:  # the first round warms up
                found.setdefault(part, []).append(time.process_time() - begin)
    plain = statistics.median(found[0.0])
    rows = [
        {"family": family, "latents": side, "kept": part, "seconds": statistics.median(found[part]),
         "ratio": statistics.median(found[part]) / plain}
        for part in parts
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)
    return rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9, help="of single evaluations")
    parser.add_argument("--latents", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--scenes", type=int, nargs="*", default=list(range(len(SCENES))), help="0 to 3")
    parser.add_argument("--work", type=Path, default=Path("out/token-sada"), help="what is measured")
    parser.add_argument("--out", type=Path, default=FOLDER / "token-sada.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        given = arguments.images, arguments.steps, arguments.repeats, arguments.work
        runs = [row for number in arguments.scenes for row in curve(*SCENES[number], *given)]
        single = [row for family in SHAPES for side in arguments.latents
                  for row in evaluation(family, side, arguments.rounds)]  # fmt: skip
    record = {"images": arguments.images, "steps": arguments.steps, "runs": runs, "evaluations": single,
              "machine": machine(torch.device("cpu")), "versions": versions()}  # fmt: skip
    with whole(arguments.out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

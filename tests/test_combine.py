"""``diffaccel combine``: from checkpoints to a pipeline folder, its resume, runs, adapters, mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import output_of as call
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import TINY
from torch import Tensor

from diffaccel.distill.checkpoint_files import open_checkpoint
from diffaccel.distill.checkpoint_matrix import CheckpointMatrix
from diffaccel.distill.combine import COMBINATION, SEARCH, Host, Plan, combine, host_of, host_of_run
from diffaccel.distill.deployment import SCORES, Deployment, Judge, halves
from diffaccel.distill.pairs import make_pairs
from diffaccel.distill.runs import resume
from diffaccel.errors import DiffaccelError, MissingReference, OptionError
from diffaccel.eval import Extractor, collect, open_images, protocol

K = 5
FEW = {"images": 4, "batch": 8, "steps": 2, "guidance": 1.0}
LABELS = ["0", "1", "2"]


def brightness(images: Tensor) -> float:
    """A score of images, less being better."""
    return float(images.mean())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline, five checkpoints of its network, pairs, and reference images."""
    folder = tmp_path_factory.mktemp("combine")
    pipe = TINY["dit"].build()
    pipe.save_pretrained(folder / "teacher")
    make_pairs(folder / "pairs", pipe, [0, 1, 2], count=24, steps=2, guidance=2.0, batch=8)
    state = {name: value.clone() for name, value in pipe.transformer.named_parameters()}
    for place in range(K):
        source = torch.Generator().manual_seed(place)
        moved = {name: value + 0.02 * torch.randn(value.shape, generator=source)
                 for name, value in state.items()}  # fmt: skip
        save_file(moved, folder / f"{place}.safetensors")
    images = torch.randint(0, 256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    (folder / "labels.txt").write_text("\n".join(LABELS))
    np.savez(folder / "reference.npz", arr_0=images.to(torch.uint8).numpy())
    return folder


def files(made: Path) -> list[Path]:
    """The checkpoints."""
    return [made / f"{place}.safetensors" for place in range(K)]


def host(made: Path) -> Host:
    """The tiny pipeline, which has no names of labels."""
    return host_of(str(made / "teacher"), conditions=LABELS)


def test_the_folder_is_an_ordinary_pipeline_with_the_combination(made: Path, tmp_path: Path) -> None:
    """Its weights are those of the coefficients; both scores are there, and those of the averages."""
    out = tmp_path / "out"
    record = combine(Plan(budget=30, **FEW), files(made), host(made), out, score=brightness)
    assert json.loads((out / COMBINATION).read_text()) == record
    assert sum(record["coefficients"]) == pytest.approx(1, abs=1e-6)
    assert record["evaluations"] == {"search": 30, "fresh": 5}
    scores, last = record["scores"], record["averages"]["last"]
    assert scores["search"] < last["search"]
    assert 0 < scores["held_out"]["score"]["value"] < 1 and "uniform" in record["averages"]
    pipe: Any = DiffusionPipeline.from_pretrained(out)
    matrix = CheckpointMatrix([open_checkpoint(file) for file in files(made)])
    wanted = matrix.combine(record["coefficients"])
    own = dict(pipe.transformer.named_parameters())
    assert all(torch.allclose(own[name], value, atol=1e-6) for name, value in wanted.items())
    assert len(wanted) == len(own)


def test_it_goes_on_where_it_was_stopped_and_with_a_larger_budget(made: Path, tmp_path: Path) -> None:
    """In two parts, the second after the folder was finished, it is what it is in one."""

    def found(out: Path, budget: int, **options: Any) -> dict[str, Any]:
        plan = Plan(budget=budget, **{**FEW, **options})
        return combine(plan, files(made), host(made), out, score=brightness)

    for budget in (6, 20, 26):
        parts = found(tmp_path / "parts", budget)
    whole = found(tmp_path / "whole", 26)
    assert parts["coefficients"] == whole["coefficients"] and parts["scores"] == whole["scores"]
    with pytest.raises(OptionError, match="another search: images is 4, now 6"):
        found(tmp_path / "parts", 26, images=6)
    state = json.loads((tmp_path / "parts" / SEARCH).read_text())
    assert len(state["scored"]) == 26


def test_the_command_scores_by_a_metric_of_the_harness(made: Path, tmp_path: Path) -> None:
    """From folders of pipelines, with groups; a half of the reference is held out."""
    folders = []
    for file in files(made)[:3]:
        pipe: Any = DiffusionPipeline.from_pretrained(made / "teacher")
        pipe.transformer.load_state_dict(load_file(file), strict=False)
        folders.append(tmp_path / file.stem)
        pipe.save_pretrained(folders[-1])
    out = tmp_path / "out"
    printed = call("combine", *folders, "--model", made / "teacher", "--steps", 1, "--metric", "fd",
                   "--budget", 16, "--out", out, "--protocol", "fashion", "--reference",
                   made / "reference.npz", "--images", 6, "--group", "transformer_blocks.0", "--guidance", 1,
                   "--method", "lcsc-ga", "--dtype", "float16", "--prompts", made / "labels.txt")  # fmt: skip
    assert f"pipeline: {out}" in printed and "held out fd" in printed and "16 + 5 evaluations" in printed
    record = json.loads((out / COMBINATION).read_text())
    assert record["groups"] == ["transformer_blocks.0", "rest"]
    assert np.array(record["coefficients"]).shape == (2, 3)
    assert set(record["scores"]["held_out"]) == {"fd", "kid"}
    assert record["scores"]["held_out"]["fd"]["se"] > 0
    assert open_checkpoint(out, "transformer").pieces["proj_out_1.weight"].dtype == torch.float16


def test_a_run_combines_what_it_has_kept_at_its_end(made: Path, tmp_path: Path) -> None:
    """With the newest copies only; the folder has a card that says so. And again by the command."""
    run = tmp_path / "run"
    words = [f"teacher={made / 'teacher'}", f"pairs={made / 'pairs'}", f"run={run}", "batch=4", "steps=[1]",
             "eval_count=0", "images=24", "keep_images=4", "warmup_images=0", "protocol=fashion",
             "lr=1e-2"]  # fmt: skip
    with pytest.raises(OptionError, match="combine_budget needs the raw weights"):
        call("distill", "rectified-flow", *words[:-5], "combine_budget=3")
    more = ["keep_raw=4", "combine_budget=3", "combine_images=4", f"reference={made / 'reference.npz'}"]
    with pytest.raises(MissingReference):
        call("distill", "rectified-flow", *words, *more[:3])
    printed = call("distill", "rectified-flow", *words, *more, "--quiet")
    assert "complete after 24 images" in printed and f"pipeline: {run / 'combined'}" in printed
    kept = sorted(path.name for path in (run / "raw").iterdir())
    assert kept == [f"student-{images:010d}.safetensors" for images in (12, 16, 20, 24)]
    assert host_of_run(resume(run, training=False)).guidance == 1  # not the default of the pipeline's call
    card = (run / "combined" / "README.md").read_text()
    assert card.startswith("# combined") and "linear combination of 4 checkpoints" in card
    out = tmp_path / "again"
    call("combine", run, "--model", run, "--out", out, "--budget", 3, "--images", 8, "--last", 2, "--metric",
         "coverage", "--protocol", "fashion", "--method", "ema", "--reference",
         made / "reference.npz")  # fmt: skip
    record = json.loads((out / COMBINATION).read_text())
    assert len(record["coefficients"]) == 2
    assert record["origin"].partition(" ")[0] in ("ema", "last", "uniform")
    assert record["scores"]["search"] == -abs(record["scores"]["search"])  # more coverage is better
    assert DiffusionPipeline.from_pretrained(out) is not None


def test_adapters_of_a_run_become_a_pipeline_and_an_adapter(made: Path, tmp_path: Path) -> None:
    """Exactly what the coefficients say, merged; and at the adapters' rank, scored again."""
    run, out = tmp_path / "run", tmp_path / "out"
    call("distill", "rectified-flow", f"teacher={made / 'teacher'}", f"pairs={made / 'pairs'}", f"run={run}",
         "batch=4", "steps=[1]", "eval_count=0", "images=16", "keep_images=4", "lora_rank=2", "lr=1e-1",
         "warmup_images=0", "--quiet")  # fmt: skip
    call("combine", run, "--model", run, "--out", out, "--budget", 14, "--images", 4, "--metric",
         "test_combine:brightness")  # fmt: skip
    record = json.loads((out / COMBINATION).read_text())
    assert "score" in record["scores"]["held_out_of_adapter"]
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    name = "transformer_blocks.0.attn1.to_q"
    assert saved[f"transformer.{name}.lora_A.weight"].shape[0] == 2
    raw = [load_file(file) for file in sorted((run / "raw").iterdir())]
    delta = sum(alpha * (state[f"{name}.lora_B.student.weight"] @ state[f"{name}.lora_A.student.weight"])
                for alpha, state in zip(record["coefficients"], raw, strict=True))  # fmt: skip
    teacher: Any = DiffusionPipeline.from_pretrained(made / "teacher")
    found: Any = DiffusionPipeline.from_pretrained(out)
    own, base = (pipe.transformer.get_parameter(f"{name}.weight") for pipe in (found, teacher))
    assert (own - base - delta).norm() < 1e-5 * delta.norm() + 1e-6


def test_common_random_numbers_and_disjoint_parts(made: Path) -> None:
    """A candidate's score does not depend on what was scored before; the parts have images of their own."""
    own = host(made)
    matrix = CheckpointMatrix([open_checkpoint(file) for file in files(made)])
    targets = matrix.targets(own.network)
    deployment = Deployment(own.pipe, lambda rows: matrix.write(rows, targets), brightness, 1, images=3,
                            conditions=LABELS, guidance=1.0, batch=2)  # fmt: skip
    rows = [np.eye(K)[[place]] for place in range(2)]
    scores = [deployment(rows[place], 0) for place in (0, 1, 0)]
    assert scores[0] == scores[2] != scores[1]
    parts = [torch.cat(list(deployment.images(part))) for part in range(3)]
    assert [len(part) for part in parts] == [3, 15, 15]
    assert len(torch.unique(torch.cat(parts).flatten(1), dim=0)) == 33
    own.network.get_parameter(matrix.names[0]).data.fill_(torch.nan)
    assert deployment.score(0) == float("inf")


def test_the_halves_of_a_reference_are_disjoint_and_all_scores_have_a_sign(made: Path) -> None:
    """All names of scores are scores of the harness."""
    extractor = Extractor(protocol("fashion"))
    whole = collect(open_images(made / "reference.npz"), extractor, ("features",))
    first, second = halves(whole)
    assert whole.features is not None and first.features is not None and second.features is not None
    rows = np.concatenate([first.features[0:20], second.features[0:20]])
    assert len(np.unique(rows, axis=0)) == len(np.unique(whole.features[0:40], axis=0)) == 40
    images = [torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(1))]
    for name in ("fd", "kid", "precision", "density"):
        judge = Judge(name, extractor, (first, second), ["coverage"])
        value, found = judge(iter(images), 1), judge.report(iter(images), 1)
        assert value == pytest.approx(SCORES[name][2] * found[name].value) and "coverage" in found
    with pytest.raises(OptionError, match="no metric 'fidd'"):
        Judge("fidd", extractor, (first, second))


@pytest.mark.parametrize(("words", "message"), [
    (["0.safetensors", "--budget", 3], "1 checkpoint; a combination needs at least 2"),
    (["nothing", "--budget", 3], "no checkpoint"), (["--metric", "fdd"], "'fdd' is none of"),
    (["--metric", "nothing:there"], "no function 'nothing:there'"), (["--method", "lcs"], "'lcs' is none of"),
    (["--cap", 0.5], "cap is 0.5"), (["--group", "tail"], "no tensor of the group 'tail'"),
    ([], "--reference"),
    (["--model", "tiny-fashion-sd"], "which the network has not"),
])  # fmt: skip
def test_mistakes_are_told(made: Path, tmp_path: Path, words: list[Any], message: str) -> None:
    """A mistake is one line, and no folder is left."""
    given, labels, out = [str(word) for word in words], made / "labels.txt", tmp_path / "out"
    paths = [made / given.pop(0)] if given and not given[0].startswith("--") else files(made)
    score = [] if "--metric" in given or not words else ["--metric", "test_combine:brightness"]
    model = [] if "--model" in given else ["--model", str(made / "teacher")]
    with pytest.raises(DiffaccelError, match=message):
        call("combine", *paths, *model, *score, *given, "--prompts", labels, "--out", out)
    assert not out.exists()


def test_a_folder_of_something_else_is_left_alone(made: Path) -> None:
    """Nothing is written to a folder that holds no search."""
    with pytest.raises(DiffaccelError, match="exists and holds no search"):
        combine(Plan(**FEW), files(made), host(made), made, score=brightness)

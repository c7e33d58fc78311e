"""The catalog of tiny pipelines is sound, and the table of compatibility is that of its record."""

import inspect
import json
import re
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from tiny.catalog import RECIPES, NotBuilt, arguments, build, pipelines
from torch.utils import _pytree as pytree

from diffaccel.pipelines.layers import residual_layers, skip_path
from diffaccel.pipelines.loops import _REFUSED
from diffaccel.pipelines.run import denoisers_of

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

CLASSES = pipelines()


def signatures(recipe, method):
    matched = [cls for name, cls in CLASSES.items() if re.search(recipe.pattern, name)]
    return {key for cls in matched for key in inspect.signature(getattr(cls, method)).parameters}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.pattern)
def test_recipes_are_for_something(recipe):
    """A name that is misspelled would be left out in silence."""
    assert any(re.search(recipe.pattern, name) for name in CLASSES)
    assert recipe.parts.keys() <= signatures(recipe, "__init__")
    assert recipe.call.keys() <= signatures(recipe, "__call__")


def test_the_catalog_builds():
    state = torch.get_rng_state()
    for name in ("StableDiffusionXLControlNetPipeline", "AuraFlowPipeline", "ZImagePipeline"):
        pipe, again = build(CLASSES[name]), build(CLASSES[name])
        weights = [next(iter(p.components["vae"].state_dict().values())) for p in (pipe, again)]
        assert torch.equal(*weights)
        with torch.no_grad(), torch.random.fork_rng():  # some draw noise of their own
            output = pipe(num_inference_steps=2, **arguments(CLASSES[name]))[0]
        assert torch.isfinite(output).all()
    with pytest.raises(NotBuilt, match="no denoising loop"):
        build(diffusers.FluxPriorReduxPipeline)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["BriaPipeline", "ZImagePipeline"])
def test_blocks_that_diffusers_describes_wrongly(name):
    """What stands in the place of a block's output must be where the output is."""
    pipe, seen = build(CLASSES[name]), []

    def compare(block, args, kwargs, output):
        made = skip_path(block, args, kwargs)
        seen.append([leaf.shape for leaf in pytree.tree_leaves(made)])
        assert seen[-1] == [leaf.shape for leaf in pytree.tree_leaves(output)]

    for block in residual_layers(pipe.transformer).values():
        block.register_forward_hook(compare, with_kwargs=True)
    pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0), **arguments(CLASSES[name]))
    assert seen


UNUSUAL = [
    ("StableCascadeDecoderPipeline", "decoder"),
    ("VersatileDiffusionImageVariationPipeline", "image_unet"),
]


@pytest.mark.parametrize(("name", "network"), UNUSUAL)
def test_denoisers_of_unusual_names(name, network):
    pipe = build(CLASSES[name])
    assert list(denoisers_of(pipe)) == [network]
    with torch.no_grad(), torch.random.fork_rng():
        pipe.to(accel="reuse")(num_inference_steps=4, **arguments(CLASSES[name]))
    report = pipe.accel.report
    assert report.counts[network].requested == report.updates == 4 and report.evaluated < 4


def test_refused_classes_exist():
    assert all(any(name.startswith(start) for name in CLASSES) for start in _REFUSED)


def test_the_table_is_that_of_the_record():
    from compatibility_tables import tables

    record = json.loads((ROOT / "benchmarks" / "compatibility.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8") == tables(record)
    rows = [row for entry in record["pipelines"].values() for row in entry.get("accelerators", {}).values()]
    assert not [row for row in rows if row["status"] in ("crashed", "idle")]
    assert all(entry["restored"] for entry in record["pipelines"].values() if entry.get("repeatable"))

"""What APG refuses, and why."""

import inspect

import diffusers
import pytest
from tiny_pipelines import TINY, fresh, run

from diffaccel import OptionError, UnsupportedPipeline
from diffaccel.pipelines.apg_guider import APGGuider
from diffaccel.pipelines.branches import _CONVENTIONS, convention_of, why_unguided


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DDIMPipeline", "neither a guidance scale nor a negative prompt"),
        ("StableDiffusionInstructPix2PixPipeline", "three predictions"),
        ("LatentConsistencyModelPipeline", "an input of the network"),
        ("FluxControlPipeline", "an input of the network"),
        ("Cosmos2TextToImagePipeline", "coordinates"),
        ("AceStepPipeline", "of its own"),
        ("StableDiffusionPipeline", None),
        ("FluxPipeline", None),
        ("DiTPipeline", None),
        ("StableVideoDiffusionPipeline", None),
        ("Cosmos2_5_PredictBasePipeline", None),
        ("ChromaPipeline", None),
    ],
)
def test_pipelines_that_never_guide_are_refused(name, words):
    cls = getattr(diffusers, name)
    network = fresh("flux").transformer if "Flux" in name else fresh("sd").unet
    stub = type(name, (), {"__call__": cls.__call__, "transformer": network})()
    reason = why_unguided(stub)
    assert reason is None if words is None else words in reason


def test_refusals():
    with pytest.raises(
        UnsupportedPipeline, match="apg cannot accelerate this DDIMPipeline: it has no guidance"
    ):
        fresh("ddim").to(accel="apg")
    distilled = fresh("sd")
    distilled.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(UnsupportedPipeline, match="predicts once"):
        distilled.to(accel="apg")
    pipe = fresh("sd")
    pipe.guider = APGGuider()
    with pytest.raises(UnsupportedPipeline, match="APGGuider"):
        pipe.to(accel="apg")
    del pipe.guider
    pipe.scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=4)
    with pytest.raises(UnsupportedPipeline, match="discrete tokens"):
        pipe.to(accel="apg")
    with pytest.raises(UnsupportedPipeline, match="dims='frame' needs latents with frames"):
        run(TINY["sd"], fresh("sd").to(accel={"apg": {"dims": "frame"}}), 3)
    with pytest.raises(OptionError, match="momentum=-1"):
        pipe.to(accel={"apg": {"momentum": -1}})


def test_more_than_two_branches_are_refused():
    pipe = diffusers.StableDiffusionPAGPipeline(**fresh("sd").components, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(
        UnsupportedPipeline, match="no pair of predictions in the first step of StableDiffusionPAG"
    ):
        run(TINY["sd"], pipe.to(accel="apg"), 3)


def test_canary_conventions_are_those_of_pipelines_that_exist():
    names = [name for name in dir(diffusers) if "Pipeline" in name and "Modular" not in name]
    for start, convention in _CONVENTIONS.items():
        mine = [name for name in names if name.startswith(start)]
        assert mine, start
        for name in mine:
            found = convention_of(type(name, (), {})())
            if found == convention and found.scale:
                assert found.scale in inspect.signature(getattr(diffusers, name).__call__).parameters, name

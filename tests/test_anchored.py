"""The anchored scheduler against its function, diffusers' Euler steps, and in pipelines."""

import copy
import json
import pickle

import diffusers
import pytest
import ring
import torch
from tiny_pipelines import MAX_LENGTH, PROMPTS, TINY, fresh, run, uniform

from diffaccel.distill.reflow import euler, euler_anchored
from diffaccel.errors import OptionError, UnsupportedScheduler
from diffaccel.noise import is_stochastic, path_of, probe
from diffaccel.samplers import AnchoredFlowScheduler

STEPS = [1, 2, 3, 7]


def flow_match(count, **options):
    """diffusers' Euler scheduler on the grid of ours."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(sigmas=[1 - n / count for n in range(count)])
    return scheduler


def ready(*arguments, **keywords):
    scheduler = AnchoredFlowScheduler()
    scheduler.set_timesteps(*arguments, **keywords)
    return scheduler


def loop(scheduler, velocity, x, start=0, **keywords):
    """A pipeline's loop."""
    for timestep in scheduler.timesteps[start:]:
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        output = velocity(seen, (timestep / 1000).expand(len(x)))
        x = scheduler.step(output, timestep, x, return_dict=False, **keywords)[0]
    return x


def noise(count=64, dtype=torch.float32):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize("count", STEPS)
def test_is_the_function(count):
    """On a curved field, where the rule is another than Euler's from three steps on."""
    scheduler, z = ready(count), noise(dtype=torch.float64)
    assert not scheduler.is_anchored
    found = loop(scheduler, ring.field, z)
    assert scheduler.is_anchored and scheduler.step_index == count and found.dtype == torch.float64
    times = [1 - n / count for n in range(count)]
    assert torch.allclose(found, euler_anchored(ring.field, z, times), atol=1e-5)  # timesteps are float32
    assert torch.allclose(scheduler.timesteps, 1000 * torch.tensor(times)) and scheduler.sigmas[-1] == 0
    plain = loop(flow_match(count), ring.field, noise())
    assert torch.allclose(plain.double(), euler(ring.field, z, times), atol=1e-4)
    assert torch.allclose(found.float(), plain, atol=1e-5) == (count <= 2)


@pytest.mark.parametrize("count", STEPS)
def test_straight_paths_are_those_of_euler(count):
    """Check 7 of the card: on a perfect reflow the rule is Euler's, for all N."""
    z = noise()
    target = 0.5 * z + 0.3

    def velocity(x, t):
        return z - target

    assert torch.allclose(loop(ready(count), velocity, z), target, atol=1e-6)
    assert torch.allclose(loop(flow_match(count), velocity, z), target, atol=1e-6)


def test_without_pure_noise_it_is_euler():
    """Image-to-image, by an index or by sigmas below 1; two runs of one scheduler do not mix."""
    x = noise()
    ours, theirs = ready(5), flow_match(5)
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(2)
    found, expected = (loop(scheduler, ring.field, x, 2) for scheduler in (ours, theirs))
    assert torch.allclose(found, expected, atol=1e-6) and not ours.is_anchored and ours.begin_index == 2
    assert torch.allclose(loop(ready(5), ring.field, x, 2), expected, atol=1e-6), "found by its timestep"
    theirs.set_timesteps(sigmas=[0.7, 0.2])
    expected = loop(theirs, ring.field, x)
    assert torch.allclose(loop(ready(sigmas=[0.7, 0.2]), ring.field, x), expected, atol=1e-6)
    first = loop(ready(3), ring.field, x)
    for _ in range(2):
        ours.set_timesteps(3)
        assert ours.step_index is None and ours.begin_index is None and not ours.is_anchored
        assert torch.equal(loop(ours, ring.field, x), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_and_the_kept_noise(dtype):
    """Steps are made in float32 or wider, also if the pipeline changes its sample in place."""
    scheduler, x = ready(3), noise(dtype=dtype)
    z = x.clone()
    for timestep, s in zip(scheduler.timesteps, (2 / 3, 1 / 3, 0.0), strict=True):
        before, output = x.double(), ring.field(x.double(), (timestep / 1000).expand(64)).to(dtype)
        after = scheduler.step(output, timestep, x).prev_sample
        x0 = before - timestep.double() / 1000 * output.double()
        expected = (1 - s) * x0 + s * z.double()
        assert after.dtype == dtype and torch.allclose(
            after.double(), expected, atol=3 * torch.finfo(dtype).eps * 4
        )
        x.zero_()
        x = after


def test_levels_that_are_given():
    same = ready(4), ready(sigmas=[1, 0.75, 0.5, 0.25]), ready(sigmas=[1, 0.75, 0.5, 0.25, 0]), ready(
        timesteps=[1000, 750, 500, 250]), ready(4, sigmas=[1, 0.75, 0.5, 0.25], mu=0.7)  # fmt: skip
    for scheduler in same:
        assert scheduler.timesteps.tolist() == [1000, 750, 500, 250] and scheduler.num_inference_steps == 4
        assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    for wrong in (
        dict(),
        dict(num_inference_steps=0),
        dict(sigmas=[]),
        dict(sigmas=[0.5, 0.7]),
        dict(sigmas=[1.2]),
        dict(sigmas=[1, -0.1]),
        dict(sigmas=[1], timesteps=[1000]),
        dict(sigmas=[1], num_inference_steps=2),
    ):
        with pytest.raises(OptionError):
            ready(**wrong)
    x = noise()
    with pytest.raises(OptionError, match="set_timesteps"):
        AnchoredFlowScheduler().step(x, 1000.0, x)
    scheduler = ready(1)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(OptionError, match="last step"):
        scheduler.step(x, scheduler.timesteps[0], x)


# ---------------------------------------------------------------- what diffusers and diffaccel ask of it


def test_path():
    scheduler = ready(4)
    path = path_of(scheduler)
    assert path.kind == "flow" and len(path) == 4 and is_stochastic(scheduler) is None
    assert [(level.alpha, level.sigma) for level in path.levels] == [
        (1 - t, t) for t in (1, 0.75, 0.5, 0.25, 0)
    ]
    assert len(probe(AnchoredFlowScheduler())) == 10
    x0, z = noise(), noise().flip(0)
    for level, timestep in zip(path.levels, scheduler.timesteps, strict=False):
        mixed = scheduler.scale_noise(x0, timestep[None], z)
        assert torch.allclose(mixed, level.alpha * x0 + level.sigma * z)
        assert torch.allclose(level.x0(z - x0, mixed), x0, atol=1e-6)
    both = scheduler.add_noise(x0[:2].half(), z[:2].half(), torch.tensor([1000.0, 0.0]))
    assert torch.equal(both, torch.stack([z[0], x0[1]]).half())


def test_state_can_be_copied():
    """Halfway, as accelerators that repeat steps need it."""
    scheduler, z = ready(4), noise()
    output = ring.field(z, torch.ones(64))
    x = scheduler.step(output, scheduler.timesteps[0], z).prev_sample
    copies = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    ends = [loop(other, ring.field, x, 1) for other in (scheduler, *copies)]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_saved_and_loaded(tmp_path):
    scheduler = AnchoredFlowScheduler(num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    loaded = AnchoredFlowScheduler.from_pretrained(tmp_path)
    assert loaded.config.num_train_timesteps == len(loaded) == 500
    loaded.set_timesteps(2)
    assert loaded.timesteps.tolist() == [500, 250]


def test_made_from_other_schedulers():
    flows = [diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.FlowMatchHeunDiscreteScheduler(),
             diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
             AnchoredFlowScheduler()]  # fmt: skip
    for other in flows:
        made = AnchoredFlowScheduler.from_config(other.config)
        made.set_timesteps(2)
        assert made.sigmas.tolist() == [1, 0.5, 0], "a shift is not taken over"
    others = [diffusers.DDIMScheduler(), diffusers.EDMEulerScheduler(),
              diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
              diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)]  # fmt: skip
    for other in others:
        with pytest.raises(UnsupportedScheduler):
            AnchoredFlowScheduler.from_config(other.config)


@pytest.mark.parametrize("name", ["flux", "sd3", "sana"])
def test_pipelines(name):
    """One step is Euler's; several are not, and are on the grid that was asked for."""
    pipe, case = fresh(name), TINY[name]
    pipe.scheduler = AnchoredFlowScheduler.from_config(pipe.scheduler.config)
    one, four = run(case, pipe, 1), run(case, pipe, 4)
    assert pipe.scheduler.is_anchored and pipe.scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if name == "sana":
        pipe.scheduler.set_timesteps = lambda count, device: (
            diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps(
                pipe.scheduler, sigmas=[1 - n / count for n in range(count)], device=device))  # fmt: skip
    assert torch.allclose(run(case, pipe, 1), one, atol=1e-4)
    plain = run(case, pipe, 4)
    assert 1e-3 < float((four - plain).std() / plain.std()) < 0.8


def test_image_to_image():
    parts = fresh("sd3").components
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS, "image": uniform(2, 3, 32, 32), "strength": 0.5, "height": 32, "width": 32,
            "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": MAX_LENGTH}  # fmt: skip
    found = []
    for scheduler in (AnchoredFlowScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        pipe.scheduler = scheduler
        sigmas = [1.0, 0.75, 0.5, 0.25]
        found.append(pipe(**call, sigmas=sigmas, generator=torch.Generator().manual_seed(0))[0])
        assert scheduler.begin_index == 2 and scheduler.step_index == 4
    assert torch.allclose(*found, atol=1e-5)


def test_a_saved_pipeline_has_it(tmp_path):
    """Under the name of our package, which a fresh process has imported."""
    pipe = fresh("ddim")
    pipe.scheduler = AnchoredFlowScheduler()
    diffusers.DiffusionPipeline.save_pretrained(pipe, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffaccel.samplers", "AnchoredFlowScheduler"]
    assert AnchoredFlowScheduler.from_pretrained(tmp_path, subfolder="scheduler").order == 1

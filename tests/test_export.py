"""Students that leave: which stock scheduler has a grid, folders that load as any other, and refusals."""

import json
import logging
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY, ddim_scheduler, fresh, run, vp
from torch import nn

from diffaccel import zoo
from diffaccel.distill import trial
from diffaccel.distill.adapters import add_lora, lora_parameters
from diffaccel.distill.card import Card
from diffaccel.distill.export import export, export_lora
from diffaccel.distill.grid import Calls, Grid, scheduler_for
from diffaccel.distill.students import prune, student_like
from diffaccel.errors import ModelError, OptionError, UnsupportedPipeline, UnsupportedScheduler
from diffaccel.noise import path_of, probe
from diffaccel.pipelines import accelerate
from diffaccel.pipelines.identity import GUIDANCE_KEY, STEPS_KEY
from diffaccel.samplers import FixedGridScheduler

CARD = {"teacher": "somebody/teacher", "method": "rectified flow", "data": "Some pictures.",
        "licence": "CC0", "images": 12_000, "hours": "1.5 of one CPU core", "figures": {"FID-1k": 0.5},
        "limits": "Small."}  # fmt: skip
SIZE = {"height": 32, "width": 32}
EXPORT = sys.modules["diffaccel.distill.export"]  # the package has a function of this name

# ---------------------------------------------------------------- grids and schedulers

FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
DPM_FLOW = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
LINEAR = diffusers.DDIMScheduler(clip_sample=False)
SCALED = ddim_scheduler(prediction_type="v_prediction")
SDXL = vp(diffusers.EulerDiscreteScheduler, steps_offset=1, timestep_spacing="leading")
FLUX = Calls({n: {"sigmas": [1 - k / n for k in range(n)], "mu": 0.7} for n in (1, 2, 4)}, False)


def uniform(*counts, kind="flow", shift=1.0):
    return [Grid.uniform(count, kind, shift) for count in counts]


def trailing(teacher, *counts, kind="vp-ode", cls=diffusers.DDIMScheduler):
    table = {key: teacher.config[key] for key in ("beta_schedule", "beta_start", "beta_end")}
    return [Grid(Grid.of(cls(**table, timestep_spacing="trailing"), count).times, kind) for count in counts]


def jumps(teacher, *counts):
    return [Grid.stock(teacher, count, jump=True) for count in counts]


EULER, MAP = "FlowMatchEulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler"
DPM, DDIM, LCM, OWN = "DPMSolverMultistepScheduler", "DDIMScheduler", "LCMScheduler", "FixedGridScheduler"
TABLE = {  # what was trained, how the pipeline calls its scheduler, and the scheduler that has the grids
    "one step": (FLOW, uniform(1), None, MAP, {"shift": 1.0}),
    "one step, no scaling": (FLOW, uniform(1), Calls({1: {"num_inference_steps": 1}}, False), EULER, {}),
    "one step, scaling": (FLOW, uniform(1), Calls({1: {"num_inference_steps": 1}}, True), MAP, {}),
    "equal steps": (FLOW, uniform(1, 2, 4), None, MAP, {"shift": 1.0}),
    "four equal steps": (FLOW, uniform(4), None, MAP, {"shift": 1.0}),
    "shifted": (FLOW, uniform(1, 2, 4, shift=3.0), None, MAP, {"shift": 3.0}),
    "DMD2 of Wan": (FLOW, [Grid((1, 15 / 16, 5 / 6, 5 / 8))], None, MAP, {"shift": 5.0}),
    "Flux": (FLOW, uniform(1, 2, 4), FLUX, EULER, {"shift": 1.0, "use_dynamic_shifting": False}),
    "shifted Flux": (FLOW, uniform(1, 2, 4, shift=3.0), FLUX, EULER, {"shift": 3.0}),
    "Euler's own": (FLOW, [Grid((1, 0.001)), Grid((1, 0.667, 0.334, 0.001))], None, EULER, {"shift": 1.0}),
    "stretched": (FLOW, [Grid((1, 0.6, 0.2))], None, EULER, {"shift_terminal": 0.2}),
    "first of DPM": (DPM_FLOW, [Grid((0.999,))], None, DPM, {"solver_order": 1, "use_flow_sigmas": True}),
    "rounded times": (DPM_FLOW, [Grid((0.999, 0.74925, 0.4995, 0.24975))], None, OWN, {}),
    "any times": (FLOW, [Grid((0.9, 0.5, 0.3))], None, OWN, {}),
    "fresh noise": (FLOW, uniform(4, kind="x0-jump"), None, EULER, {"stochastic_sampling": True}),
    "fresh noise, Flux": (FLOW, uniform(1, 2, 4, kind="x0-jump"), FLUX, EULER, {"stochastic_sampling": True}),
    "fresh noise, many": (FLOW, uniform(1, 2, 4, kind="x0-jump"), None, OWN, {"stochastic_sampling": True}),
    "DDIM": (SCALED, trailing(SCALED, 1, 2, 4), None, DDIM, {"timestep_spacing": "trailing"}),
    "DDIM, linear": (LINEAR, trailing(LINEAR, 1, 2, 4), None, DDIM, {"timestep_spacing": "trailing"}),
    "DDIM for SDXL": (SDXL, trailing(SDXL, 1, 2, 4), None, DDIM, {"timestep_spacing": "trailing"}),
    "DDIM of three": (SCALED, trailing(SCALED, 3), None, DPM, {"solver_order": 1}),
    "pure noise": (SCALED, [Grid((1.0,), "vp-ode")], None, DDIM, {}),
    "from pure noise": (SCALED, [Grid((1.0, 0.6), "vp-ode")], None, OWN, {}),
    "equal times": (SCALED, uniform(4, kind="vp-ode"), None, OWN, {}),
    "LCM": (SCALED, jumps(SCALED, 1, 2, 4), None, LCM, {"original_inference_steps": 50}),
    "LCM, linear": (LINEAR, jumps(LINEAR, 1, 2, 4), None, LCM, {"original_inference_steps": 50}),
    "LCM, trailing": (SCALED, trailing(SCALED, 1, 2, 4, kind="x0-jump"), None, LCM,
                      {"original_inference_steps": 4}),
    "LCM, pure noise": (SCALED, [Grid((1.0,), "x0-jump")], None, LCM, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_which_scheduler_has_a_grid(case):
    teacher, grids, calls, name, settings = TABLE[case]
    found = scheduler_for(teacher, grids, calls)
    assert type(found).__name__ == name
    assert {key: found.config[key] for key in settings} == pytest.approx(settings)
    most = 1 if probe(teacher).kind == "flow" else trailing(teacher, 1)[0].times[0]
    for grid in grids:
        count = {"num_inference_steps": len(grid)}
        found.set_timesteps(**(count if calls is None else calls.arguments[len(grid)]))
        levels = path_of(found).levels[:-1]
        times = [level.sigma / (level.alpha + level.sigma) for level in levels]
        assert times == pytest.approx([min(time, most) for time in grid.times], abs=1e-5)


def test_grids_that_stock_schedulers_have():
    """Figures of the cards: what looks like four equal steps is not."""
    assert Grid.of(diffusers.FlowMatchEulerDiscreteScheduler(), 2).times == pytest.approx((1, 0.001))
    assert Grid.of(diffusers.FlowMatchLCMScheduler(), 4).kind == "x0-jump"
    assert Grid.of(FLOW, 4).times == pytest.approx((1, 0.858, 0.602, 0.0089), abs=2e-3)
    assert Grid.stock(FLOW, 4).times == pytest.approx((1, 0.9, 0.75, 0.5))
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert jumps(SCALED, 4)[0].times == pytest.approx(Grid.of(scheduler, 4).times)
    assert Grid.stock(SCALED, 4).kind == "vp-ode" and len(Grid.stock(SCALED, 4)) == 4
    assert Grid.uniform(4, shift=5.0).times == pytest.approx((1, 0.9375, 5 / 6, 0.625))


def test_wrong_grids():
    for times, kind in (((), "flow"), ((0.5, 0.6), "flow"), ((1.1,), "flow"), ((1.0,), "ode")):
        with pytest.raises(OptionError, match="grid"):
            Grid(times, kind)
    with pytest.raises(OptionError, match="ancestral"):
        Grid.of(diffusers.EulerAncestralDiscreteScheduler(), 4)
    with pytest.raises(UnsupportedScheduler, match="neither"):
        scheduler_for(diffusers.EDMEulerScheduler(), Grid((1.0,)))
    for teacher, grids, words in (
        (FLOW, [], "expected some"), (FLOW, [Grid((1.0,)), Grid((1.0, 0.5), "x0-jump")], "of one kind"),
        (FLOW, [Grid((1.0,), "vp-ode")], "flow and x0-jump"), (SCALED, [Grid((1.0,))], "vp-ode and x0-jump"),
        (FLOW, uniform(2, 2), "one for each number"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            scheduler_for(teacher, grids)


# ---------------------------------------------------------------- pipelines


def part_of(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


def changed(pipe):
    """A student: the teacher's network with other last weights."""
    network = getattr(pipe, part_of(pipe))
    student = student_like(network)
    student.load_state_dict(network.state_dict())
    with torch.no_grad():
        for tensor in list(student.parameters())[-2:]:
            tensor.mul_(1.2)
    return student


def written(name, tmp_path, grids=None, jump=False, guidance=1.0, **options):
    pipe = fresh(name)
    grids = grids or [Grid.stock(pipe.scheduler, count, jump) for count in (1, 2)]
    call = {key: value for key, value in TINY[name].call.items() if key in (*SIZE, "max_sequence_length")}
    options = {"card": CARD, "options": call, **options}
    student, out = changed(pipe), tmp_path / "it"
    return pipe, student, export(student, pipe, part_of(pipe), grids, out, guidance=guidance, **options)


def reloaded(folder, dtype=torch.float16):
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("name", "jump", "scheduler"), [
    ("sd", True, LCM), ("ddim", False, DDIM), ("dit", False, DDIM), ("sd3", False, MAP),
    ("flux", True, EULER),
])  # fmt: skip
def test_pipelines(name, jump, scheduler, tmp_path, caplog):
    """Stock diffusers loads the folder without a word, and it makes the student's images."""
    pipe, _, folder = written(name, tmp_path, jump=jump)
    index = json.loads((folder / "model_index.json").read_text())
    modules = {entry[0] for entry in index.values() if isinstance(entry, list)}
    assert modules <= {"diffusers", "transformers", "stable_diffusion", None} and "_name_or_path" not in index
    other = fresh(name)
    assert type(pipe.scheduler) is type(other.scheduler) and dict(pipe.config) == dict(other.config)
    before, after = (getattr(one, part_of(one)).state_dict() for one in (other, pipe))
    assert all(torch.equal(after[key], before[key]) for key in before)
    logging.getLogger("diffusers").propagate = True
    student = reloaded(folder)
    logging.getLogger("diffusers").propagate = False
    assert not [record for record in caplog.records if "expected" in record.getMessage()]
    assert type(student.scheduler).__name__ == scheduler and student.scheduler.config[STEPS_KEY] == [1, 2]
    assert student.scheduler.config.get(GUIDANCE_KEY) == (None if name == "ddim" else 1.0)
    kinds = {tensor.dtype for tensor in getattr(student, part_of(pipe)).state_dict().values()}
    assert kinds == {torch.float16}
    text = (folder / "README.md").read_text()
    for words in (CARD["teacher"], "rectified flow", "12,000 images", "CC0", "FID-1k", "Some pictures",
                  scheduler, "float16", "loaded again", "num_inference_steps=2", "Small."):  # fmt: skip
        assert words in text
    assert [file.name for file in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize(("name", "guidance"), [("sd", 1.0), ("flux", 3.5)])
def test_no_guidance_scale_can_do_harm(name, guidance, tmp_path):
    """Stable Diffusion leaves guidance to the network, and Flux's constant is in a bias: scales are one."""
    pipe, student, folder = written(name, tmp_path, guidance=guidance)
    own = reloaded(folder, torch.float32)
    images = [run(TINY[name], own, 2, guidance_scale=scale) for scale in (1.0, guidance, 7.5)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    setattr(pipe, part_of(pipe), student.eval())
    pipe.scheduler = own.scheduler
    trained = run(TINY[name], pipe, 2, guidance_scale=guidance)
    assert float((images[0] - trained).abs().max()) < 5e-3 * float(trained.abs().max())  # float16 weights
    text = (folder / "README.md").read_text()
    assert "guidance_scale=" not in text and "| guidance_scale | any" in text


def test_own_grid(tmp_path):
    """A grid that no stock scheduler has: the card says what to import, and no other number of steps runs."""
    pipe = fresh("sd3")
    times = [Grid((0.95,)), Grid((0.95, 0.4))]
    folder = written("sd3", tmp_path, grids=times, dtype=torch.float32)[2]
    own = reloaded(folder, torch.float32)
    assert type(own.scheduler) is FixedGridScheduler and own.scheduler.grids == {1: (0.95,), 2: (0.95, 0.4)}
    with pytest.raises(OptionError, match="trained for 1, 2 steps, not for 3"):
        run(TINY["sd3"], own, 3)
    text = (folder / "README.md").read_text()
    assert text.index("import diffaccel") < text.index("from_pretrained") and "**1** (off)" in text
    assert "guidance_scale=1)" in text and type(pipe.scheduler).__name__ == EULER


def test_pruned_zoo(tmp_path):
    """The student of the zoo's DiT: 37 % of its weights, class names kept, guidance is an error."""
    pipe = zoo.load("tiny-fashion-dit")
    student = student_like(pipe.transformer, num_layers=4, attention_head_dim=60, num_embeds_ada_norm=90)
    prune(pipe.transformer, student)
    student.train()
    folder = export(student, pipe, "transformer", uniform(1, 2), tmp_path / "slim", guidance=1.0,
                    card=CARD, conditions=["red coat", "sneaker"])  # fmt: skip
    assert student.training and all(module.training for module in student.modules())
    slim = reloaded(folder, torch.float32)
    assert type(slim.scheduler).__name__ == MAP and slim.labels == pipe.labels
    assert sum(p.numel() for p in slim.transformer.parameters()) == 2_795_596
    text = (folder / "README.md").read_text()
    call = 'pipe(pipe.get_label_ids(["red coat"]), num_inference_steps=2, guidance_scale=1)'
    assert call in text and "2.8 M weights, 37% of its teacher's" in text
    assert "call with guidance is an error" in text
    with pytest.raises(IndexError):
        slim([5, 7], num_inference_steps=2)


# ---------------------------------------------------------------- refusals


def perturbed(folder, dtype):
    pipe = zoo.load_pipeline(folder, dtype)
    with torch.no_grad():
        next(iter(getattr(pipe, part_of(pipe)).parameters())).mul_(1.5)
    return pipe


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("module", "name", "fake", "words"), [
    (EXPORT, "load_pipeline", perturbed, "loaded again, the student makes other images in 1 steps: they"),
    (EXPORT, "scheduler_for", lambda teacher, *_: diffusers.DDIMScheduler.from_config(teacher.config),
     "the loaded scheduler's times of 1 steps are"),
    (trial, "_COARSE", 1e-9, "float16 changes the images of 1 steps"),
])  # fmt: skip
def test_nothing_is_left_of_another_student(module, name, fake, words, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(module, name, fake)
    if kept:
        (tmp_path / "it").mkdir()
        (tmp_path / "it/old").touch()
    with pytest.raises(ModelError, match=words):
        written("dit", tmp_path, overwrite=kept)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "it", tmp_path / "it/old"] if kept else [])


def test_noise_of_half_types_is_that_of_float32():
    """Some versions of torch draw other numbers in float16; the trial of a student must not depend on it."""
    with trial._SameNoise():
        half, single = (
            torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
            for dtype in (torch.float16, torch.float32)
        )
    assert half.dtype == torch.float16 and torch.equal(half, single.half())


def test_existing_folders(tmp_path):
    (tmp_path / "it").mkdir()
    with pytest.raises(ModelError, match="exists; give another folder, or overwrite"):
        written("dit", tmp_path)
    assert (written("dit", tmp_path, overwrite=True)[2] / "README.md").is_file()


def test_wrong_arguments(tmp_path):
    pipe = fresh("sd")
    grid, out, unet = Grid.stock(pipe.scheduler, 1), tmp_path / "it", pipe.unet
    common = {"guidance": 1.0, "card": CARD}
    for call, words in (
        (lambda: export(unet, pipe, "transformer", grid, out, **common), "no network 'transformer'"),
        (lambda: export(nn.Linear(1, 1), pipe, "unet", grid, out, **common), "the student is a Linear"),
        (lambda: export(unet, pipe, "unet", grid, out, guidance=1.0, card={**CARD, "license": ""}),
         "no 'license'; did you mean 'licence'"),
        (lambda: export(unet, pipe, "unet", grid, out, guidance=1.0, card={"data": "x"}),
         "says nothing of: teacher, method, licence, images, hours"),
        (lambda: export(unet, pipe, "unet", Grid((1.0,)), out, **common), "vp-ode and x0-jump"),
        (lambda: export(unet, pipe, "unet", grid, out, lora="fast", **common), "no adapter 'fast'"),
        (lambda: export(fresh("ddim").unet, fresh("ddim"), "unet", grid, out, guidance=2.0, card=CARD),
         "no guidance scale"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            call()
    with pytest.raises(UnsupportedPipeline, match="accelerated"):
        export(unet, accelerate(pipe, "reuse"), "unet", grid, out, **common)
    assert not out.exists() and not list(tmp_path.iterdir())
    assert Card.of(CARD).figures == {"FID-1k": 0.5}


def test_a_pipeline_that_changes_schedulers(tmp_path):
    """DDIMPipeline turns every scheduler into DDIM: a student that takes fresh noise cannot leave in it."""
    with pytest.raises(ModelError, match="times of 1 steps"):
        written("ddim", tmp_path, jump=True)


# ---------------------------------------------------------------- adapters


def adapted():
    pipe = fresh("sd")
    add_lora(pipe.unet, "fast", 2, alpha=6.0)  # alpha is not the rank
    torch.manual_seed(0)
    for parameter in lora_parameters(pipe.unet, "fast").values():
        nn.init.normal_(parameter, std=0.3)
    return pipe, jumps(pipe.scheduler, 1, 2)


def test_adapters_as_files(tmp_path):
    """Stock ``load_lora_weights`` on the teacher makes the student's images; so does the merged folder."""
    pipe, grids = adapted()
    common = {"guidance": 1.0, "card": CARD, "options": SIZE, "dtype": torch.float32}
    before = {name: (p.requires_grad, p.clone()) for name, p in pipe.unet.named_parameters()}
    folder = export_lora(pipe.unet, "fast", pipe, "unet", grids, tmp_path / "lora", **common)
    whole = export(pipe.unet, pipe, "unet", grids, tmp_path / "whole", lora="fast", **common)
    for name, p in pipe.unet.named_parameters():
        assert p.requires_grad == before[name][0] and torch.equal(p, before[name][1])
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "pytorch_lora_weights.safetensors", "scheduler", "student.json"
    ]  # fmt: skip
    text = (folder / "README.md").read_text()
    for words in ('from_pretrained("somebody/teacher")', 'load_lora_weights("lora")', "guidance_scale=1)",
                  'LCMScheduler.from_pretrained("lora", subfolder="scheduler")', "alpha 6"):  # fmt: skip
        assert words in text
    scheduler = diffusers.LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe.scheduler, stock = scheduler, fresh("sd")
    stock.load_lora_weights(folder)
    stock.scheduler, merged = scheduler, reloaded(whole, torch.float32)
    wanted, plain = (run(TINY["sd"], one, 2, guidance_scale=1.0) for one in (pipe, fresh("sd")))
    for other in (stock, merged):
        found = run(TINY["sd"], other, 2, guidance_scale=1.0)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert float((plain - wanted).abs().max()) > 0.1


def test_refused_adapters(tmp_path):
    pipe, grids = adapted()
    common = {"guidance": 1.0, "card": CARD, "options": SIZE}
    with pytest.raises(OptionError, match="adapters fast; name one"):
        export(pipe.unet, pipe, "unet", grids, tmp_path / "it", **common)
    dit = fresh("dit")
    with pytest.raises(UnsupportedPipeline, match="DiTPipeline loads no adapters of 'transformer'; merge it"):
        export_lora(dit.transformer, "fast", dit, "transformer", grids, tmp_path / "it", **common)
    add_lora(dit.transformer, "fast", 2)
    grid, options = Grid.stock(dit.scheduler, 1), {"guidance": 1.0, "card": CARD, "lora": "fast"}
    folder = export(dit.transformer, dit, "transformer", grid, tmp_path / "it", **options)
    assert not any("lora" in name for name, _ in reloaded(folder).transformer.named_parameters())
    assert Path(folder / "README.md").is_file()

"""AutoDiffusion: timesteps and layers that are left out; the card's checks, and the command."""

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import stopped_and_gone_on
from diffusers import DDIMScheduler, UNet2DModel
from tiny_pipelines import TINY, fresh, run
from torch import nn
from toy_mixture import drive, exact, rms, solver

from diffaccel import accelerate, cli
from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.pipelines.layers import residual_layers, skip_path
from diffaccel.samplers import AutoDiffusion, ScheduleError, ThinnedSchedule, solver_schedule
from diffaccel.samplers.autodiffusion import LayerSearch, ThinningSpace, layer_shares
from diffaccel.samplers.family import solver_of
from diffaccel.samplers.grids import grid
from diffaccel.samplers.objective import Objective
from diffaccel.samplers.paths import TrainingPath
from diffaccel.search import Evolution

LAYERED = [name for name in TINY if name != "musicldm"]
SHARES = {f"layer {n}": 0.05 for n in range(10)}


def linear():
    """The path of the card's Gaussian: linear betas from 1e-4 to 0.02."""
    return TrainingPath(1000, DDIMScheduler().alphas_cumprod.double().tolist())


def gaussian_std(ratios, std=0.5):
    """The standard deviation that DDIM makes of Gaussian data with exact predictions, a product."""
    scale = 1.0
    for s, t in itertools.pairwise(ratios):
        scale *= t / s + (1 - t / s) * std**2 / (std**2 + s**2)
    return scale * math.hypot(1, ratios[0])


def test_uniform_timesteps_of_gaussian_data_and_the_search_for_better_ones():
    path = linear()
    uniform = [path.ratio(time) for time in (750, 500, 250, 0)]
    trailing = [path.ratio(time) for time in (999, 749, 499, 249)]
    linspace = [path.ratio(time) for time in (999, 666, 333, 0)]
    assert gaussian_std([*uniform, 0.0]) == pytest.approx(0.2254, abs=2e-4)
    assert gaussian_std([*trailing, 0.0]) == pytest.approx(0.2176, abs=2e-4)
    assert gaussian_std([*linspace, 0.0]) == pytest.approx(0.1644, abs=2e-4)
    for seed in range(5):
        space = ThinningSpace(path, 4, {}, "ddim", earliest=0.0)  # as the publication
        evolution = Evolution(space, seed)
        while len(evolution.scored) < 250:
            candidates = evolution.ask(25)
            evolution.tell(candidates, [abs(gaussian_std(c.schedule.sigmas) - 0.5) for c in candidates])
        assert evolution.best[0].score < 0.02


@pytest.mark.slow
def test_evolution_beats_random_search_on_the_mixture():
    path, wins = solver().path, 0
    y = np.random.default_rng(0).normal(0, math.sqrt(path.largest**2 + 0.55), 32)
    end = exact(y, path.largest, 1e-5)

    def score(candidate):
        start = y * candidate.schedule.sigmas[0] / path.largest
        return rms(drive(candidate.schedule, start=start) - end)

    for seed in range(5):
        space, rng = ThinningSpace(path, 6, {}), random.Random(seed)
        evolution = Evolution(space, seed)
        while len(evolution.scored) < 200:
            candidates = evolution.ask(20)
            evolution.tell(candidates, [score(candidate) for candidate in candidates])
        drawn = [space._legal([(rng.random(), ()) for _ in range(6)], rng) for _ in range(200)]
        wins += evolution.best[0].score < min(map(score, drawn))
    assert wins >= 4


def test_timesteps_of_ddim_are_those_of_diffusers():
    """The leading grid of diffusers' DDIM, with exact integers, on a network of the mixture."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    ours = solver_of(scheduler, schedules=None, solver="ddim")
    ours.set_timesteps(timesteps=scheduler.timesteps.tolist())
    assert torch.allclose(ours.timesteps, scheduler.timesteps.float())
    x = y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for theirs, mine in zip(scheduler.timesteps, ours.timesteps, strict=True):
        x = scheduler.step(torch.tanh(x), theirs, x).prev_sample
        y = ours.step(torch.tanh(y), mine, y).prev_sample
    assert torch.allclose(x, y, atol=2e-6)


def test_one_step_returns_x0_and_all_steps_are_those_of_ddim():
    scheduler = DDIMScheduler(num_train_timesteps=50, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    ours = solver_of(scheduler, schedules=None, solver="ddim")
    x = y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours.set_timesteps(timesteps=[30])
    alpha = float(scheduler.alphas_cumprod[30]) ** 0.5
    x0 = (x - (1 - alpha**2) ** 0.5 * torch.tanh(x)) / alpha
    assert torch.allclose(ours.step(torch.tanh(x), ours.timesteps[0], x).prev_sample, x0, atol=1e-6)
    ours.set_timesteps(timesteps=scheduler.timesteps.tolist())
    for theirs, mine in zip(scheduler.timesteps, ours.timesteps, strict=True):
        x = scheduler.step(torch.tanh(x), theirs, x).prev_sample
        y = ours.step(torch.tanh(y), mine, y).prev_sample
    assert torch.allclose(x, y, atol=1e-6)


def test_samples_do_not_know_of_their_neighbors():
    case, pipe = TINY["dit"], fresh("dit")
    layers = list(residual_layers(pipe.transformer))
    accelerate(pipe, AutoDiffusion.of(thinned(pipe, 4, [(), (layers[0],), (), (layers[-1],)])))

    def images(seeds):
        given = {**case.call, "class_labels": [seed + 1 for seed in seeds], "output_type": "np"}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(**given, num_inference_steps=4, generator=generators).images

    assert np.abs(images([0, 1, 2])[1] - images([1])[0]).max() < 1e-5


def test_operators_are_legal_deterministic_and_leave_parents_alone():
    space, rng = ThinningSpace(linear(), 5, SHARES, allowed=0.5), random.Random(0)
    pool = space.seeds()
    longest = 0
    for _ in range(400):
        parents = rng.sample(pool, 2)
        before = [json.dumps(parent.to_dict()) for parent in parents]
        state = rng.getstate()
        child = space.mutate(space.cross(*parents, rng), rng)
        rng.setstate(state)
        assert space.mutate(space.cross(*parents, rng), rng) == child
        assert [json.dumps(parent.to_dict()) for parent in parents] == before
        assert space.cost(child) <= 5 + 1e-9 and child.schedule.evaluations >= 2
        times = [space.path.time(sigma) for sigma in child.schedule.sigmas[:-1]]
        assert times[0] >= 0.85 * 999 * 0.999 and all(a > b for a, b in itertools.pairwise(times))
        assert max(map(len, child.dropped)) <= 5
        assert space.from_plain(json.loads(json.dumps(space.to_plain(child)))) == child
        assert len(space.encode(child)) == len(space.encode(pool[0]))
        longest = max(longest, child.schedule.evaluations)
        pool[rng.randrange(len(pool))] = child
    assert longest > 5, "thinner networks make room for more steps"
    with pytest.raises(ScheduleError, match="no layer"):
        ThinningSpace(linear(), 5, {}).from_plain(max(pool, key=space.cost).to_dict() | {
            "dropped": [["layer 1"]] * max(pool, key=space.cost).schedule.evaluations})  # fmt: skip
    with pytest.raises(OptionError, match="at least 2"):
        ThinningSpace(linear(), 1, {})


@pytest.mark.parametrize("name", LAYERED)
def test_every_layer_can_be_left_out(name):
    """Its call gives what it gave, but for the body: same structure, shapes and types."""
    pipe, case, seen = fresh(name), TINY[name], []
    network = getattr(pipe, case.denoisers[-1])
    layers = residual_layers(network)
    assert len(layers) >= 2

    def compare(module, args, kwargs, output):
        made = skip_path(module, args, kwargs)
        one, other = (value if isinstance(value, tuple) else (value,) for value in (output, made))
        one, other = ([getattr(part, "sample", part) for part in value] for value in (one, other))
        for a, b in zip(one, other, strict=True):
            assert a is None or (a.shape == b.shape and a.dtype == b.dtype), type(module).__name__
        seen.append(module)

    for layer in layers.values():
        layer.register_forward_hook(compare, with_kwargs=True)
    run(case, pipe, 4)
    others = {layer for name in case.denoisers[:-1] if name != "controlnet"
              for layer in residual_layers(getattr(pipe, name)).values()}  # fmt: skip
    assert not others & set(seen) and set(seen) == set(layers.values())


def test_a_network_whose_bodies_end_at_zero_is_its_skip_paths():
    torch.manual_seed(0)
    network = UNet2DModel(8, 3, 3, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                          down_block_types=("DownBlock2D", "DownBlock2D"),
                          up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False).eval()  # fmt: skip
    x, plain = torch.randn(2, 3, 8, 8), {}
    layers = residual_layers(network)
    for layer in layers.values():
        for parameter in layer.conv2.parameters():
            nn.init.zeros_(parameter)
    plain = network(x, 5).sample
    for layer in layers.values():
        layer.forward = lambda *args, module=layer, **kwargs: skip_path(module, args, kwargs)
    assert torch.allclose(network(x, 5).sample, plain, atol=1e-6)
    with pytest.raises(TypeError, match="Conv2d"):
        skip_path(nn.Conv2d(1, 1, 1), (x,), {})


def thinned(pipe, steps, dropped):
    path = solver_of(pipe.scheduler).path
    schedule = solver_schedule("dpm++2m", grid("trailing", steps, path))
    return ThinnedSchedule(schedule, tuple(dropped))


@pytest.mark.parametrize("name", ["sd", "dit", "sd3", "flux_true_cfg"])
def test_layers_are_left_out_where_it_is_said(name):
    case, pipe = TINY[name], fresh(name)
    layers = residual_layers(getattr(pipe, case.denoisers[-1]))
    first, *_, last = layers
    plan = thinned(pipe, 4, [(), (first,), (first, last), ()])
    whole = AutoDiffusion.of(thinned(pipe, 4, [()] * 4))
    plain = run(case, accelerate(pipe, whole), 4)
    accelerate(pipe, None)
    own, calls = pipe.scheduler, {first: 0, last: 0}
    pipe.scheduler = solver_of(own, schedules=[plan.schedule.to_dict()])
    assert torch.equal(run(case, pipe, 4), plain), "nothing dropped is the plain network"
    pipe.scheduler = own
    for layer in (first, last):
        inside = getattr(layers[layer], "norm1", None) or layers[layer].norm
        inside.register_forward_hook(lambda *args, layer=layer: calls.__setitem__(layer, calls[layer] + 1))
    thin = run(case, accelerate(pipe, AutoDiffusion.of(plan)), 4)
    branches = case.calls_per_step
    assert calls == {first: 2 * branches, last: 3 * branches}, "dropped layers are not executed"
    assert thin.isfinite().all() and not torch.equal(thin, plain)
    assert pipe.accel.report.skipped == 0 and {a.step for a in pipe.accel.report.actions} == {1, 2}
    both = run(case, pipe, 4, seed=1)
    assert torch.equal(run(case, pipe, 4), thin) and not torch.equal(both, thin)


def test_shares_are_those_of_the_counted_operations():
    pipe = fresh("sd")
    objective = Objective(pipe, ["a bag"], None, 0, 1, steps=4)
    shares = layer_shares(objective)
    assert 0.2 < sum(shares.values()) <= 1 and set(shares) <= set(residual_layers(pipe.unet))
    from diffaccel.eval.cost import count_flops

    name = max(shares, key=shares.get)
    counts = []
    for dropped in ([()] * 2, [(name,)] * 2):
        accelerate(pipe, AutoDiffusion.of(thinned(pipe, 2, dropped)))
        counts.append(count_flops(lambda: pipe("a bag", num_inference_steps=2, output_type="latent")))
    text = count_flops(lambda: pipe.encode_prompt("a bag", "cpu", 1, True))
    assert (counts[1] - text) / (counts[0] - text) == pytest.approx(1 - shares[name], rel=0.02)


def test_files_and_refusals(tmp_path):
    pipe = fresh("sd")
    name = next(iter(residual_layers(pipe.unet)))
    plan = thinned(pipe, 3, [(), (name,), ()])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_dict()))
    assert ThinnedSchedule.load(file) == plan
    pipe.to(accel=f"autodiffusion:{file}")
    with pytest.raises(ScheduleError, match="no schedule for 5 evaluations; there are some for 3"):
        pipe("a bag", num_inference_steps=5)
    pipe.to(accel=None)
    with pytest.raises(UnsupportedPipeline, match="diffaccel search autodiffusion"):
        pipe.to(accel="autodiffusion")
    with pytest.raises(UnsupportedPipeline, match="cannot read"):
        pipe.to(accel="autodiffusion:nowhere.json")
    for text in ("{", "[]", '{"version": 9}', json.dumps(plan.schedule.to_dict())):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UnsupportedPipeline, match=r"bad\.json"):
            pipe.to(accel=f"autodiffusion:{tmp_path / 'bad.json'}")
    with pytest.raises(UnsupportedPipeline, match="no layer 'nothing'"):
        pipe.to(accel=AutoDiffusion.of(replace(plan, dropped=((), ("nothing",), ()))))
    other = replace(plan, facts={"family": {"denoiser": "unet: Other", "config": "0"}})
    with pytest.raises(UnsupportedPipeline, match="another model"):
        pipe.to(accel=AutoDiffusion.of(other))
    with pytest.raises(ScheduleError, match="2 sets of dropped layers for 3"):
        replace(plan, dropped=((), ()))


def test_search_goes_on_and_stays_within_its_budget(tmp_path):
    pipe = fresh("dit")
    settings = {"images": 1, "budget": 24, "batch": 6, "max_drop": 0.4, "objectives": {}, "guidance": 1.0}
    whole = LayerSearch(pipe, 3, ["1", "2"], file=tmp_path / "a.json", **settings)
    winner = whole.run()
    assert (
        whole.done == 24
        and max(entry.candidate.schedule.evaluations for entry in whole.candidates.scored) > 2
    )
    assert all(whole.space.cost(entry.candidate) <= 3 + 1e-9 for entry in whole.candidates.scored)
    assert any(any(entry.candidate.dropped) for entry in whole.candidates.scored[12:])
    assert not any(any(entry.candidate.dropped) for entry in whole.candidates.scored[:8])
    again = stopped_and_gone_on(
        lambda: LayerSearch(pipe, 3, ["1", "2"], file=tmp_path / "b.json", **settings)
    )
    assert again == winner and again.facts == winner.facts and not hasattr(pipe, "accel")
    with pytest.raises(OptionError, match="max_drop"):
        LayerSearch(pipe, 3, [], max_drop=1.0)
    with pytest.raises(OptionError, match="no engine"):
        LayerSearch(pipe, 3, [], engine="luck")


def test_command(tmp_path, monkeypatch, capsys):
    words = "search autodiffusion tiny-fashion-dit --nfe 2 --images 1 --budget 8 --guidance 1 --engine optuna"
    monkeypatch.setattr("sys.argv", ["diffaccel", *words.split(), "--out", str(tmp_path)])
    cli.main()
    assert "of evaluations" not in capsys.readouterr().err
    plan = ThinnedSchedule.load(tmp_path / "autodiffusion-2.json")
    assert plan.facts["candidates"] == 8 and plan.facts["cost"] <= 2 and plan.facts["settings"]["nfe"] == [2]

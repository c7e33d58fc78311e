"""Feature inheritance: what it costs, patterns in files, the search for them, and refusals."""

import json
import random
from dataclasses import replace

import diffusers
import pytest
import torch
from commands import stopped_and_gone_on
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from tiny_pipelines import TINY, fresh, run

from diffaccel import Inherit, accelerate, cli
from diffaccel.errors import AcceleratorConflict, ModelError, OptionError, UnsupportedPipeline
from diffaccel.eval.cost import flops_by_module
from diffaccel.pipelines import Inheritance
from diffaccel.pipelines.levels import parts_of
from diffaccel.samplers.inheriting import InheritanceSearch, InheritanceSpace

EVERY_SECOND = {"warmup": 1, "cooldown": 0, "every": 2}


def flops(case, pipe, steps):
    """Floating-point operations of the networks by module."""
    counts = flops_by_module(lambda: run(case, pipe, steps))
    return {name: value for name, value in counts.items() if name.partition(".")[0] != "Global"}


@pytest.mark.parametrize("name", ["sd", "ddim", "dit", "sd3", "flux_true_cfg", "wan"])
def test_an_inherited_step_costs_what_runs_in_it(name):
    """To the last operation: a U-Net's outermost layer and its ends, a transformer's first block and ends."""
    case, pipe = TINY[name], fresh(name)
    network = getattr(pipe, case.denoisers[-1])
    root, parts = type(network).__name__, parts_of(network)
    plain = flops(case, pipe, 1)
    fast = flops(case, pipe.to(accel={"inherit": EVERY_SECOND}), 4)
    if parts.changes:
        left = plain[root] - sum(plain[f"{root}.{block}"] for block in list(parts.blocks)[1:])
    else:
        outer = [f"{root}.{layer}" for layer in parts.stages["layer"][-1]]
        ends = [f"{root}.{end}" for end in ("conv_in", "conv_out", "time_embedding")]
        left = sum(plain.get(module, 0) for module in outer + ends)
    assert fast[root] == 2 * plain[root] + 2 * left and left < 0.7 * plain[root]


def test_a_controlnet_costs_less_at_an_inherited_step():
    """Of it only the way to the outermost skip connection is left."""
    case, pipe = TINY["sd_controlnet"], fresh("sd_controlnet")
    root = "ControlNetModel"
    plain = flops(case, pipe, 1)
    fast = flops(case, pipe.to(accel={"inherit": EVERY_SECOND}), 4)
    names = ("conv_in", "time_embedding", "controlnet_cond_embedding", "controlnet_down_blocks.0")
    left = sum(plain[f"{root}.{name}"] for name in names)
    assert fast[root] == 2 * plain[root] + 2 * left and left < 0.5 * plain[root]
    assert {a.network for a in pipe.accel.report.actions} == {"unet", "controlnet"}


def test_a_controlnet_whose_residuals_are_changed_on_the_way_runs_in_full():
    """In guess mode the pipeline puts them into a batch of its own, where nobody follows them."""
    case, pipe = TINY["sd_controlnet"], fresh("sd_controlnet").to(accel={"inherit": EVERY_SECOND})
    counts = flops_by_module(lambda: run(case, pipe, 4, guess_mode=True))
    assert torch.isfinite(run(case, pipe, 4, guess_mode=True)).all()
    whole = flops_by_module(lambda: run(case, pipe.to(accel=None), 4, guess_mode=True))
    assert counts["ControlNetModel"] == whole["ControlNetModel"]
    assert counts["UNet2DConditionModel"] < whole["UNet2DConditionModel"]


def test_it_serves_a_stack():
    """Samples that are evaluated alone do not inherit from others; guidance sees what was inherited."""
    case, pipe = TINY["sd"], fresh("sd")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    plain = run(case, pipe, 20)
    for tolerance in (0.02, 0.05, 1e9):
        pipe.to(accel=[{"sada": {"tolerance": tolerance}}, "inherit", "apg"])
        assert [accelerator.name for accelerator in pipe.accel.stack] == ["apg", "sada", "inherit"]
        assert torch.isfinite(run(case, pipe, 20)).all()
        assert {a.what for a in pipe.accel.report.actions} >= {"skip"}
    pipe.to(accel=[{"sada": {"tolerance": 0.0}}, {"inherit": {"every": 1}}])
    assert torch.equal(run(case, pipe, 20), plain)
    with pytest.raises(AcceleratorConflict):
        pipe.to(accel=["inherit", "inherit"])


def test_half_precision():
    case, pipe = TINY["dit"], fresh("dit")
    plain = run(case, pipe, 8)
    pipe.to(torch.bfloat16)
    for order in (0, 1):
        result = run(case, pipe.to(accel={"inherit": {"order": order}}), 8).float()
        assert float((result - plain).norm() / plain.norm()) < 0.1


def pattern_of(pipe, steps, **facts):
    first, *rest = parts_of(pipe.unet).inside("layer", 1), parts_of(pipe.unet).inside("block", 1)
    return Inheritance(((), *[first, *rest] * steps)[:steps], 0, facts)


def test_patterns_in_files(tmp_path):
    case, pipe = TINY["sd"], fresh("sd")
    pattern, file = pattern_of(pipe, 6, cost=3.0), tmp_path / "pattern.json"
    file.write_text(json.dumps(pattern.to_dict()))
    assert Inheritance.load(file) == pattern and Inheritance.load(file).facts == {"cost": 3.0}
    result = run(case, pipe.to(accel=f"inherit:{file}"), 6)
    assert [action.step for action in pipe.accel.report.actions] == [1, 2, 3, 4, 5]
    assert torch.equal(run(case, accelerate(pipe, Inherit.of(pattern)), 6), result)
    with pytest.raises(UnsupportedPipeline, match="for 6 solver updates, this call has 8"):
        run(case, pipe, 8)
    late = TINY["sd_img2img"]
    other = fresh("sd_img2img").to(accel=f"inherit:{file}")
    run(late, other, 6)
    assert [action.step for action in other.accel.report.actions] == [1, 2, 3], "it begins in mid-schedule"
    uniform = Inheritance(tuple(() if n % 2 == 0 else pattern.sets[0] for n in range(6)))
    same = {"inherit": {**EVERY_SECOND, "level": "block"}}
    expected = run(case, pipe.to(accel=same), 6)
    by_block = replace(
        uniform, inherited=tuple(n and ("mid_block", "up_blocks.0") for n in uniform.inherited)
    )
    assert torch.equal(run(case, accelerate(pipe, Inherit.of(by_block)), 6), expected)


def test_refusals(tmp_path):
    pipe = fresh("sd")
    refused = {
        "is no U-Net, and has no": diffusers.DDIMPipeline(Plain(), DDIMScheduler()),
        "compiled as a whole": fresh("flux"),
    }
    refused["compiled as a whole"].transformer = torch.compile(refused["compiled as a whole"].transformer)
    for reason, other in refused.items():
        with pytest.raises(UnsupportedPipeline, match=reason):
            other.to(accel="inherit")
    for options, reason in (
        ({"outer": 9}, "nothing is left that could inherit with level='layer', outer=9"),
        ({"modules": "nothing"}, "modules='nothing'; it has down_blocks.0"),
        ({"file": "nowhere.json"}, "cannot read 'nowhere.json'"),
    ):
        with pytest.raises(UnsupportedPipeline, match=reason):
            pipe.to(accel={"inherit": options})
    with pytest.raises(OptionError, match=r"drop every"):
        pipe.to(accel={"inherit": {"file": "a.json", "every": 2}})
    for options in ({"every": 0}, {"level": "unet"}, {"order": 2}, {"warmup": 0}, {"center": 2}):
        with pytest.raises(OptionError):
            pipe.to(accel={"inherit": options})
    frozen = {"inherit": {"modules": "up_blocks.1", **EVERY_SECOND}}
    with pytest.raises(UnsupportedPipeline, match="would not depend on the sample"):
        run(TINY["sd"], pipe.to(accel=frozen), 4)
    with pytest.raises(UnsupportedPipeline, match=r"mid_block\.resnets\.7 and others do not run"):
        pipe.unet.mid_block.resnets.extend([torch.nn.Identity() for _ in range(6)])  # zip leaves them out
        run(TINY["sd"], pipe.to(accel={"inherit": {"modules": "mid_block.resnets.7", **EVERY_SECOND}}), 4)
    for text in ("{", "[]", '{"version": 2}', json.dumps({**pattern_of(pipe, 4).to_dict(), "steps": [9]})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UnsupportedPipeline, match=r"bad\.json"):
            pipe.to(accel=f"inherit:{tmp_path / 'bad.json'}")
    with pytest.raises(UnsupportedPipeline, match="another model"):
        facts = {"family": {"denoiser": "unet: Other"}}
        accelerate(pipe, Inherit.of(replace(pattern_of(pipe, 4), facts=facts)))
    with pytest.raises(UnsupportedPipeline, match=r"no module 'up_blocks\.7'"):
        accelerate(pipe, Inherit.of(Inheritance(((), ("up_blocks.7",)))))
    with pytest.raises(ModelError, match="begins with"):
        Inheritance((("mid_block",), ()))


class Plain(diffusers.UNet2DModel):
    """A network whose parts are not called as they are elsewhere."""

    def __init__(self):
        super().__init__(8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                         up_block_types=("UpBlock2D",))  # fmt: skip
        self.up_blocks = None


class Own(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """A scheduler that nobody knows."""

    init_noise_sigma = 1.0

    def set_timesteps(self, count):
        self.timesteps = torch.arange(count).flip(0)

    def step(self, model_output, timestep, sample, **kwargs):
        return DDIMSchedulerOutput(prev_sample=sample - model_output / len(self.timesteps))


def test_schedulers_that_are_not_known():
    """They are served as long as the number of updates does not matter."""
    pipe = fresh("ddim")
    pipe.scheduler = Own()
    with pytest.raises(UnsupportedPipeline, match="cooldown=0 and power=1"):
        pipe.to(accel="inherit")
    run(TINY["ddim"], pipe.to(accel={"inherit": EVERY_SECOND}), 5)
    assert [action.step for action in pipe.accel.report.actions] == [1, 3]


ATOMS = [f"blocks.{n}" for n in range(5)]


def free_space(budget=6, updates=10):
    menu = [tuple(ATOMS[n:]) for n in range(5)]
    return InheritanceSpace(updates, budget, menu, {(name,): 0.85 for name in ATOMS})


def test_operators_are_legal_deterministic_and_leave_parents_alone():
    nested = [("up.0",), ("up.0", "up.1")]
    unet = InheritanceSpace(10, 5, nested, {nested[0]: 0.6, nested[1]: 0.3})
    for space in (free_space(), unet):
        rng, pool = random.Random(0), space.seeds()
        assert len(pool) >= 4 and all(space.cost(seed) <= space.budget for seed in pool)
        for _ in range(300):
            parents = rng.sample(pool, 2)
            before = [json.dumps(parent.to_dict()) for parent in parents]
            state = rng.getstate()
            child = space.mutate(space.cross(*parents, rng), rng)
            rng.setstate(state)
            assert space.mutate(space.cross(*parents, rng), rng) == child
            assert [json.dumps(parent.to_dict()) for parent in parents] == before
            assert space.budget - 1 < space.cost(child) <= space.budget + 1e-9 and child.inherited[0] == ()
            assert space.from_plain(json.loads(json.dumps(space.to_plain(child)))) == child
            assert len(space.encode(child)) == len(space.encode(pool[0]))
            pool[rng.randrange(len(pool))] = child
        assert any(len(candidate.sets) > 1 for candidate in pool)
    assert free_space().atoms == ATOMS and not unet.atoms
    with pytest.raises(OptionError, match="can be the work of"):
        free_space(budget=2)
    with pytest.raises(OptionError, match="can be the work of"):
        free_space(budget=10)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_costs_are_counted(name):
    """The work that a search counts is that of a run."""
    case, pipe = TINY[name], fresh(name)
    search = InheritanceSearch(pipe, 3, ["a bag"] if name == "sd" else ["1"], 1.0, 1, 8, steps=6)
    space = search.make_space()
    pattern = space.mutate(space.seeds()[0], random.Random(1))
    root = type(getattr(pipe, case.denoisers[-1])).__name__
    whole = flops(case, pipe, 6)[root]
    part = flops(case, accelerate(pipe, Inherit.of(pattern)), 6)[root]
    assert part / whole * 6 == pytest.approx(space.cost(pattern), rel=1e-6)


def test_search_goes_on_and_stays_within_its_budget(tmp_path):
    pipe = fresh("dit")
    settings = {"images": 1, "budget": 30, "batch": 6, "guidance": 1.0, "objectives": {}, "steps": 8}
    whole = InheritanceSearch(pipe, 5, ["1", "2"], file=tmp_path / "a.json", **settings)
    winner = whole.run()
    assert len(winner.inherited) == 8 and winner.facts["cost"] <= 5
    assert winner.facts["distance"] <= min(entry.score for entry in whole.candidates.scored) * 1.5
    again = stopped_and_gone_on(
        lambda: InheritanceSearch(pipe, 5, ["1", "2"], file=tmp_path / "b.json", **settings)
    )
    assert again == winner and again.facts == winner.facts and not hasattr(pipe, "accel")
    with pytest.raises(OptionError, match="no level"):
        InheritanceSearch(pipe, 5, [], level="unit")
    with pytest.raises(OptionError, match="another search: steps"):
        InheritanceSearch(pipe, 5, ["1", "2"], file=tmp_path / "b.json", **{**settings, "steps": 9}).run()


def test_command(tmp_path, monkeypatch, capsys):
    words = (
        "search inherit tiny-fashion-dit --nfe 3 --steps 4 --images 1 --budget 8 --guidance 1 --engine optuna"
    )
    monkeypatch.setattr("sys.argv", ["diffaccel", *words.split(), "--out", str(tmp_path)])
    cli.main()
    assert f'accel="inherit:{tmp_path}/inherit-3.json"' in capsys.readouterr().out.replace("\n", "")
    pattern = Inheritance.load(tmp_path / "inherit-3.json")
    assert pattern.facts["candidates"] == 8 and pattern.facts["cost"] <= 3
    assert pattern.facts["settings"]["steps"] == 4 and len(pattern.inherited) == 4

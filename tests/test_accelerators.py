"""Specifications, options, errors, and what an accelerator sees at each seam."""

import importlib
import inspect
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import diffusers
import pytest
import torch
from tiny_pipelines import TINY, fresh, run

import diffaccel
from diffaccel import (
    Accelerator,
    AcceleratorConflict,
    OptionError,
    Reuse,
    Sada,
    UnknownAccelerator,
    UnsupportedPipeline,
    accelerate,
)
from diffaccel.pipelines import attached, install, option, registry, resolve
from diffaccel.pipelines.accelerator import tag


class Guide(Accelerator):
    exclusive = "guidance"


class Block(Accelerator):
    exclusive = "blocks"


@pytest.mark.parametrize(
    ("spec", "tags"),
    [
        ("sada", ["sada"]),
        ("sada:precise", ["sada(tolerance=0.003)"]),
        ({"reuse": {"every": 4}}, ["reuse(every=4)"]),
        ({"sada:fast": {"max_skips": 2}}, ["sada(tolerance=0.014, max_skips=2)"]),
        (Sada(tolerance=1), ["sada(tolerance=1.0)"]),
        ([Sada()], ["sada"]),
        (("reuse",), ["reuse"]),
        ([{"reuse": {}}], ["reuse"]),
        ({"sada": {"tolerance": float("inf"), "max_skips": 2.0}}, ["sada(tolerance=inf, max_skips=2)"]),
        ({}, []),
        ([], []),
    ],
)
def test_specifications(spec, tags):
    assert [tag(accelerator) for accelerator in resolve(spec)] == tags


def test_order_follows_from_the_kinds():
    stack = resolve([Block(), "sada", Guide(), Accelerator()])
    assert [accelerator.exclusive for accelerator in stack] == ["guidance", "skip", "", "blocks"]


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("sadda", UnknownAccelerator, ["'sadda'", "did you mean 'sada'", "reuse"]),
        ("sada:papper", UnknownAccelerator, ["'papper'", "did you mean 'paper'"]),
        ({"sada": {"tolerence": 1}}, OptionError, ["'tolerence'", "did you mean 'tolerance'"]),
        ({"sada": {"tolerance": -1}}, OptionError, ["tolerance=-1", "[0.0, inf]"]),
        ({"sada": {"tolerance": float("nan")}}, OptionError, ["tolerance=nan"]),
        ({"sada": {"skip_from": 1.5}}, OptionError, ["skip_from=1.5", "[0.0, 1.0]"]),
        ({"sada": {"max_skips": "3"}}, OptionError, ["max_skips='3'", "int"]),
        ({"sada": {"max_skips": 2.5}}, OptionError, ["max_skips=2.5"]),
        ({"sada": {"correct": 1}}, OptionError, ["correct=1", "bool"]),
        ({"sada": {"criterion": "magic"}}, OptionError, ["'magic'", "'error'", "'stability'"]),
        ({"reuse": {"every": 0}}, OptionError, ["every=0"]),
        ({"reuse": 3}, OptionError, ["mapping of its options"]),
        ({"reuse": None}, OptionError, ["mapping of its options"]),
        ({"reuse": {1: 2}}, OptionError, ["mapping of its options"]),
        ({"reuse": {"preset": "fast"}}, OptionError, ["no option 'preset'", "every"]),
        ({"reuse": {"self": 1}}, OptionError, ["no option 'self'"]),
        ({1: {}}, OptionError, ["{1: {}}"]),
        ({"reuse": {"every": float("nan")}}, OptionError, ["every=nan", "int"]),
        ({"reuse": {"every": float("inf")}}, OptionError, ["every=inf", "int"]),
        ({"reuse": {"every": True}}, OptionError, ["every=True", "int"]),
        ({"sada": {"tolerance": True}}, OptionError, ["tolerance=True", "float"]),
        ({"sada": {"tolerance": float("-inf")}}, OptionError, ["tolerance=-inf"]),
        ({"sada": {"tolerance": torch.tensor(0.1)}}, OptionError, ["tolerance=tensor", "float"]),
        ({"sada": {"order": 5}}, OptionError, ["order=5", "[1, 4]"]),
        ({"sada": {"criterion": ["error"]}}, OptionError, ["criterion=['error']", "str"]),
        ("", UnknownAccelerator, ["''", "reuse", "sada"]),
        ("reuse:fast:twice", UnknownAccelerator, ["'fast:twice'"]),
        ({"sada": {}, "reuse": {}}, AcceleratorConflict, ["'sada'", "'reuse'"]),
        (["sada", [Reuse()]], AcceleratorConflict, ["'sada'", "'reuse'", "skip"]),
        ([None], OptionError, ["NoneType"]),
        ((name for name in ["sada"]), OptionError, ["generator"]),
        (["sada", "reuse"], AcceleratorConflict, ["'sada'", "'reuse'", "skip"]),
        (3, OptionError, ["int", "expected a name"]),
        (Sada, OptionError, ["expected a name"]),
    ],
)
def test_errors_are_early_and_leave_the_pipeline(spec, error, words):
    pipe = fresh("sd").to(accel="reuse")
    before = pipe.accel
    with pytest.raises(error) as caught:
        pipe.to(torch.float64, accel=spec)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert pipe.accel is before and pipe.dtype == torch.float32


def test_to_sets_keeps_and_removes():
    pipe = fresh("sd")
    assert pipe.to("cpu", torch.float64, accel=["sada"]) is pipe and pipe.dtype == torch.float64
    pipe.to(accel="reuse")
    assert [a.name for a in pipe.accel.stack] == ["reuse"], "the last call wins"
    pipe.to("cpu").to(torch.float32)
    assert [a.name for a in pipe.accel.stack] == ["reuse"], "moving keeps the stack"
    assert "no call yet" in str(pipe.accel)
    assert pipe.to(accel=None) is pipe and not hasattr(pipe, "accel")
    assert pipe.to(accel=None) is pipe, "removing twice is fine"
    assert accelerate(pipe, "sada").accel.stack[0].name == "sada"


@pytest.mark.parametrize("before", [None, "reuse"])
def test_a_block_leaves_the_stack_that_was_there(before):
    pipe = fresh("ddim").to(accel=before)
    state, cls = dict(vars(pipe)), type(pipe)
    with attached(pipe, "sada") as inside:
        assert inside is pipe and pipe.accel.stack[0].name == "sada"
    with pytest.raises(KeyError), attached(pipe, None):
        assert not hasattr(pipe, "accel")
        raise KeyError
    with pytest.raises(UnknownAccelerator), attached(pipe, "nonsense"):
        pass
    assert vars(pipe) == state and type(pipe) is cls


def test_an_error_of_the_functional_form_leaves_the_pipeline_too():
    pipe = fresh("ddim")
    cls, names = type(pipe), set(vars(pipe))
    for spec in ("nonsense", {"sada": {"order": 9}}, ["sada", "reuse"], 3):
        with pytest.raises(diffaccel.DiffaccelError):
            accelerate(pipe, spec)
        assert type(pipe) is cls and set(vars(pipe)) == names


def test_an_error_of_the_move_leaves_the_stack():
    pipe = fresh("ddim").to(accel="reuse")
    for accel in (None, "sada"):
        with pytest.raises(RuntimeError):
            pipe.to("nonsense", accel=accel)
        assert [a.name for a in pipe.accel.stack] == ["reuse"]


def test_the_reason_of_a_check_is_passed_on():
    class Picky(Accelerator):
        def check(self, pipe):
            return "it has no soul" if pipe.dtype == torch.float32 else None

    case, pipe = TINY["ddim"], fresh("ddim")
    with pytest.raises(UnsupportedPipeline, match=r"DDIMPipeline: it has no soul"):
        pipe.to(accel=Picky())
    assert not hasattr(pipe, "accel")
    pipe.to(torch.float64)
    pipe.to(accel=Picky())
    pipe.to(torch.float32)  # what cannot be known before is checked at the call
    with pytest.raises(UnsupportedPipeline, match="no soul"):
        run(case, pipe, 3)
    assert pipe.accel.report is None and "forward" not in vars(pipe.unet)


def test_unknown_kinds_are_refused_at_definition():
    with pytest.raises(OptionError, match=r"exclusive='cache' is none of 'guidance', 'skip'"):
        type("Odd", (Accelerator,), {"exclusive": "cache"})


def test_what_is_given_cannot_be_changed_afterwards():
    mine, options = Reuse(every=3), {"every": 3}
    pipes = [fresh("ddim").to(accel=accel) for accel in (mine, {"reuse": options})]
    mine.every = options["every"] = 1
    for pipe in pipes:
        run(TINY["ddim"], pipe, 6)
        assert pipe.accel.report.evaluated == 2 and pipe.accel.report.stack == ("reuse(every=3)",)


def test_the_users_object_is_a_template():
    mine, case = Sada(), TINY["sd"]
    before = dict(vars(mine))
    run(case, accelerate(fresh(case.name), mine), 8)
    assert vars(mine) == before


def test_install_is_idempotent_and_careful():
    to = diffusers.DiffusionPipeline.to
    install(diffusers.DiffusionPipeline)
    assert diffusers.DiffusionPipeline.to is to
    assert diffaccel.DiffusionPipeline is diffusers.DiffusionPipeline

    class Later:
        def to(self, accel=None):
            return self

    with pytest.raises(ImportError, match="accel"):
        install(Later)
    assert "accel" in inspect.signature(Later.to).parameters and not hasattr(Later.to, "_diffaccel")
    assert "accel" not in inspect.signature(to).parameters, "stock introspection sees the stock method"
    importlib.reload(diffaccel)
    assert diffusers.DiffusionPipeline.to is to, "a second import changes nothing"


def test_canary_no_pipeline_overrides_to():
    """The facts about diffusers that the mechanism rests on."""
    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    for name in names:
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline):
            assert "to" not in vars(cls) or cls is diffusers.DiffusionPipeline, name


def test_pipelines_without_a_loop_are_refused():
    class Empty(diffusers.DiffusionPipeline):
        def __call__(self):
            return None

    with pytest.raises(UnsupportedPipeline, match="scheduler"):
        Empty().to(accel="reuse")
    pipe = fresh("ddim")
    pipe.unet = None
    with pytest.raises(
        UnsupportedPipeline, match="DDIMPipeline has no denoiser; looked for unet, transformer"
    ):
        pipe.to(accel="reuse")
    with pytest.raises(UnsupportedPipeline, match="scheduler"):
        accelerate(torch.nn.Linear(1, 1), "reuse")


@dataclass
class Probe(Accelerator):
    """Writes down what passes its seams."""

    name: ClassVar[str] = ""
    size: int = option(1, low=1)

    def start(self, run):
        self.log.append(("start",))

    def evaluate(self, call, proceed):
        self.log.append(("evaluate", call.network, call.step, call.branch, call.rows))
        return proceed(call)

    def update(self, call, proceed):
        self.log.append(("update", call.step, call.index))
        return proceed(call)

    def blocks(self, pipe):
        network = getattr(pipe, "unet", None) or pipe.transformer
        names = ("mid_block", "transformer_blocks", "blocks")
        block = next(getattr(network, name) for name in names if hasattr(network, name))
        return [block[0] if isinstance(block, torch.nn.ModuleList) else block]

    def block(self, call, proceed):
        self.log.append(("block", call.step, call.branch))
        return proceed(call)


def expected_log(case, steps, branches, rows):
    """What `Probe` writes down in one loop."""
    log = [("start",)]
    for step in range(steps):
        for branch in range(branches):
            log += [("evaluate", case.denoisers[-1], step, branch, rows), ("block", step, branch)]
        log += [("update", step, step)]
    return log


@pytest.mark.parametrize(
    ("name", "branches", "rows"),
    [("sd", 1, 4), ("dit", 1, 4), ("flux", 1, 2), ("flux_true_cfg", 2, 2), ("pixart", 1, 4)],
)
def test_seams(name, branches, rows):
    probe, case = Probe(), TINY[name]
    probe.log = []
    plain = run(case, fresh(case.name), 3)
    pipe = accelerate(fresh(case.name), probe)
    assert torch.equal(run(case, pipe, 3), plain)
    assert probe.log == expected_log(case, 3, branches, rows)
    probe.log.clear()
    pipe.scheduler.set_timesteps(3, **({"mu": 1.0} if "flux" in name else {}))
    probe.blocks(pipe)[0].forward, pipe.scheduler.step
    assert probe.log == []


@pytest.mark.parametrize("name", TINY)
def test_an_evaluation_knows_the_update_that_it_leads_to(name):
    class Watcher(Accelerator):
        def evaluate(self, call, proceed):
            coming.append(call.index)
            return proceed(call)

        def update(self, call, proceed):
            met.extend([call.index] * (len(coming) - len(met)))
            return proceed(call)

    coming, met = [], []
    run(TINY[name], accelerate(fresh(name), Watcher()), 6)
    assert coming == met and len(set(met)) > 1


def test_two_networks_that_share_the_steps():
    probe, case = Probe(), TINY["wan22"]
    probe.log = []
    run(case, accelerate(fresh(case.name), probe), 4)
    networks = [entry[1] for entry in probe.log if entry[0] == "evaluate"]
    assert networks == ["transformer"] * 4 + ["transformer_2"] * 4
    assert [entry[2:4] for entry in probe.log if entry[0] == "evaluate"] == list(
        itertools.product(range(4), range(2))
    )


def test_order_of_the_seams_of_a_stack():
    log = []

    def named(kind):
        class Named(Accelerator):
            exclusive = kind

            def evaluate(self, call, proceed):
                log.append(f"{kind} in")
                result = proceed(call)
                log.append(f"{kind} out")
                return result

            def update(self, call, proceed):
                log.append(f"{kind} update")
                return proceed(call)

        return Named()

    case = TINY["ddim"]
    run(case, accelerate(fresh(case.name), [named("skip"), named("guidance")]), 1)
    evaluation = ["guidance in", "skip in", "skip out", "guidance out"]
    assert log == [*evaluation, "guidance update", "skip update"]


def test_seams_can_replace_what_they_wrap():
    class Double(Accelerator):
        def evaluate(self, call, proceed):
            args = (2 * call.args[0], *call.args[1:])
            return type(result := proceed(replace(call, args=args)))(result[0] / 2)

        def update(self, call, proceed):
            return proceed(replace(call, output=-call.output))

    case, pipe, other = TINY["ddim"], fresh("ddim"), fresh("ddim")
    original = other.unet.forward
    other.unet.forward = lambda x, *a, **k: type(out := original(2 * x, *a, **k))(-out[0] / 2)
    assert torch.equal(run(case, accelerate(pipe, Double()), 3), run(case, other, 3))


class Loops(diffusers.DiffusionPipeline):
    """Several sampling loops in one call, and an evaluation that belongs to none."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, x, repeat=1):
        x = x + 0 * self.unet(x, 999).sample
        for steps in (7, 4):
            for _ in range(repeat):
                self.scheduler.set_timesteps(steps)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return x


@pytest.mark.parametrize("repeat", [1, 2])
def test_two_loops_in_one_call_restart_the_counters(repeat):
    probe, pipe = Probe(), Loops(**fresh("ddim").components)
    probe.log, x = [], torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = pipe(x)
    assert torch.equal(pipe.to(accel=probe)(x, repeat), plain)
    starts = [("start",)] * (repeat - 1)
    loops = [expected_log(TINY["ddim"], steps, 1, 2) for steps in (7, 4)]
    assert probe.log == [*starts, *loops[0], *starts, *loops[1]]
    pipe.to(accel="reuse")(x, repeat)
    assert pipe.accel.report.evaluated == 4 + 2 and pipe.accel.report.requested == 11
    assert pipe.accel.report.updates == 11


def test_a_third_party_accelerator_needs_no_entry_point():
    @dataclass
    class Mine(Reuse):
        name: ClassVar[str] = "mine"

    try:
        assert registry()["mine"] is Mine
        assert resolve("mine:fast")[0].every == 3
    finally:
        from diffaccel.pipelines import accelerator

        del accelerator._REGISTRY["mine"]

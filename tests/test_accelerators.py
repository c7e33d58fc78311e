"""Specifications, options, errors, and what an accelerator sees at each seam."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import diffusers
import pytest
import torch
from tiny_pipelines import TINY, run

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
from diffaccel.pipelines import install, option, registry, resolve
from diffaccel.pipelines.accelerator import tag
from diffaccel.pipelines.rows import merge_rows, rows_of


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
        (["sada", "reuse"], AcceleratorConflict, ["'sada'", "'reuse'", "skip"]),
        (3, OptionError, ["int", "expected a name"]),
        (Sada, OptionError, ["expected a name"]),
    ],
)
def test_errors_are_early_and_leave_the_pipeline(spec, error, words):
    pipe = TINY["sd"].build().to(accel="reuse")
    before = pipe.accel
    with pytest.raises(error) as caught:
        pipe.to(torch.float64, accel=spec)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert pipe.accel is before and pipe.dtype == torch.float32


def test_to_sets_keeps_and_removes():
    pipe = TINY["sd"].build()
    assert pipe.to("cpu", torch.float64, accel=["sada"]) is pipe and pipe.dtype == torch.float64
    pipe.to(accel="reuse")
    assert [a.name for a in pipe.accel.stack] == ["reuse"], "the last call wins"
    pipe.to("cpu").to(torch.float32)
    assert [a.name for a in pipe.accel.stack] == ["reuse"], "moving keeps the stack"
    assert "no call yet" in str(pipe.accel)
    assert pipe.to(accel=None) is pipe and not hasattr(pipe, "accel")
    assert pipe.to(accel=None) is pipe, "removing twice is fine"
    assert accelerate(pipe, "sada").accel.stack[0].name == "sada"


def test_the_users_object_is_a_template():
    mine, case = Sada(), TINY["sd"]
    before = dict(vars(mine))
    run(case, accelerate(case.build(), mine), 8)
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
        return [getattr(network, "mid_block", None) or network.transformer_blocks[0]]

    def block(self, call, proceed):
        self.log.append(("block", call.step, call.branch))
        return proceed(call)


@pytest.mark.parametrize(("name", "branches", "rows"), [("sd", 1, 4), ("flux_true_cfg", 2, 2)])
def test_seams(name, branches, rows):
    probe, case = Probe(), TINY[name]
    probe.log = []
    plain = run(case, case.build(), 3)
    pipe = accelerate(case.build(), probe)
    assert torch.equal(run(case, pipe, 3), plain)
    expected = [("start",)]
    network = case.denoisers[-1]
    for step in range(3):
        for branch in range(branches):
            expected += [("evaluate", network, step, branch, rows), ("block", step, branch)]
        expected += [("update", step, step)]
    assert probe.log == expected
    probe.log.clear()

    def again(pipeline, step, timestep, tensors):
        return tensors

    pipe.scheduler.set_timesteps(3, **({"mu": 1.0} if "flux" in name else {}))  # outside of a call: no effect
    assert probe.log == []


def test_two_loops_in_one_call_restart_the_counters():
    class Twice(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, x):
            for steps in (7, 4):
                self.scheduler.set_timesteps(steps)
                for t in self.scheduler.timesteps:
                    x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
            return x

    parts = TINY["ddim"].build().components
    pipe = Twice(**parts).to(accel="reuse")
    pipe(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert pipe.accel.report.evaluated == 4 + 2 and pipe.accel.report.requested == 11


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


def test_import_prints_nothing():
    command = [sys.executable, "-W", "ignore", "-c", "import diffaccel"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


class Halves(Accelerator):
    """Evaluates the samples of a batch one after the other, and puts the outputs together."""

    def evaluate(self, call, proceed):
        batch = call.run.batch
        if not batch or call.rows % batch:
            return proceed(call)
        whole = None
        for sample in range(batch):
            part = proceed(call.select([sample], batch))
            if whole is None:
                whole = proceed(call)
                whole = type(whole)(v * 0 for v in whole) if type(whole) is tuple and all(
                    isinstance(v, torch.Tensor) for v in whole) else whole  # fmt: skip
            whole = merge_rows(whole, part, rows_of([sample], batch, call.rows), call.rows)
        return whole


@pytest.mark.parametrize("name", [n for n, case in TINY.items() if n not in ("wan", "wan22", "ltx")])
def test_rows_of_a_batch_can_be_evaluated_alone(name):
    case = TINY[name]
    plain = run(case, case.build(), 6)
    result = run(case, accelerate(case.build(), Halves()), 6)
    torch.testing.assert_close(result, plain, atol=2e-4, rtol=1e-3)

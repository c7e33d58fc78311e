"""The token-wise part of SADA (card, section 3): cells, memory, blocks on some tokens, whole calls."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from test_families import batched
from tiny_pipelines import TINY, fresh, normal, run
from torch.utils import _pytree as pytree

from diffaccel import Accelerator, AcceleratorConflict, UnsupportedPipeline, accelerate
from diffaccel.noise import path_of
from diffaccel.pipelines.cells import Cells
from diffaccel.pipelines.rows import rows_of
from diffaccel.pipelines.run import denoisers_of
from diffaccel.pipelines.sada_rules import ErrorRule, position
from diffaccel.pipelines.token_memory import TokenMemory
from diffaccel.pipelines.tokens import Tokens

STEPS = 12
FAMILIES = ("sd", "dit", "flux")
THIN = {"tolerance": 1e-9, "tokens": 3e7}
"""No step is skipped, and some tokens are left out."""

PAPER = {"criterion": "stability", "tokens": 1.0, "max_skips": 4, "skip_from": 0.2}


def sada(name, options, **call):
    """The output and the report of a run."""
    case = TINY[name]
    pipe = fresh(name).to(accel={"sada": options})
    return run(case, pipe, STEPS, **call), pipe.accel.report


# ---------------------------------------------------------------- cells


@pytest.mark.parametrize(("shape", "patch"), [((2, 3, 4, 6), 1), ((2, 3, 4, 6), 2), ((2, 5, 3), 0)])
def test_cells_are_a_partition(shape, patch):
    x, cells = normal(*shape), Cells.of(shape, patch)
    parts = cells.split(x)
    assert len(parts) == 2 * cells.count and torch.equal(cells.join(parts), x)
    second = x[0, 1] if not patch else x[0, :, :patch, patch : 2 * patch]  # raster order
    assert torch.equal(parts[1], second)


def test_cells_that_are_none():
    for shape, patch in (((2, 3, 5, 6), 2), ((2, 4, 3, 8, 8), 1), ((2, 3, 4, 6), 0)):
        with pytest.raises(UnsupportedPipeline, match="latents of shape"):
            Cells.of(shape, patch)


def test_coarse_tokens_of_latents_that_are_not_square():
    """One of four cells is enough; odd sizes are rounded up, as by convolutions of stride 2."""
    cells = Cells.of((1, 4, 5, 6), 1)
    for y, x in np.ndindex(5, 6):
        wanted = np.zeros((1, 5, 6), bool)
        wanted[0, y, x] = True
        pooled = cells.pool(wanted.reshape(1, -1), 9).reshape(3, 3)
        assert pooled.sum() == 1 and pooled[y // 2, x // 2]
    assert cells.pool(wanted.reshape(1, -1), 30).sum() == 1 and cells.side(4) == 4
    sparse = np.zeros((1, 4, 4), bool)
    sparse[0, 0, 0] = True
    square = Cells.of((1, 4, 4, 4), 1)
    assert not square.pool(sparse.reshape(1, -1), 1).any(), "1 of 16 is too little"
    fine = Cells.of((1, 4, 4, 8), 2).pool(np.arange(8)[None] == 5, 32).reshape(4, 8)
    assert fine.sum() == 4 and fine[2:, 2:4].all(), "of a cell all finer tokens"
    with pytest.raises(UnsupportedPipeline, match="have 7 tokens"):
        cells.side(7)


def test_a_lattice_has_one_cell_of_every_window_and_each_in_turn():
    cells = Cells.of((1, 4, 6, 9), 1)
    seen = np.zeros(54, int)
    for step in range(9):
        chosen = cells.lattice(step, 3)
        windows = chosen.reshape(2, 3, 3, 3).sum((1, 3))
        assert (windows == 1).all()
        seen += chosen
    assert (seen == 1).all()


# ---------------------------------------------------------------- memory


def test_memory_continues_every_token_from_its_own_last_two_values():
    """Exact for values linear in u, whichever tokens and rows were computed when."""
    slope, level = normal(3, 2, 5, 4), normal(3, 2, 5, 4, seed=2)
    memory, generator = TokenMemory(True), torch.Generator().manual_seed(0)

    def value(u):
        return level + slope * u

    for u in (0.0, 0.7):
        memory.begin_whole(u, 5, 3, None, "cpu")
        memory.remember("a", value(u), None)
    for number, u in enumerate((1.1, 1.9, 2.0, 3.5)):
        rows = None if number % 2 else torch.tensor([0, 2])
        size = 3 if rows is None else 2
        index = torch.rand(size, 5, generator=generator).argsort(1)[:, :2]
        here = value(u) if rows is None else value(u)[rows]
        kept = here.gather(2, index[:, None, :, None].expand(-1, 2, -1, 4))
        weights = memory.begin(u, 5, rows, index)
        torch.testing.assert_close(memory.complete("a", kept, 2, rows, index, weights), here)


def test_memory_that_takes_values_as_they_were():
    memory, index = TokenMemory(False), torch.tensor([[1]])
    for u, value in ((0.0, [[1.0], [2.0]]), (1.0, [[2.0], [4.0]])):
        memory.begin_whole(u, 2, 1, None, "cpu")
        memory.remember("a", torch.tensor([value]), None)
    weights = memory.begin(2.0, 2, None, index)
    assert memory.complete("a", torch.tensor([[[9.0]]]), 1, None, index, weights).tolist() == [[[2.0], [9.0]]]


# ---------------------------------------------------------------- criterion


def test_the_errors_of_cells_make_the_error_of_the_sample():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(20)
    path = path_of(scheduler)
    loop = SimpleNamespace(path=path, num_updates=20, first_index=0, scheduler=scheduler)
    cells, x = Cells(2, (1, 3)), normal(2, 3, 4)
    rules = [ErrorRule(0.01, 3, 2, cells), ErrorRule(0.01, 3, 2)]
    for index in range(6):
        u = position(path, index)
        bend = torch.tensor([0.0, 1e-4, 1.0])[:, None] * u**2  # the first cell is linear in u
        call = SimpleNamespace(run=loop, index=index, step=index)
        for rule in rules:
            rule.plan(call, (x * (1 + 0.1 * u) + bend).double(), None, np.ones((2, rule.cells.count), bool))
        if index >= 3:
            np.testing.assert_allclose(np.sqrt((rules[0].rates ** 2).sum(1)), rules[1].rates[:, 0], rtol=1e-6)
            assert rules[0].stable(call, 1.0).tolist() == [[True, True, False]] * 2
            assert not rules[0].stable(call, 0.0).any()
    for index in range(6, 12):  # a cell that is not computed gets older, and its nodes farther away
        call = SimpleNamespace(run=loop, index=index, step=index)
        rules[0].plan(call, rules[0].reconstruct(call), None, np.array([[False, True, True]] * 2))
        assert rules[0].age.tolist() == [[index - 5, 0, 0]] * 2
        assert rules[0].stable(call, 1e9).tolist() == [[index < 11, True, True]] * 2, "twice max_skips"
        distance = rules[0].history.distance(position(path, index + 1), rules[0].order).reshape(2, -1)
        assert (distance[:, 0] > distance[:, 1]).all()


# ---------------------------------------------------------------- blocks


class Twice(Accelerator):
    """Evaluates in full, then again for some tokens: what is remembered is exact, and so is the result."""

    def blocks(self, pipe):
        self.thin = Tokens(denoisers_of(pipe), 2)
        return self.thin.modules

    def block(self, call, proceed):
        return self.thin.block(call, proceed)

    def evaluate(self, call, proceed):
        batch = call.run.batch
        if call.network == "controlnet" or not batch:
            return proceed(call)
        key, cells = (call.network, call.branch), self.thin.cells(call.network, self.shape)
        wanted = np.random.default_rng(call.step).random((batch, cells.count)) < 0.4
        with self.thin.part(key, 0.0, True, cells, None, None) as part:
            whole = proceed(call)
        assert part.computed == part.total > 0
        for samples in (list(range(batch)), [batch - 1]):
            rows = None if len(samples) == batch else rows_of(samples, batch, call.rows)
            small = call if rows is None else call.select(samples, batch)
            with self.thin.part(key, 0.0, True, cells, rows, wanted[samples]) as part:
                thin = proceed(small)
            assert 0.1 < part.computed / part.total < 0.9
            for one, other in zip(pytree.tree_leaves(thin), pytree.tree_leaves(whole), strict=True):
                expected = other if rows is None else other[rows]
                torch.testing.assert_close(one, expected, atol=1e-5 * float(other.abs().max()), rtol=1e-4)
            self.seen.append(part.computed)
        return whole

    def update(self, call, proceed):
        self.shape = call.sample.shape
        return proceed(call)


WIDE = {"sd": {"width": 48}, "sd3": {"width": 48}, "flux": {"width": 48}}


@pytest.mark.parametrize(
    "name",
    [*FAMILIES, "sdxl", "sd_controlnet", "musicldm", "pixart", "sd3", "flux_true_cfg"],
)
def test_some_tokens_get_what_they_get_among_all(name):
    """RoPE ids, text tokens, guidance and latents that are not square included."""
    accelerator = Twice()
    accelerator.seen = []
    call = WIDE.get(name, {})
    plain = run(TINY[name], fresh(name), 3, **call)
    result = run(TINY[name], accelerate(fresh(name), accelerator), 3, **call)
    assert torch.equal(result, plain) and len(accelerator.seen) == 4 * TINY[name].calls_per_step


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_left_out_is_bitwise_the_step_wise_part(name):
    tolerance = {"tolerance": 0.05}
    plain, report = sada(name, tolerance)
    for options in ({"tokens": 0.0}, {"tokens": 1e-9}, {"tokens": 1e9, "window": 1}):
        result, other = sada(name, {**tolerance, **options})
        assert torch.equal(result, plain) and other.actions == report.actions and other.tokens == 1


@pytest.mark.parametrize("name", [*FAMILIES, "sd3", "musicldm", "sd_controlnet", "flux_true_cfg"])
@pytest.mark.parametrize("options", [THIN, PAPER], ids=["error", "stability"])
def test_tokens_are_left_out_and_counted(name, options):
    result, report = sada(name, options)
    assert torch.isfinite(result).all()
    assert 0 < report.tokens < 1 and f"{100 * report.tokens:.3g} % of the tokens" in str(report)
    thin = [action for action in report.actions if action.what == "thin"]
    assert thin and {action.network for action in thin} == {TINY[name].denoisers[-1]}
    assert all(3 <= action.step < STEPS - 1 for action in thin)
    assert report.to_dict()["tokens"] == report.tokens


@pytest.mark.parametrize("name", [*FAMILIES, "sd3"])
def test_a_sample_is_the_same_alone_and_in_company(name):
    case = TINY[name]
    pipe = accelerate(fresh(name), {"sada": {"tolerance": 0.01, "tokens": 3.0}})
    call = batched(case, 2)

    def sample(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        mine = {k: [v[row] for row in rows] for k, v in call.items()}
        result = run(case, pipe, STEPS, generator=generators, **mine)
        actions = pipe.accel.report.actions
        return result, [[(a.step, a.what) for a in actions if n in a.samples] for n in range(len(rows))]

    both, chosen = sample([0, 1])
    assert any(what == "thin" for _, what in chosen[0] + chosen[1])
    for row in (0, 1):
        alone, mine = sample([row])
        assert mine == [chosen[row]]
        torch.testing.assert_close(alone[0], both[row], atol=2e-3 * float(both.abs().max()), rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left(name):
    """Neither from other runs nor, once it is off, anything at all."""
    case, pipe = TINY[name], fresh(name)
    plain = run(case, pipe, STEPS)
    pipe.to(accel={"sada": THIN})
    first = run(case, pipe, STEPS)
    run(case, pipe, STEPS + 3, seed=5)
    assert torch.equal(run(case, pipe, STEPS), first) and not torch.equal(first, plain)
    network = getattr(pipe, case.denoisers[0])
    assert not any("forward" in vars(module) for module in network.modules())
    pipe.to(accel=None)
    assert torch.equal(run(case, pipe, STEPS), plain)


@pytest.mark.parametrize("name", ["wan", "ddim", "qwenimage"])
def test_networks_that_are_not_known_are_refused(name):
    with pytest.raises(UnsupportedPipeline, match="only those of UNet2DConditionModel"):
        fresh(name).to(accel={"sada": {"tokens": 1.0}})
    fresh(name).to(accel="sada")


def test_tokens_beside_those_of_the_latents_are_refused():
    """Flux Kontext appends those of its input image; the step-wise part serves it."""
    pipe = diffusers.FluxKontextPipeline(**fresh("flux").components)
    with pytest.raises(UnsupportedPipeline, match="tokens of its input image"):
        pipe.to(accel={"sada": {"tokens": 0.5}})
    assert not hasattr(pipe, "accel")
    pipe.to(accel="sada")
    with pytest.raises(UnsupportedPipeline, match="use tokens=0"):
        pipe.to(accel={"sada": {"tokens": 0.5}})


def test_what_a_block_cannot_do_is_refused():
    tokens = {"sada": {"tokens": 1.0}}
    pipe = fresh("sd")
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    with pytest.raises(
        UnsupportedPipeline, match=r"transformer_blocks\.0 of its .*AttnProcessor; use tokens=0"
    ):
        pipe.to(accel=tokens)
    pipe = fresh("flux")
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(UnsupportedPipeline, match="compiled"):
        pipe.to(accel=tokens)
    with pytest.raises(AcceleratorConflict, match="blocks"):
        fresh("sd").to(accel=[tokens, "inherit"])
    fresh("sd").to(accel=["sada", "inherit"])

"""Combination of checkpoints: exactness, sums, averages, budget, resume, memory, bad input."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from diffaccel.distill import averages
from diffaccel.distill.checkpoint_files import Checkpoint, expand, open_checkpoint
from diffaccel.distill.checkpoint_matrix import CheckpointMatrix
from diffaccel.distill.checkpoints import CheckpointError
from diffaccel.distill.coefficients import CoefficientSpace
from diffaccel.distill.combination import METHODS, Combination
from diffaccel.errors import OptionError

K = 5


def tensors(seed, dtype=torch.float32, **more):
    source = torch.Generator().manual_seed(seed)
    made = {"blocks.0.weight": torch.randn(6, 4, generator=source),
            "blocks.1.weight": torch.randn(3, 6, generator=source),
            "head.bias": torch.randn(3, generator=source)}  # fmt: skip
    return {**{name: value.to(dtype) for name, value in made.items()},
            "table": torch.arange(4.0), "number": torch.tensor([7]), **more}  # fmt: skip


def write(folder, states):
    paths = []
    for place, state in enumerate(states):
        paths.append(folder / f"student-{place:03d}.safetensors")
        save_file(state, paths[-1])
    return [open_checkpoint(path) for path in paths]


@pytest.fixture
def checkpoints(tmp_path):
    return write(tmp_path, [tensors(seed) for seed in range(K)])


@pytest.fixture(params=[0, 1 << 30], ids=["on disk", "in memory"])
def matrix(request, checkpoints):
    return CheckpointMatrix(checkpoints, resident=request.param)


def bits(x):
    return x.view(torch.int32)


# ---------------------------------------------------------------- the matrix


def test_one_checkpoint_alone_is_bitwise_itself(matrix):
    for place in range(K):
        found = matrix.combine(averages.one_hot(K, place))
        assert all(torch.equal(bits(found[name]), bits(tensors(place)[name])) for name in matrix.names)


def test_uniform_is_the_mean(matrix):
    found = matrix.combine(averages.uniform(K))
    for name in matrix.names:
        mean = torch.stack([tensors(seed)[name].double() for seed in range(K)]).mean(0)
        assert (found[name].double() - mean).abs().max() < 1e-7


def test_negative_coefficients_and_linearity(matrix):
    """The output of a linear layer is linear in the coefficients."""
    alpha, x = np.array([2.0, -1.5, 0.7, -0.4, 0.2]), torch.randn(4)
    found = matrix.combine(alpha)["blocks.0.weight"] @ x
    own = sum(a * (tensors(seed)["blocks.0.weight"] @ x) for seed, a in enumerate(alpha))
    assert torch.allclose(found, own, atol=1e-5)


def test_adding_a_constant_to_all_adds_it_to_the_combination(tmp_path, matrix):
    shift = {name: torch.full(value.shape, 0.25) for name, value in tensors(0).items() if value.ndim == 2}
    moved = [{k: v + shift[k] if k in shift else v for k, v in tensors(seed).items()} for seed in range(K)]
    (tmp_path / "moved").mkdir()
    other = CheckpointMatrix(write(tmp_path / "moved", moved))
    alpha = [3.0, -2.0, 0.5, -1.0, 0.5]
    before, after = matrix.combine(alpha), other.combine(alpha)
    assert all(torch.allclose(after[k], before[k] + shift.get(k, 0), atol=3e-6) for k in matrix.names)


def test_what_is_the_same_in_all_is_no_part_of_it(matrix):
    assert sorted(matrix.names) == ["blocks.0.weight", "blocks.1.weight", "head.bias"]
    assert sorted(matrix.fixed) == ["number", "table"]
    assert matrix.size == 24 + 18 + 3


def test_groups_have_coefficients_of_their_own(checkpoints):
    for resident in (0, 1 << 30):
        found = CheckpointMatrix(checkpoints, ("blocks.1", "blocks"), resident=resident)
        assert found.groups == 3
        made = found.combine([averages.one_hot(K, 1), averages.one_hot(K, 2), averages.one_hot(K, 3)])
        places = {"blocks.1.weight": 1, "blocks.0.weight": 2, "head.bias": 3}
        assert all(torch.equal(made[name], tensors(place)[name]) for name, place in places.items())
    with pytest.raises(OptionError, match="no tensor of the group 'tail'"):
        CheckpointMatrix(checkpoints, ("tail",))


def test_half_precision_is_accumulated_in_float32(tmp_path):
    half = write(tmp_path, [tensors(seed, torch.bfloat16) for seed in range(K)])
    for resident in (0, 1 << 30):
        found = CheckpointMatrix(half, resident=resident).combine([4.0, -3.0, 2.0, -2.5, 0.5])
        exact = sum(a * tensors(s, torch.bfloat16)["blocks.0.weight"].double()
                    for s, a in enumerate([4.0, -3.0, 2.0, -2.5, 0.5]))  # fmt: skip
        assert (found["blocks.0.weight"].double() - exact).abs().max() < 3e-6


class Small(nn.Module):
    """A network with the tensors above, the bias of its head tied to another name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)])
        self.head = nn.Linear(3, 3, bias=True)
        del self.head.weight
        self.tied = self.head.bias
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("number", torch.zeros(1, dtype=torch.int64))


def test_writes_to_a_network_once_for_tied_weights(matrix):
    network = Small()
    targets = matrix.targets(network)
    assert torch.equal(network.table, torch.arange(4.0)) and network.number == 7
    matrix.write(averages.one_hot(K, 2), targets)
    assert torch.equal(network.tied, tensors(2)["head.bias"]) and network.tied is network.head.bias


def test_a_candidate_is_one_pass_over_the_matrix(checkpoints, monkeypatch):
    found, read, seen = CheckpointMatrix(checkpoints, resident=0), Checkpoint.read, []

    def counting(self, name, start=0, stop=None):
        values = read(self, name, start, stop)
        seen.append(len(values))
        return values

    monkeypatch.setattr(Checkpoint, "read", counting)
    found.combine(averages.uniform(K))
    assert sum(seen) == K * found.size


def test_memory_does_not_grow_with_the_checkpoints(tmp_path):
    """40 checkpoints of 8 MB: the peak of the process rises by less than a third of them.

    Up to 69 MB were seen in a process with other tests; alone it does not depend on how many they are
    (benchmarks/combination_memory.py: 17 MB for 10 and for 40 checkpoints of 100 MB).
    """
    paths = write(tmp_path, [{"w": torch.randn(2, 1 << 20)} for _ in range(40)])
    network = nn.Module()
    network.register_parameter("w", nn.Parameter(torch.zeros(2, 1 << 20)))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
    except OSError:
        pytest.skip("the peak of this process cannot be reset")
    before = _peak()
    found = CheckpointMatrix(paths, resident=0)
    found.write(averages.uniform(40), found.targets(network))
    assert _peak() - before < (40 * 8 << 20) / 3


def _peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_matrix_may_live_on_the_device(checkpoints):
    here, there = CheckpointMatrix(checkpoints), CheckpointMatrix(checkpoints, device="cuda")
    alpha = [3.0, -2.0, 0.5, -1.0, 0.5]
    a, b = here.combine(alpha), there.combine(alpha)
    assert there._kept.is_cuda and all(torch.allclose(a[name], b[name], atol=1e-5) for name in here.names)


# ---------------------------------------------------------------- files


def test_sharded_folders_and_pipelines_are_read(tmp_path):
    folder = tmp_path / "pipe" / "transformer"
    folder.mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    state, parts = tensors(0), {}
    for place, name in enumerate(state):
        parts[name] = f"model-{place}.safetensors"
        save_file({name: state[name]}, folder / parts[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    for found in (open_checkpoint(folder), open_checkpoint(tmp_path / "pipe", "transformer")):
        assert all(torch.equal(found.read(name), state[name].flatten()) for name in state)
    assert torch.equal(found.read("blocks.0.weight", 3, 9), state["blocks.0.weight"].flatten()[3:9])


def test_the_folder_of_a_run_stands_for_its_raw_weights(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(CheckpointError, match="keep_images=N"):
        expand([tmp_path])
    write(tmp_path / "raw", [tensors(0), tensors(1)])
    names = [path.name for path in expand([tmp_path])]
    assert (
        names
        == ["student-000.safetensors", "student-001.safetensors"]
        == [path.name for path in expand([tmp_path / "raw"])]
    )


def refuses(states, folder, match, **options):
    with pytest.raises(CheckpointError, match=match):
        CheckpointMatrix(write(folder, states), **options)


def test_bad_checkpoints_are_refused_with_what_is_wrong(tmp_path):
    good = tensors(0)
    refuses([good], tmp_path, "1 checkpoint; a combination needs at least 2")
    refuses([good, good], tmp_path, "all the same")
    refuses([good, {**tensors(1), "more": torch.zeros(1)}], tmp_path, "has 'more', which .*000.* has not")
    refuses([good, {**tensors(1), "head.bias": torch.zeros(4)}], tmp_path, r"shape \(3,\) .* \(4,\) in")
    refuses([good, tensors(1, number=torch.tensor([8]))], tmp_path, "'number' holds integers that differ")
    refuses([good, tensors(1, number=torch.tensor([8.0]))], tmp_path, "'number' is torch.int64")
    broken = tensors(1)
    broken["blocks.1.weight"][2, 3] = math.nan
    for resident in (0, 1 << 30):
        refuses([good, broken], tmp_path, "'blocks.1.weight' in .*001.* is not finite", resident=resident)
    norms = [{**tensors(s), "norm.running_var": torch.rand(3)} for s in range(2)]
    refuses(norms, tmp_path, "running statistics of a batch norm")


def test_bad_files_are_refused_with_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        expand([tmp_path / "nothing"])
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickled"):
        open_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        open_checkpoint(tmp_path)
    save_file(tensors(0), tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="cannot read"):
        open_checkpoint(tmp_path / "cut.safetensors")


def test_a_network_of_other_names_or_shapes_is_refused(tmp_path, matrix):
    class Other(Small):
        def __init__(self):
            super().__init__()
            self.more = nn.Parameter(torch.zeros(2))

    with pytest.raises(CheckpointError, match="lacks 'more'"):
        matrix.targets(Other())
    with pytest.raises(CheckpointError, match="which the network has not"):
        matrix.targets(nn.Linear(2, 2))
    network = Small()
    network.blocks[0] = nn.Linear(5, 6, bias=False)
    with pytest.raises(CheckpointError, match=r"shape \(6, 4\) in .*, \(6, 5\) in the network"):
        matrix.targets(network)
    with pytest.raises(OptionError, match="coefficients of shape"):
        matrix.combine([1.0, 0.0])


# ---------------------------------------------------------------- known averages


def test_limits_of_the_moving_average():
    assert np.array_equal(averages.ema(K, 0.0), averages.one_hot(K))
    assert np.allclose(averages.ema(K, 1e-12), averages.one_hot(K))
    assert np.array_equal(averages.ema(K, 1.0), averages.uniform(K))
    assert np.allclose(averages.ema(K, 0.5), np.array([1, 2, 4, 8, 16]) / 31)


def test_metrics_weigh():
    assert np.allclose(averages.mwa([3.0, 1.0, 2.0], 0.0), 1 / 3)
    assert np.allclose(averages.mwa([3.0, 1.0, 2.0], 1e3), [0, 1, 0])
    spread = np.std([3, 1, 2])
    weights = np.exp(-2 * np.array([2, 0, 1]) / spread)
    assert np.allclose(averages.mwa([3.0, 1.0, 2.0], 2.0), weights / weights.sum())
    assert np.allclose(averages.mwa([1.0, 1.0], 2.0), 0.5)
    with pytest.raises(OptionError):
        averages.mwa([1.0, math.inf], 1.0)


def test_swad_finds_the_flat_part():
    losses = [10, 8, 6, 4, 2, *[1.01, 1.0, 1.02, 1.05, 1.03, 1.01, 1.04], 2, 3, 4, 5, 6, 7, 8]
    start, end = averages.swad_window(losses)
    assert losses[start] == 1.0 and losses[end] == 1.04
    assert averages.swad(losses).sum() == pytest.approx(1)
    assert np.count_nonzero(averages.swad(losses)) == end - start + 1
    assert averages.swad_window(losses[:10]) == (6, 9)  # it has not ended yet
    with pytest.raises(OptionError):
        averages.swad([1.0, -1.0, 1.0])


# ---------------------------------------------------------------- the space


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 3.0]), st.integers(1, 3))
def test_sums_are_one_after_any_operators(seed, cap, groups):
    space, rng = CoefficientSpace(K, groups=groups, cap=cap), random.Random(seed)
    found = [space.legal([rng.gauss(0, 3) for _ in range(groups * K)]) for _ in range(2)]
    for _ in range(12):
        child = space.mutate(space.cross(found[-1], found[-2], rng), rng)
        moved = space.moved(child, [rng.gauss(0, 1) for _ in range(space.dimension)])
        found += [child, moved]
    for candidate in found:
        rows = space.rows(candidate)
        assert np.abs(rows.sum(1) - 1).max() < 1e-6
        assert not cap or np.abs(rows).sum(1).max() < cap + 1e-6
        assert space.from_plain(json.loads(json.dumps(space.to_plain(candidate)))) == candidate


def test_directions_are_orthonormal_and_keep_the_sum():
    space = CoefficientSpace(K)
    start = space.legal(averages.one_hot(K))
    assert space.moved(start, [0.0] * (K - 1)) == start
    moves = np.eye(K - 1)
    steps = np.array([space.rows(space.moved(start, move))[0] - averages.one_hot(K) for move in moves])
    assert np.allclose(steps @ steps.T, (2 / K) ** 2 * np.eye(K - 1), atol=1e-7)


# ---------------------------------------------------------------- the search


class Quadratic:
    """|theta - theta*|^2 with theta* in the affine hull of random checkpoints; counts its calls."""

    def __init__(self, seed, count=5, size=20):
        rng = np.random.default_rng(seed)
        self.rows = rng.normal(size=(count, size))
        best = rng.normal(size=count)
        self.target = (best + (1 - best.sum()) / count) @ self.rows
        self.calls = []

    def __call__(self, alpha, part):
        self.calls.append(part)
        return float(np.square(alpha[0] @ self.rows - self.target).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_a_quadratic_is_found(seed):
    for method, budget in (("lcsc-ga", 2000), ("lcsc", 600)):
        search = Combination(5, Quadratic(seed), method, budget=budget, seed=seed)
        search.search()
        assert search.winner().search < 1e-5 * search.averages()["ema"][1]


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_kept_to_the_call(method):
    """Candidates are scored once each; the best five are scored again, besides."""
    score = Quadratic(0, 8)
    search = Combination(8, score, method, budget=40, seed=1)
    search.search()
    spent = {"mwa": 13, "swad": 9, "uniform": 1}.get(method, 40)
    assert score.calls == [0] * spent and search.done == spent
    assert len({entry.candidate for entry in search.engine.scored}) == spent
    found = search.winner()
    assert score.calls[spent:] == [1] * min(5, spent) and found.evaluations == (spent, min(5, spent))
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", ["lcsc", "lcsc-ga"])
def test_the_same_seed_gives_the_same_and_a_stopped_search_goes_on(method, tmp_path):
    def made(budget, file=None, seed=3):
        search = Combination(8, Quadratic(0, 8), method, budget=budget, seed=seed, file=file)
        search.search()
        return search

    whole = made(120)
    assert [entry.candidate for entry in made(120).engine.scored] == [
        entry.candidate for entry in whole.engine.scored
    ]
    file = tmp_path / "search.json"
    for budget in (5, 37, 38, 120):  # in the known averages, within a generation, one more, the end
        parts = made(budget, file)
    assert [(entry.candidate, entry.score) for entry in parts.engine.scored] == [
        (entry.candidate, entry.score) for entry in whole.engine.scored
    ]
    assert whole.winner(37).search == min(entry.score for entry in whole.engine.scored[:37])
    with pytest.raises(OptionError, match="another search: seed is 3, now 4"):
        made(120, file, seed=4)


def test_metrics_of_single_checkpoints_give_further_starts():
    search = Combination(8, Quadratic(0, 8), budget=60, singles=True)
    search.search()
    assert set(search.averages()) >= {"last", "uniform", "ema", "checkpoint", "mwa"}


def test_scores_that_are_not_finite_are_the_worst():
    def score(alpha, part):
        return math.nan if alpha[0, 0] > 0.2 else float(np.square(alpha).sum())

    for method in ("lcsc", "lcsc-ga"):
        search = Combination(6, score, method, budget=80)
        search.search()
        assert search.winner().search < 0.2
    with pytest.raises(OptionError, match="no candidate has a finite score"):
        broken = Combination(6, lambda alpha, part: math.nan, budget=20)
        broken.search()
        broken.winner()


def test_bad_options_are_refused():
    for options in ({"method": "lscs"}, {"budget": 0}, {"cap": 0.5}, {"top": 0}):
        with pytest.raises(OptionError):
            Combination(5, Quadratic(0), **options)

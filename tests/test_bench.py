"""What a benchmark measures: the order of its runs, times, operations, distances, and its rows."""

import json

import pytest
import torch
from tiny_pipelines import TINY

from diffaccel import accelerate
from diffaccel.cli.bench import Bench, Settings
from diffaccel.cli.figures import draw_grid
from diffaccel.cli.report import page
from diffaccel.cli.tables import bench_lines, markdown
from diffaccel.eval import Timing, clock_outside, count_flops, fidelity, interleave, order_of, timed
from diffaccel.eval.provenance import plain
from diffaccel.eval.sampler import Sampler

CPU = torch.device("cpu")


def test_interleave_alternates():
    seen = []
    tasks = [lambda n=n: n for n in range(3)]
    interleave(tasks, 2, lambda turn, position, result: seen.append((turn, position, result)))
    assert seen == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 2, 2), (1, 1, 1), (1, 0, 0)]


def test_timing_and_fidelity():
    assert Timing((3.0, 1.0, 2.0)).median == 2 and Timing((1.0, 2.0, 3.0)).quartiles == (1.5, 2.5)
    assert Timing((4.0,)).quartiles == (4.0, 4.0)
    reference = torch.full((2, 3, 4, 4), 0.5)
    images = reference.clone()
    images[0] += 0.1
    result = fidelity(images, reference)
    assert result.rms == pytest.approx(0.1 / 2**0.5, rel=1e-5) and result.worst == pytest.approx(
        0.1, rel=1e-5
    )
    assert result.psnr == pytest.approx(23.0103, rel=1e-4) and result.relative == pytest.approx(0.1, rel=1e-5)
    assert fidelity(reference, reference).psnr == float("inf")
    with pytest.raises(ValueError, match="shape"):
        fidelity(images, reference[:1])


def test_flops_of_known_layers():
    linear, x = torch.nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    assert count_flops(lambda: linear(x)) == 2 * 4 * 8 * 16
    q = torch.randn(1, 2, 5, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(q, q, q)) == 2 * (2 * 2 * 5 * 5 * 8)


def test_order_is_balanced():
    count = 4
    orders = [order_of(turn, count) for turn in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in range(count):  # every task stands at every place equally often
        assert sorted(order[place] for order in orders) == sorted(2 * list(range(count)))
    assert all(orders[turn + 1] == orders[turn][::-1] for turn in range(0, 2 * count, 2))
    assert order_of(3, 1) == [0] and order_of(0, 0) == []


def test_quartiles_are_between_the_values():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (timing.median, *timing.quartiles) == (3.0, 2.0, 4.0)


def test_psnr_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    reference, images = torch.rand(2, 3, 3, 8, 8, generator=generator)
    result = fidelity(images, reference)
    error = (images - reference).double()
    assert result.rms == pytest.approx(float(error.pow(2).mean().sqrt()), rel=1e-6)
    assert result.psnr == pytest.approx(float(-10 * error.pow(2).mean().log10()), rel=1e-6)
    per_image = [float(e.norm() / r.double().norm()) for e, r in zip(error, reference, strict=True)]
    assert result.relative == pytest.approx(sum(per_image) / 3, rel=1e-6)


def test_flops_of_a_pipeline_are_those_of_its_evaluations():
    pipe = TINY["sd"].build()

    def flops(steps):
        return count_flops(lambda: Sampler(pipe, ["a bag"], steps, None, 0)())

    two, four, six = flops(2), flops(4), flops(6)
    assert six - four == four - two > 0 and two > four - two  # the text encoder and the VAE are the rest


def test_clock_measures_the_parts_and_goes_again():
    pipe = TINY["sd"].build()
    sampler = Sampler(pipe, ["a bag"], 2, None, 0)
    expected = sampler()
    with clock_outside(pipe, CPU) as outside:
        images, seconds = timed(sampler, CPU)
    assert torch.equal(images, expected)
    assert len(outside) == 3 and 0 < sum(outside) < seconds  # prompt, empty prompt, decoder
    assert "decode" not in vars(pipe.vae) and "forward" not in vars(pipe.text_encoder)
    accelerate(pipe, "reuse")
    with clock_outside(pipe, CPU) as outside:
        sampler()
    assert len(outside) == 3 and "decode" not in vars(pipe.vae)


@pytest.fixture
def work():
    settings = Settings(
        "tiny", ("reuse", "reuse(every=4)"), steps=8, n=3, batch=2, rounds=2, plain_steps=(3,)
    )
    pipe = TINY["ddim"].build()
    work = Bench(settings, pipe, Sampler(pipe, [], 8, None, 0, count=3))
    work.warm_up(lambda: None)
    return work


def test_rows(work):
    assert [row.label for row in work.rows] == [
        "plain, 8 steps", "reuse", "reuse(every=4)", "plain, 4 steps", "plain, 3 steps", "plain, 2 steps",
    ]  # fmt: skip
    assert [row.evaluated for row in work.rows] == [8, 4, 2, 4, 3, 2]
    assert [row.requested for row in work.rows] == [8, 8, 8, 4, 3, 2]
    assert [row.calls for row in work.rows] == [16, 8, 4, 8, 6, 4], "two batches"
    full = work.rows[0].flops
    assert [row.flops / full for row in work.rows] == pytest.approx([row.evaluated / 8 for row in work.rows])
    assert work.rows[0].fidelity.rms == 0 < work.rows[1].fidelity.rms
    assert not hasattr(work.pipe, "accel"), "the pipeline is left plain"


def test_speedups_are_paired_ratios(work, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("diffaccel.eval.cost.time.perf_counter", lambda: float(next(clock)) ** 2)
    work.measure(lambda: None)
    plain_row, reuse = work.rows[:2]
    ratios = tuple(a / b for a, b in zip(plain_row.seconds, reuse.seconds, strict=True))
    assert reuse.speedup.values == ratios and len(set(ratios)) == 2
    assert reuse.realized.values == pytest.approx([ratio / 2 for ratio in ratios])  # no VAE, no text encoder
    assert plain_row.speedup.values == (1.0, 1.0)


def test_report(work):
    work.measure(lambda: None)
    rows = [row.to_dict() for row in work.rows]
    record = {"settings": {"model": "<tiny>", "steps": 8, "rounds": 2}, "images": 3, "scheduler": "DDIM",
              "machine": {"processor": "x"}, "versions": {"torch": "2"}, "rows": rows}  # fmt: skip
    assert json.loads(json.dumps(plain(record), allow_nan=False))["rows"][0]["fidelity"]["psnr"] == "inf"
    grid = draw_grid([(row.label, work.images[id(row)]) for row in work.rows], ["one", "two", "three"])
    assert grid.startswith(b"\x89PNG")
    text = page([record], [grid])
    assert "&lt;tiny&gt;" in text and text.count("data:image/png;base64,") == 2
    assert "http" not in text.replace("http-equiv", ""), "self-contained"
    assert markdown(bench_lines(rows)).count("\n") == 2 + len(work.rows)


def test_plain_fewer_steps_are_there_even_if_nothing_was_skipped():
    pipe = TINY["ddim"].build()
    settings = Settings("tiny", ("reuse(every=1)",), steps=4, n=1, flops=False)
    work = Bench(settings, pipe, Sampler(pipe, [], 4, None, 0))
    work.warm_up(lambda: None)
    assert [row.label for row in work.rows] == ["plain, 4 steps", "reuse(every=1)", "plain, 2 steps"]
    assert work.rows[1].fidelity.rms == 0 and work.rows[1].flops is None

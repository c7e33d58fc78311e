"""The fronts, the bar and the tables of the benchmark of peers, on numbers made up for it."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from peers_front import Point, compare, error_at, front, speed_at  # noqa: E402
from peers_tables import tables  # noqa: E402


def points(*pairs, name="x"):
    return [Point(speed, error, f"{name}{n}") for n, (speed, error) in enumerate(pairs)]


def test_a_front_has_no_point_that_another_beats():
    found = front(points((2, 0.1), (3, 0.05), (4, 0.2), (4, 0.3), (1.5, 0.01), (1.2, 0.01)))
    assert [(point.speed, point.error) for point in found] == [(1.5, 0.01), (3, 0.05), (4, 0.2)]
    assert front([]) == []


def test_interpolation_is_a_power_law():
    """Points of error = speed ** 3 / 1000: the front has that error everywhere between them."""
    found = front(points(*((speed, speed**3 / 1000) for speed in (1.5, 2, 4))))
    for speed in (1.5, 1.7, 2.0, 3.3, 4.0):
        error, _ = error_at(found, speed)
        assert error == pytest.approx(speed**3 / 1000)
        assert speed_at(found, error)[0] == pytest.approx(speed)
    assert error_at(found, 3.3)[1].speed == 4


def test_fronts_end():
    found = front(points((2, 0.01), (4, 0.1)))
    assert error_at(found, 1.2)[0] == 0.01  # the slowest point is as fast as that
    assert error_at(found, 4.1) is None and error_at([], 1) is None
    assert speed_at(found, 0.005) == (1.0, False)  # the plain run is as exact
    assert speed_at(found, 0.5) == (4, True) and speed_at(found, 0.1) == (4, False)


def test_the_bar():
    """Ours is twice as fast at the same error, and has an eighth of the error at the same speed-up."""
    rivals = points(*((speed, speed**3 / 1000) for speed in (1.25, 2, 4)), name="rival")
    ours = points(*((2 * speed, speed**3 / 1000) for speed in (0.6, 1, 2, 4)), name="ours")
    rows = compare(ours, rivals, (1.5, 2, 3, 5))
    assert [row.speed for row in rows] == [1.5, 2, 3]  # no rival is 5 times as fast
    for row in rows:
        assert row.error_ratio == pytest.approx(1 / 8) and row.speed_ratio == pytest.approx(2)
        assert row.met and not row.bounded
    assert not any(row.met for row in compare(rivals, rivals, (1.5, 2, 3)))
    assert all(row.error_ratio == 1 for row in compare(rivals, rivals, (2, 4)))


def test_the_bar_where_ours_is_slower_or_less_exact():
    rivals = points((2, 0.01), (4, 0.05))
    slow = compare(points((3, 0.001)), rivals, (2, 4))
    assert slow[0].met and slow[0].bounded and slow[0].speed_ratio == 1.5
    assert slow[1].ours is None and slow[1].error_ratio == math.inf and not slow[1].met
    rough = compare(points((4, 0.04)), rivals, (2,))
    assert rough[0].speed_ratio == 0.5 and rough[0].error_ratio == 4 and not rough[0].met


def row(group, name, setting, speed, rms, **others):
    number = {"value": 1.0, "se": 0.1}
    return {
        "group": group, "name": name, "setting": setting, "steps": 50, "flops": 4e9 / speed, "calls": 50,
        "evaluated": 50 / speed, "seconds": [1 / speed] * 3, "rms": rms, "psnr": 30.0, "relative": rms,
        "speedup": {"median": speed, "low": speed - 0.1, "high": speed + 0.1}, "ssim": number,
        "feature_distance": number, "fd": number, "fd_minus_plain": number, **others,
    }  # fmt: skip


def record(ours):
    rows = [
        row("plain", "plain", "", 1.0, 0.0),
        *(row("steps", "fewer steps", f"{n} steps", 50 / n, 1 / n) for n in (25, 10)),
        row("peer", "Cache", "t=0.1", 2.5, 0.03),
        row("peer", "Cache", "t=0", 1.01, 0.0),
        {"group": "peer", "name": "Other", "setting": "", "steps": 50, "failure": "ValueError: no | bar"},
        row("ours", "sada", "tolerance=0.01", 4.0, ours),
        row("ours", "sada", "tolerance=0.1", 6.5, 2 * ours),
    ]
    trial = {"status": "runs", "flops": 0.5, "error": 0.01}
    failed = {"status": "fails", "message": "IndexError: pop from empty list (first.py:3)"}
    return {
        "model": "tiny-fashion-sd", "guidance": 5.0, "scheduler": "DPM",
        "trial_steps": 12,
        "machine": {"processor": "CPU", "cores": 2, "threads": 1, "device": "cpu"},
        "versions": {"diffusers": "1", "torch": "2", "cache-dit": "3", "DeepCache": "4", "tomesd": "5"},
        "runs": {"50": {"n": 64, "batch": 16, "minutes": 3.0, "rows": rows}},
        "trials": [{"name": "Cache", "group": "peer", "options": {}, "shipped": failed, "helped": trial}],
    }  # fmt: skip


def test_the_tables_say_whether_the_bar_is_met():
    text = tables([record(0.001)])
    assert "`tiny-fashion-sd`, 50 steps | met" in text
    assert "no \\| bar" in text and "pop from empty list" in text and "no effect" in text
    worse = tables([record(0.02)])
    assert "`tiny-fashion-sd`, 50 steps | not met" in worse
    for line in text.splitlines():
        assert len([cell for cell in line.split(" | ") if cell == "nan"]) == 0


def test_the_document_is_that_of_the_records():
    files = sorted((ROOT / "benchmarks").glob("peers-*.json"))
    if not files:
        pytest.skip("nothing was measured")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == tables(found)

"""``docs/benchmarks.md`` from the records of ``peers.py``: the bar, all rows, and what refuses."""

import math
from collections.abc import Sequence
from typing import Any

from peers_front import ERROR_RATIO, SPEED_RATIO, Comparison, Point, compare, front

from diffaccel.cli.tables import Lines, markdown, shown

__all__ = ["tables"]

Record = dict[str, Any]
WORDS = {"idle": "no effect", "unhooked": "no effect: changes no module"}
"""How it is said that a method ran and did nothing."""

CLOCKS = {"time": "by the clock", "operations": "by operations"}
"""What a speed-up can be measured by."""


def tables(records: Sequence[Record]) -> str:
    """Returns the document as Markdown.

    Arguments:
        records: What ``peers.py`` has written, of any models.
    """
    zoo = [record for record in records if record["runs"]]
    parts = [_head(zoo or records)]
    if zoo:
        parts += [_bar(zoo)]
        parts += [_run(record, steps) for record in zoo for steps in record["runs"]]
    parts.append(_trials(records))
    parts.append(_costs(records))
    return "\n".join(part for part in parts if part)


def _table(header: list[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(Lines("", header, [("plain", list(row)) for row in rows], ()))


def _head(records: Sequence[Record]) -> str:
    first = records[0]
    versions = ", ".join(f"{name} {first['versions'][name]}"
                         for name in ("diffusers", "torch", "cache-dit", "DeepCache", "tomesd"))  # fmt: skip
    machine = first["machine"]
    return f"""# Against other accelerators, in one run

Written by `make tables` from `benchmarks/peers-*.json`, which `python benchmarks/peers.py measure` makes
(extra `peers`). {versions}; {machine["processor"]}, {machine["threads"]} thread(s).

- **Rows.** All methods make the same images: same prompts, same noise, same scheduler, and the errors are
  those against the unaccelerated run. `s3` and fewer steps take other steps by their nature: both approach
  the fine solution, from which plain runs of 20 steps are away by themselves. The schedules of `s3` are those
  that ship, searched for the guidance of the run on other noise, and those of 5 and 6 evaluations of the DiT
  polished for the Fréchet distance, which moves its images 1.15 and 1.28 times as far from the fine solution.
- **Solver.** DPM-Solver++ 2M. The U-Net's timesteps are spaced "trailing", as the DiT's are by its path: with
  the "leading" ones of its configuration the first timestep depends on the number of steps (951 of 50, 901 of
  100), so that plain runs of 50 and 100 steps are .039 apart, and nothing that begins in pure noise, as `s3`
  does, can be nearer to either.
- **Speed-up.** Wall-clock seconds of the whole call, batch by batch in turn with the plain run of the same
  session; the median of the paired ratios, and the least and largest.
- **Operations.** GFLOP an image of matrix products, convolutions and attention, counted by
  `torch.utils.flop_counter` on the first batch, text encoder and VAE among them.
- **Evaluations.** Of the denoiser an image. All peers call it at each step and compute a part of it, which
  this number does not see; that of ours leaves out those that were skipped.
- **Feature distance.** 1 - cos of ImageNet features (EfficientNet-Lite0, protocol `offline`): it stands for
  LPIPS, whose weights are not on this machine, and is none.
- **FD.** The Fréchet distance to real images by the protocol `fashion`, and its paired difference to the
  plain run, ± standard error.
- **`auto`.** A plan that `diffaccel tune` has found is one of these methods again, on one of these numbers of
  steps. It is among the rows where one was given for the scheduler and the steps of the run (`--plan`).
- **Help.** Peers are given what they need to run: a cache context, the timestep, patterns that match, ratios
  calibrated on the model, and for FasterCache the halves of the batch in its order
  (`benchmarks/peer_methods.py`). What each does as shipped is at the end. DBCache has F1B0, as the model has
  8 blocks, and its warm-up is a twelfth of the steps.
"""


def _bar(zoo: Sequence[Record]) -> str:
    """Returns the summary of the bar, computed."""
    rows = []
    for record in zoo:
        for steps, run in record["runs"].items():
            verdicts = []
            for clock in CLOCKS:
                found = compare(*_sides(run["rows"], clock))
                verdicts += [_verdict(found), *_extremes(found)]
            rows.append([f"`{record['model']}`, {steps} steps", *verdicts])
    header = ["run"]
    for words in CLOCKS.values():
        header += [f"bar, {words}", "error at equal speed-up", "speed-up at equal error"]
    return (
        "## The bar\n\n"
        f"Our best against the best of all others, fewer steps among them: at equal speed-up at most "
        f"{ERROR_RATIO:g} times their RMS error, and at equal error at least {SPEED_RATIO:g} times their "
        "speed-up. The Pareto front of each side is interpolated (the logarithm of the error linear in that "
        "of the speed-up), and compared at fixed speed-ups, as far as a rival reaches. It is met where both "
        'halves hold at all of them. The worst ratios are given; "at least" stands where our fastest setting '
        "is still more exact than the rival, so that no more was measured.\n\n" + _table(header, rows)
    )


def _sides(rows: Sequence[dict[str, Any]], clock: str, rival: str = "") -> tuple[list[Point], list[Point]]:
    """Returns our points and those of the others, or of one of them; rows that changed nothing are none.

    Arguments:
        rows: The rows of a run.
        clock: One of `CLOCKS`.
        rival: The name of a method; all if it is empty.
    """
    plain = rows[0]
    sides: dict[bool, list[Point]] = {True: [], False: []}
    for row in rows[1:]:
        if "failure" in row or not row["rms"] or (row["group"] != "ours" and rival not in ("", row["name"])):
            continue
        speed = row["speedup"]["median"] if clock == "time" else plain["flops"] / row["flops"]
        sides[row["group"] == "ours"].append(Point(speed, row["rms"], _label(row)))
    return sides[True], sides[False]


def _label(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['setting'] or 'default'})"


def _verdict(found: Sequence[Comparison]) -> str:
    if not found:
        return "no rival is that fast"
    count = sum(row.met for row in found)
    return "met" if count == len(found) else f"not met (at {count} of {len(found)})"


def _extremes(found: Sequence[Comparison]) -> tuple[str, str]:
    """Returns the largest ratio of errors and the smallest of speed-ups."""
    if not found:
        return "-", "-"
    slowest = min(found, key=lambda row: row.speed_ratio)
    return _ratio(max(row.error_ratio for row in found)), _least(slowest)


def _ratio(value: float) -> str:
    return "not as fast" if math.isinf(value) else f"{value:.2f}"


def _least(row: Comparison) -> str:
    return f"{'at least ' if row.bounded else ''}{row.speed_ratio:.2f}"


def _run(record: Record, steps: str) -> str:
    """Returns the section of one model at one number of steps."""
    run = record["runs"][steps]
    rows = run["rows"]
    return "\n".join([
        f"## `{record['model']}`, {steps} steps\n",
        f"{record['scheduler']}, guidance {record['guidance']:g}, {run['n']} images in batches of "
        f"{run['batch']}; {run['minutes']:.0f} minutes for what was not measured before.\n",
        "At equal speed-up, and at equal error:\n", _comparisons(rows),
        "Against each of the others alone, by the clock:\n", _rivals(rows),
        "All rows; those in bold are on the front of all:\n", _rows(rows),
    ])  # fmt: skip


def _comparisons(rows: Sequence[dict[str, Any]]) -> str:
    header = ["measured", "speed-up", "best of others", "its RMS", "ours", "our RMS", "ratio",
              "our speed-up at its RMS", "ratio", "bar"]  # fmt: skip
    lines = []
    for clock, words in CLOCKS.items():
        for one in compare(*_sides(rows, clock)):
            lines.append([
                words, f"{one.speed:g}", one.rival_name, f"{one.rival:.5f}", one.our_name or "-",
                "-" if one.ours is None else f"{one.ours:.5f}", _ratio(one.error_ratio),
                f"{'at least ' if one.bounded else ''}{one.our_speed:.2f}", f"{one.speed_ratio:.2f}",
                "met" if one.met else "not met",
            ])  # fmt: skip
    return _table(header, lines)


def _rivals(rows: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(row["name"] for row in rows if row["group"] in ("steps", "peer"))
    lines = []
    for name in names:
        ours, theirs = _sides(rows, "time", name)
        found = compare(ours, theirs)
        if theirs:
            fastest = f"{max(point.speed for point in theirs):.2f}"
            lines.append([name, fastest, _verdict(found), *_extremes(found)])
    header = [
        "method",
        "fastest",
        "bar",
        "error at equal speed-up, at most",
        "speed-up at equal error, at least",
    ]
    return _table(header, lines)


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    header = ["method", "setting", "evaluations", "GFLOP/image", "speed-up", "RMS", "PSNR", "SSIM",
              "feature distance", "FD", "FD - plain"]  # fmt: skip
    ours, theirs = _sides(rows, "time")
    best = {point.name for point in front([*ours, *theirs])}
    lines = []
    for row in rows:
        if "failure" in row:
            lines.append([row["name"], row["setting"], f"fails: {row['failure']}", *["-"] * 8])
            continue
        speed, plain = row["speedup"], row["group"] == "plain"
        setting = "" if plain else row["setting"] or "default"
        name = f"**{row['name']}**" if _label(row) in best else row["name"]
        lines.append([
            name, setting, f"{row['evaluated']:.4g}", f"{row['flops'] / 1e9:.3g}",
            "1" if plain else f"{speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})",
            *_errors(row, plain), shown(row["fd"]), "-" if plain else shown(row["fd_minus_plain"], True),
        ])  # fmt: skip
    return _table(header, lines)


def _errors(row: dict[str, Any], plain: bool) -> list[str]:
    if plain or not row["rms"]:
        return ["0" if plain else "0, no effect", "-", "-", "-"]
    similar = f"{row['ssim']['value']:.4f}" if row["ssim"] else "-"
    seen = f"{row['feature_distance']['value']:.4f}"
    return [f"{row['rms']:.5f}", f"{row['psnr']:.1f} dB", similar, seen]


def _trials(records: Sequence[Record]) -> str:
    """Returns what runs and what refuses, with messages as notes."""
    notes: dict[str, int] = {}
    names = list(dict.fromkeys(row["name"] for record in records for row in record["trials"]))
    lines = []
    for name in names:
        cells = [name]
        for record in records:
            row = next((one for one in record["trials"] if one["name"] == name), None)
            cells.append("-" if row is None else _trial(row, notes))
        lines.append(cells)
    messages = "".join(f"- [{number}] {text}\n" for text, number in notes.items())
    return (
        "## What runs, and what refuses\n\n"
        f"One call of {records[0]['trial_steps']} steps on each model; `sdxl`, `sd3` and `flux` have that "
        "shape and random weights, and tell nothing about quality. A cell has the part of the operations "
        "that was computed, as shipped; where that fails or does nothing, the cell with help follows, if it "
        "differs. \"No effect\" is an output of the same bits, without an error.\n\n"
        + _table(["method", *(f"`{record['model']}`" for record in records)], lines) + "\n" + messages
    )  # fmt: skip


def _trial(row: dict[str, Any], notes: dict[str, int]) -> str:
    shipped, helped = _outcome(row["shipped"], notes), _outcome(row["helped"], notes)
    if row["shipped"]["status"] == "runs" or shipped == helped:
        return shipped
    return f"{shipped}; helped: {helped}"


def _outcome(found: dict[str, Any], notes: dict[str, int]) -> str:
    if found["status"] == "fails":
        return f"fails [{notes.setdefault(found['message'], len(notes) + 1)}]"
    return WORDS.get(found["status"]) or f"{100 * found['flops']:.0f} %"


def _costs(records: Sequence[Record]) -> str:
    """Returns what the methods cost where there is nothing to gain, and what is left of what they save."""
    lines = [
        [
            f"`{record['model']}`",
            row["name"],
            f"{100 * row['helped']['flops']:.0f} %",
            _cost(row["cost"], 100),
            _cost(row.get("overhead"), 0),
        ]
        for record in records
        for row in record["trials"]
        if "cost" in row
    ]
    if not lines:
        return ""
    pairs = next(record["pairs"] for record in records if "pairs" in record)
    header = ["model", "method", "operations", "processor time", "saving nothing, processor time"]
    return (
        "## What the machinery costs\n\n"
        f"Random weights, {pairs} pairs of calls with and without, median and 95 % interval. The last "
        "column is each method at options with which it computes everything (threshold 0, interval 1, ...): "
        "what it costs to have it.\n\n" + _table(header, lines)
    )


def _cost(found: dict[str, Any] | None, offset: int) -> str:
    """Returns a relative cost in percent: of the plain call's time, or beyond it."""
    if found is None:
        return "-"
    if "message" in found:
        return f"fails: {found['message']}"
    middle, low, high = (offset + 100 * found[name] for name in ("overhead", "low", "high"))
    sign = "" if offset else "+"
    return f"{middle:{sign}.1f} % ({low:{sign}.1f} to {high:{sign}.1f})"

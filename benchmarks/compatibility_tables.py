"""The tables of ``docs/compatibility.md`` from the record of ``compatibility.py``."""

import re
from collections import Counter
from typing import Any

__all__ = ["tables"]

TASKS = ("text to image", "image to image", "inpainting", "ControlNets and other control", "text to video",
         "image or video to video", "sound", "other")  # fmt: skip


def tables(record: dict[str, Any]) -> str:
    """Returns the tables as Markdown.

    Arguments:
        record: What ``compatibility.py`` has written.
    """
    found = record["pipelines"]
    accels = sorted({accel for entry in found.values() for accel in entry.get("accelerators", {})})
    reasons: dict[str, int] = {}
    parts = [_head(record, accels), _counts(found, accels)]
    for task in TASKS:
        rows = {name: entry for name, entry in found.items() if entry["task"] == task and entry["built"]}
        if rows:
            parts.append(f"## {task[0].upper()}{task[1:]}\n\n" + _table(rows, accels, reasons))
    notes = "\n".join(f"- [{number}] {text}" for text, number in reasons.items())
    parts.append(f"## Reasons\n\n{notes}\n")
    left = [f"| {name} | {entry['task']} | {_cell(entry['reason'])} |"
            for name, entry in found.items() if not entry["built"]]  # fmt: skip
    parts.append(
        "## Not built here\n\n| pipeline | task | why |\n| --- | --- | --- |\n" + "\n".join(left) + "\n"
    )
    return "\n".join(parts)


def _head(record: dict[str, Any], accels: list[str]) -> str:
    built = [entry for entry in record["pipelines"].values() if entry["built"]]
    served = sum(any(row["status"] == "runs" for row in entry["accelerators"].values()) for entry in built)
    ran = [row for entry in built for row in entry["accelerators"].values()]
    repeatable = [entry for entry in built if entry["repeatable"]]
    restored = sum(entry["restored"] for entry in repeatable)
    states = Counter(row["status"] for row in ran)
    classes, version, steps = len(record["pipelines"]), record["versions"]["diffusers"], record["steps"]
    return f"""# Which pipelines run under which accelerators

Written by `make tables` from `benchmarks/compatibility.json`, which
`python benchmarks/compatibility.py measure` makes.

All {classes} pipeline classes that diffusers {version} exports (`MARPipeline` is ours) were tried, tiny and
with random weights: {len(built)} could be built and run here, and {served} of these run under at least one
accelerator. Networks that have learned nothing tell nothing about quality or speed: this is about what runs.

Every call has {steps} steps. A cell says how many evaluations of the denoiser ran, of those that the
pipeline asked for. `sada` was given a tolerance that lets it skip whatever it may, `s3` and `autodiffusion`
a known solver as their schedule, and `inherit`, which skips parts of evaluations, all blocks of a network
that is no UNet. A number in brackets is a refusal, with the reason below; "=" is an output that is the plain
one, since nothing was there to change, such as guidance that is off.

Of {len(ran)} pairs of a pipeline and an accelerator {states["runs"]} run, {states["refused"]} are refused,
{states["idle"]} do nothing, {states["crashed"]} fail. When all accelerators had been on and off again, a
plain call gave the same bits as before for {restored} of the {len(repeatable)} pipelines that repeat
themselves.
"""


def _counts(found: dict[str, Any], accels: list[str]) -> str:
    head = ["task", "classes", "built", "run under any", *(f"`{accel}`" for accel in accels)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for task in (*TASKS, "all"):
        entries = [entry for entry in found.values() if task in (entry["task"], "all")]
        built = [entry for entry in entries if entry["built"]]
        runs = [
            {accel for accel, row in entry["accelerators"].items() if row["status"] == "runs"}
            for entry in built
        ]
        cells = [task, len(entries), len(built), sum(map(bool, runs)),
                 *(sum(accel in names for names in runs) for accel in accels)]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _table(rows: dict[str, Any], accels: list[str], reasons: dict[str, int]) -> str:
    head = ["pipeline", *(f"`{accel}`" for accel in accels)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, entry in rows.items():
        cells = [_outcome(entry["accelerators"].get(accel), reasons) for accel in accels]
        remark = "" if entry["repeatable"] else " (not repeatable by itself)"
        remark += " (not restored)" if entry["repeatable"] and not entry["restored"] else ""
        remark += "" if entry["finite"] else " (its own output is not finite)"
        lines.append(f"| {name.removesuffix('Pipeline')}{remark} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _outcome(row: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    if row is None:
        return "not measured"
    if "reason" in row:
        number = reasons.setdefault(_brief(row["reason"]), len(reasons) + 1)
        return f"[{number}]" if row["status"] == "refused" else f"fails [{number}]"
    counts = f"{row['evaluated']:g} / {row['requested']}"
    if row["status"] == "idle":
        return f"no effect, {counts}"
    return f"{counts} =" if row["same"] else counts


def _brief(text: str) -> str:
    """Returns a reason without what differs between pipelines that are refused for the same."""
    for pattern in (r": its shape is .*", r"; \w+ has no method head_steps.*", r", such as DPMSolver.*"):
        text = re.sub(pattern, "", text)
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

"""Records as an HTML page, and ``diffaccel report``, which puts several on one if they can be compared."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..errors import OptionError, ProtocolMismatch
from .figures import Point, draw_plot
from .particles import particle_lines, particle_plots
from .tables import Lines, Row, bench_lines, eval_lines, label_of
from .training_report import training_lines, training_plots
from .writing import check_output, write_files

__all__ = ["check_comparable", "page", "read_record", "report"]

Record = Mapping[str, Any]
FILES = ("eval.json", "bench.json", "fid.json", "run.json", "distill.json")
_EXPECTED = "eval.json, bench.json, distill.json or what fid wrote"
SAME = ("protocol", "features", "n", "m")
"""What records of evaluations must agree in."""


def page(records: Sequence[Record], grids: Sequence[bytes | None]) -> str:
    """Returns an HTML page, which needs no other file.

    Arguments:
        records: What ``bench.json``, ``eval.json``, the record of ``diffaccel fid``, or the ``run.json`` of
            particles hold.
        grids: The picture of each record's samples, as PNG.

    Raises:
        ProtocolMismatch: If evaluations among them cannot be compared.
    """
    check_comparable(records)
    sections = [_section(record, grid) for record, grid in zip(records, grids, strict=True)]
    evaluations = [record for record in records if kind_of(record) == "eval"]
    if len(evaluations) > 1:
        sections.insert(0, _together(evaluations))
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(template).render(sections=sections)


def kind_of(record: Record) -> str:
    """Returns "eval", "bench", "fid", "particles" or "distill".

    Raises:
        OptionError: If it is none of them.
    """
    rows = record.get("rows")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        if all("fidelity" in row and "speedup" in row for row in rows):
            return "bench"
        if all("scores" in row and "evaluated" in row for row in rows):
            return "eval"
    if isinstance(record.get("scores"), dict):
        return "fid"
    if isinstance(record.get("feynman_kac"), list):
        return "particles"
    if isinstance(record.get("log"), list):
        return "distill"
    raise OptionError(f"a record must have rows or scores; expected {_EXPECTED}")


def check_comparable(records: Sequence[Record]) -> None:
    """Checks that all evaluations and scores were made under the same protocol, number and reference.

    Raises:
        ProtocolMismatch: Naming what differs.
    """
    scored = [record for record in records if kind_of(record) in ("eval", "fid")]
    for record in scored[1:]:
        for name in SAME:
            ours, theirs = scored[0].get(name), record.get(name)
            if ours != theirs:
                raise ProtocolMismatch(
                    f"these results cannot be compared: {name} is {_short(ours)} and {_short(theirs)}"
                )
        ours, theirs = (r["reference"].get("data") for r in (scored[0], record))
        if ours != theirs:
            raise ProtocolMismatch("these results cannot be compared: they have different references")


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _section(record: Record, grid: bytes | None) -> dict[str, Any]:
    kind = kind_of(record)
    settings = dict(record.get("settings", {}))
    facts = {**settings, **record.get("machine", {}), **record.get("versions", {})}
    pictures = [] if grid is None else [("one line of pictures a method", _data(grid))]
    if kind == "particles":
        return _particle_section(record)
    if kind == "distill":
        return _training_section(record, pictures)
    if kind == "bench":
        lines, note = bench_lines(record["rows"]), _BENCH_NOTE.format(rounds=settings.get("rounds", "?"))
        title = f"{settings.get('model')}: speed and fidelity"
        sub = (f"{record['images']} images, {settings['steps']} steps of {record['scheduler']}, "
               "the same noise in every row")  # fmt: skip
        plots = [("plot of error against speed-up", _data(_bench_plot(record["rows"])))]
    elif kind == "eval":
        lines, note = eval_lines(record["rows"]), _EVAL_NOTE
        title = f"{settings.get('model')}: quality under the protocol {record['protocol']}"
        sub = f"{record['n']} images against {record['m']}: {record['reference'].get('source', '')}"
        plots = _eval_plots(record["rows"])
    else:
        lines, note, plots = _fid_lines(record), _EVAL_NOTE, []
        title = f"{record['generated'].get('source', 'images')} under the protocol {record['protocol']}"
        sub = f"{record['n']} images against {record['m']}: {record['reference'].get('source', '')}"
    return {"title": title, "sub": sub, "pictures": pictures, "header": lines.header, "lines": lines.rows,
            "note": note, "plots": plots, "facts": facts}  # fmt: skip


def _particle_section(record: Record) -> dict[str, Any]:
    names = ("model", "product", "conditions", "guidance", "temperature", "steps", "seed", "pipeline")
    facts = {name: record[name] for name in names if name in record}
    facts |= {**record["feynman_kac"][0]["settings"], **record.get("versions", {})}
    lines, what = particle_lines(record), ", ".join([*record["product"], *record["conditions"]])
    plots = [(name, _data(picture)) for name, picture in particle_plots(record)]
    return {"title": f"{record['model']}: weighted particles", "sub": what, "pictures": [],
            "header": lines.header, "lines": lines.rows, "note": _PARTICLE_NOTE, "plots": plots,
            "heading": "Effective size and weights",
            "facts": facts}  # fmt: skip


def _training_section(record: Record, pictures: list[tuple[str, str]]) -> dict[str, Any]:
    settings, lines = record["settings"], training_lines(record)
    done = max((row["images"] for row in record["log"]), default=0)
    signs: list[str] = next((row["signs"] for row in reversed(record["log"]) if "signs" in row), [])
    sub = f"{done:,} of {settings['images']:,} images" + "".join(f"; {sign}" for sign in signs)
    plots = [(name, _data(picture)) for name, picture in training_plots(record)]
    return {"title": f"{settings['method']} from {settings['teacher']}", "sub": sub, "pictures": pictures,
            "header": lines.header, "lines": lines.rows, "note": _TRAINING_NOTE, "plots": plots,
            "heading": "Over the images", "facts": settings}  # fmt: skip


def _together(records: Sequence[Record]) -> dict[str, Any]:
    """Returns a section with the rows of several evaluations."""
    rows: list[Row] = []
    for record in records:
        where = f"{record['settings'].get('model')}, {record['settings'].get('scheduler_class', '')}"
        rows += [{**row, "label": f"{where}: {label_of(row)}"} for row in record["rows"]]
    lines = eval_lines(rows)
    return {"title": f"All methods under the protocol {records[0]['protocol']}", "sub": "", "pictures": [],
            "header": lines.header, "lines": lines.rows, "note": _EVAL_NOTE, "plots": _eval_plots(rows),
            "facts": {}}  # fmt: skip


def _fid_lines(record: Record) -> Lines:
    rows = [{"label": str(record["generated"].get("source", "images")), "name": "plain", "evaluated": 0,
             "requested": 0, "scores": record["scores"]}]  # fmt: skip
    lines = eval_lines(rows)
    keep = [0, *range(2, len(lines.header))]  # nothing is known of evaluations
    return Lines(lines.title, [lines.header[n] for n in keep],
                 [(kind, [cells[n] for n in keep]) for kind, cells in lines.rows], lines.narrow)  # fmt: skip


def _data(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _bench_plot(rows: Sequence[Row]) -> bytes:
    points = []
    for row in rows:
        error, speed = row["fidelity"]["rms"], row["speedup"]
        if error:
            points.append(
                Point(label_of(row), row["kind"], (speed["median"], *speed["quartiles"]), (error,) * 3)
            )
    across = "wall-clock speed-up (bar: quartiles of the rounds)"
    return draw_plot(points, across, "RMS error of pixels", log=True, less_is_better=False)


def _eval_plots(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Returns a plot of each distance against the evaluations that it took."""
    plots = []
    for metric in ("fid", "kid"):
        points = []
        for row in rows:
            score = row["scores"].get(metric)
            if score is not None:
                value, error = score["value"], score.get("se", 0)
                kind = "plain" if row["name"] == "plain" else "accelerated"
                points.append(Point(label_of(row), kind, (row["evaluated"],) * 3,
                                    (value, value - error, value + error)))  # fmt: skip
        if points:
            name = next(row["scores"][metric]["name"] for row in rows if metric in row["scores"])
            picture = draw_plot(points, "evaluations an image", f"{name} (bar: standard error)", log=False)
            plots.append((f"plot of {name} against evaluations", _data(picture)))
    return plots


_BENCH_NOTE = (
    "Evaluations: of the denoiser, a mean per image. Seconds: median of {rounds} interleaved rounds. "
    "Speed-up: median of the rounds' ratios, with quartiles. Of the ideal: the speed-up, VAE and text "
    "encoder left out, divided by requested / run evaluations. RMS, PSNR, relative error, SSIM: against the "
    "first row. GFLOP: matrix products, convolutions and attention of the whole call."
)
_EVAL_NOTE = (
    "± is the standard error from the sampling of the images. Differences are paired: the methods share "
    "prompts and noise, so their errors are smaller than those of the scores. Scores contain the bias of "
    "finite samples: compare equal numbers of images only."
)


_TRAINING_NOTE = (
    "The average of the student's weights at the last validation, always on the same noise. FD has the bias "
    "of few samples: it tells how the training goes, and is no score. Diversity: root-mean-square difference "
    "of two images of one condition."
)
_PARTICLE_NOTE = (
    "Effective size: (sum w)^2 / sum w^2 of the weights, at most the number of particles. Survivors: the "
    "initial particles that the final ones descend from; those of one image are no independent samples. "
    "Log normalizer: of the product's integral, between the first level and the last one with noise. "
    "Evaluations: of networks, counted by rows."
)


def read_record(path: Path) -> tuple[Record, bytes | None]:
    """Returns a record, and the picture of its samples if it lies beside.

    Arguments:
        path: A JSON file, or a folder with one that a command has written.

    Raises:
        OptionError: If there is none, or it cannot be read.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise OptionError(f"no {', '.join(FILES[:-1])} or {FILES[-1]} in {str(path)!r}")
        path = found[0]
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        grid = path.with_name("grid.png")
        picture = grid.read_bytes() if grid.is_file() else None
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(record, dict) or not _is_record(record):
        raise OptionError(f"{str(path)!r} holds no record; expected {_EXPECTED}")
    return record, picture


NEEDED = {
    "bench": ("settings", "images", "scheduler"),
    "eval": ("settings", "protocol", "features", "n", "m", "reference"),
    "fid": ("protocol", "features", "n", "m", "generated", "reference"),
    "particles": ("model", "product", "conditions", "images"),
}
"""The entries that each kind of record must have, and of which `page` makes use."""


def _is_record(record: Record) -> bool:
    try:
        needed = NEEDED[kind_of(record)]
    except OptionError:
        return False
    return all(name in record for name in needed)


def report(paths: Sequence[Path], out: Path) -> Path:
    """Writes one page for some records, and returns its path; the arguments are those of the command.

    Raises:
        DiffaccelError: If a record cannot be read, or they cannot be compared; nothing is written then.
    """
    check_output(out.parent)
    records, grids = zip(*(read_record(path) for path in paths), strict=True)
    return write_files(out.parent, {out.name: page(records, grids)})[0]

"""``diffaccel fid`` and ``diffaccel stats``: images against a reference, and statistics of a reference."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import zoo
from ..errors import OptionError
from ..eval.metrics import check_metrics
from ..eval.protocols import Extractor, protocol
from ..eval.scoring import measure, statistics_of
from ..eval.statistics import save_statistics
from .reading import check_options
from .writing import check_output, counting, write_files

__all__ = ["fid", "lines_of", "stats"]


def fid(generated: Path, reference: Path, protocol_name: str, metrics: Sequence[str], count: int | None,
        batch: int, mixed: bool, device: str, bf16: bool, out: Path | None) -> dict[str, Any]:  # fmt: skip
    """Scores images against a reference; the arguments are those of the command.

    Raises:
        DiffaccelError: For any mistake in the arguments or the images; nothing is written then.
    """
    check_options(device, "float32", None, None)
    names = check_metrics(metrics) if metrics else []
    if out is not None:
        check_output(out.parent)
    extractor = Extractor(protocol(protocol_name), device, bf16)
    with counting("images") as advance:
        record = measure(reference_data(generated), reference_data(reference), extractor, names, count=count,
                         batch=batch, mixed=mixed, advance=advance)  # fmt: skip
    if out is not None:
        write_files(out.parent, {out.name: json.dumps(record, indent=1, allow_nan=False)})
    return record


def lines_of(record: dict[str, Any]) -> list[str]:
    """Returns the scores of a record as lines of text."""
    lines = [f"protocol {record['protocol']}, {record['n']} images against {record['m'] or '?'}"]
    for key, score in record["scores"].items():
        text = f"{score['name']:16} {score['value']:.6g}"
        if "se" in score:
            text += f" ± {score['se']:.2g}"
        if "corrected" in score:
            text += f"   corrected for bias: {score['corrected']:.6g}"
        elif "bias" in score:
            text += f"   bias about {score['bias']:.3g}, not corrected"
            text += ": too few images" if key == "fid" else ""
        lines.append(text)
    lines += [f"note: {record[side]['file']} does not tell how it was made; its protocol is not verified"
              for side in ("generated", "reference") if record[side].get("unverified")]  # fmt: skip
    return lines


def stats(data: Path, protocol_name: str, features: bool, spatial: bool, count: int | None, batch: int,
          mixed: bool, device: str, bf16: bool, out: Path) -> str:  # fmt: skip
    """Writes the statistics of a set of images; the arguments are those of the command.

    Returns:
        What was written.

    Raises:
        DiffaccelError: For any mistake in the arguments or the images; nothing is written then.
    """
    check_options(device, "float32", None, None)
    if out.suffix != ".npz":
        raise OptionError(f"--out {str(out)!r} must end with .npz")
    check_output(out.parent)
    extractor = Extractor(protocol(protocol_name), device, bf16)
    with counting("images") as advance:
        keep = ("features",) if features else ()
        found = statistics_of(
            reference_data(data),
            extractor,
            keep,
            spatial,
            count=count,
            batch=batch,
            mixed=mixed,
            advance=advance,
        )
    save_statistics(found, out)
    kept = ", with the features of each image" if features else ""
    return f"{found.count} images under the protocol {protocol_name}{kept}: {out}"


def reference_data(path: Path) -> Any:
    """Returns a path, or the reference images of a model of the zoo where there is no such path."""
    return zoo.reference()[0] if str(path) in zoo.names() and not path.exists() else path

"""Loading of pipelines by zoo name, local folder or hub id, with errors that name the file at fault."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from diffaccel.errors import ModelError, closest
from diffaccel.files import read_object
from diffaccel.zoo.adapted import ADAPTED, load_adapted

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["check_folder", "load_pipeline", "names", "path", "quiet", "resolve_model"]

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError, SafetensorError)
_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Processor", "Scheduler")


def names() -> list[str]:
    """Returns the names of the pipelines that ship with the package."""
    here = Path(__file__).parent
    return sorted(file.parent.name for index in (INDEX, ADAPTED) for file in here.glob(f"*/{index}"))


def path(name: str) -> Path:
    """Returns the folder of the zoo's pipeline ``name``.

    Raises:
        ModelError: If the zoo has no such pipeline.
    """
    if name not in names():
        raise ModelError(f"no pipeline {name!r} in the zoo; {closest(name, names())}")
    return Path(__file__).parent / name


def resolve_model(model: str | Path) -> Path | str:
    """Returns the folder that ``model`` names, or ``model`` itself where it has the form of a hub id.

    Arguments:
        model: A zoo name, a local pipeline folder, or a hub id "owner/name", tried in this order.

    Raises:
        ModelError: If it is none of the three.
    """
    text, folder = str(model), Path(model).expanduser()
    if text in names():
        return path(text)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{text!r} is a file; expected a pipeline folder with a {INDEX}")
    if isinstance(model, str) and _HUB_ID.fullmatch(text):
        return text
    if isinstance(model, Path) or "/" in text or "\\" in text or text.startswith((".", "~")):
        raise ModelError(f"no folder {text!r}; expected a pipeline folder, 'owner/name' or a zoo name")
    raise ModelError(
        f"{text!r} is neither a folder, nor a hub id 'owner/name', nor in the zoo; {closest(text, names())}"
    )


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> "DiffusionPipeline":
    """Loads a pipeline without warnings or progress bars, from safetensors files only.

    A folder of adapters (`adapted`) is loaded with the pipeline that they change.

    Arguments:
        model: A zoo name, a local pipeline folder, or a hub id "owner/name".
        dtype: The type of the weights.
        kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``.

    Raises:
        ModelError: If there is no such model, or a file of it is missing, damaged or incomplete.
    """
    source = resolve_model(model)
    adapted = isinstance(source, Path) and (source / ADAPTED).is_file()
    if isinstance(source, Path) and not adapted:
        check_folder(source, given=tuple(kwargs))
    from diffusers import DiffusionPipeline  # slow to import, and not needed to list names

    messages: list[str] = []
    options = {"use_safetensors": True, **kwargs}
    try:
        with quiet(messages):
            if isinstance(source, Path) and adapted:
                return load_adapted(source, dtype, **kwargs)
            pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, **options)
    except _LOAD_ERRORS as error:
        where = "" if isinstance(source, Path) else " from the hub; is it a hub id that can be reached?"
        reason = " ".join([str(error), *(text for text in messages if "MISMATCH" in text)])
        raise ModelError(f"cannot load {str(model)!r}{where}: {_one_line(reason)}") from error
    incomplete = [text for text in messages if "newly initialized" in text]
    if incomplete:  # both libraries would go on, with random or absent weights
        raise ModelError(f"weights are missing in {str(model)!r}: {_one_line(incomplete[0])}")
    return pipe


def check_folder(folder: Path, given: tuple[str, ...] = ()) -> None:
    """Checks that a pipeline folder has the files which its index promises, and that they can be read.

    Arguments:
        folder: The pipeline folder.
        given: The components that the caller supplies, whose folders need not exist.

    Raises:
        ModelError: Naming the first file at fault, and what was expected of it.
    """
    if not (folder / INDEX).is_file():
        raise ModelError(f"{str(folder)!r} has no {INDEX}; expected a folder written by save_pretrained")
    for name, entry in read_object(folder / INDEX, ModelError).items():
        if isinstance(entry, list) and entry and entry[0] is not None and name not in given:
            _check_component(folder / name, str(entry[-1]))


def _check_component(folder: Path, kind: str) -> None:
    if not folder.is_dir():
        raise ModelError(f"no folder {str(folder)!r}; {INDEX} promises the component {kind}")
    configurations = {file.name: read_object(file, ModelError) for file in sorted(folder.glob("*.json"))}
    if not configurations:
        raise ModelError(f"no configuration in {str(folder)!r}; expected a JSON file of {kind}")
    weights = sorted(folder.glob("*.safetensors"))
    has_weights = "config.json" in configurations and not kind.endswith(_WITHOUT_WEIGHTS)
    if has_weights and not weights:
        raise ModelError(f"no weights in {str(folder)!r}; expected a .safetensors file of {kind}")
    for name, content in configurations.items():
        for part in sorted(set(content.get("weight_map", {}).values())) if ".index." in name else ():
            if not (folder / part).is_file():
                raise ModelError(f"no file {str(folder / part)!r}; {name} promises this part of the weights")
    for file in weights:
        _check_weights(file)


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):  # verifies the header and the length
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"damaged weights file {str(file)!r}: {_one_line(str(error))}; "
            "expected a safetensors file of the length that its header gives"
        ) from error


def _one_line(text: str, limit: int = 300) -> str:
    text = " ".join(re.sub(r"\x1b\[\d*m", "", text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Capture(logging.Handler):
    """Keeps the messages of a logger instead of printing them."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one message."""
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def quiet(messages: list[str]) -> Iterator[None]:
    """Hides the progress bars of diffusers and transformers, and collects their messages."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with contextlib.ExitStack() as undo:
        for library in (diffusers_logging, transformers_logging):
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                undo.callback(library.enable_progress_bar)
            logger = library.get_logger(library.__name__.partition(".")[0])
            undo.callback(_restore, logger, logger.handlers, logger.propagate, logger.level)
            logger.handlers, logger.propagate = [_Capture(messages)], False
            logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))
        yield
    for message in messages:
        logging.getLogger("diffaccel").debug("while loading: %s", message)


def _restore(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool, level: int) -> None:
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)

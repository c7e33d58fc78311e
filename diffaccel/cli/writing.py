"""Whole files or none, and progress bars."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from ..errors import DiffaccelError
from ..files import whole

__all__ = ["OutputError", "StepBar", "check_output", "counting", "progress_bar", "write_files"]


class OutputError(DiffaccelError, OSError):
    """An output folder that cannot be written."""


def check_output(folder: Path) -> None:
    """Checks that files can be written to a folder, which need not exist yet and is not made.

    Raises:
        OutputError: If they cannot.
    """
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    """Writes files to a folder: all under temporary names first, and then each gets its own.

    Whatever goes wrong, there is no half-written file, and no folder that was not there before.

    Returns:
        The files' paths.

    Raises:
        OutputError: If the folder cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as staged:
            for name, content in reversed(list(files.items())):  # the first gets its name first
                temporary = staged.enter_context(whole(folder / name))
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None
    finally:
        for path in missing:  # innermost first; those with files in them stay
            with contextlib.suppress(OSError):
                path.rmdir()
    return [folder / name for name in files]


def progress_bar() -> Progress:
    """Returns a progress bar on stderr, which is silent where that is no terminal."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, transient=True, console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar, and yields what tells it how many more are done.

    Arguments:
        what: What is counted.
        total: How many there are, if that is known.
    """
    with progress_bar() as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


class StepBar:
    """Stands for the progress bar of a pipeline, and tells how many of how many steps are done."""

    def __init__(self, tell: Callable[[int, int], None], iterable: Any = None, total: Any = None) -> None:
        self.tell, self.iterable, self.done = tell, iterable, 0
        self.total = int(total) if total is not None else len(iterable)

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        """Counts steps."""
        self.done += n
        self.tell(self.done, self.total)

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """Takes what some pipelines would show."""

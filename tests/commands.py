"""The command line, called in this process; and searches that are stopped."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from diffaccel import cli

STOPPED_AFTER = 3


def call(monkeypatch: Any, capfd: Any, *args: Any) -> tuple[Any, str, str]:
    """Returns the exit code and what was printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["diffaccel", *map(str, args)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out = capfd.readouterr()
    return code, out.out, out.err


def output_of(*words: Any) -> str:
    """Returns what a command that succeeds prints; its errors are raised."""
    result = CliRunner().invoke(cli.app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def stopped_and_gone_on(make: Callable[[], Any]) -> Any:
    """Returns what a search finds that is stopped once, and goes on from its file.

    Arguments:
        make: Returns the search, with the same file.
    """
    calls = []

    def kill(count: int) -> None:
        calls.append(count)
        if len(calls) == STOPPED_AFTER:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make().run(kill)
    return make().run()

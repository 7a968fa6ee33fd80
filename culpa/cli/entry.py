"""The console script: exit codes, and errors as one message."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

from culpa.cli.early import prepare
from culpa.errors import CulpaError, IntegrityError, OptionError, StageError

FINE, ERROR, USAGE, INTEGRITY = 0, 1, 2, 3


def exit_code(error: Exception) -> int:
    """1: an error; 2: what was asked for does not exist; 3: something is not as recorded."""
    if isinstance(error, IntegrityError):
        return INTEGRITY
    return USAGE if isinstance(error, (OptionError, StageError)) else ERROR


def main() -> None:
    """Run the command line; without ``--debug`` no error shows a traceback."""
    prepare(sys.argv[1:])
    debug = "--debug" in sys.argv[1:]
    if debug:  # wherever it stands
        sys.argv.remove("--debug")
    # After `prepare`: a process that starts anew does this once.
    from culpa.cli.app import app

    try:
        app()
    except Exception as error:
        if debug:
            raise
        code, told = exit_code(error), isinstance(error, CulpaError)
        name = "" if told else f"{type(error).__name__}: "
        console = Console(stderr=True, highlight=False)
        console.print(f"[bold red]Error:[/] {escape(f'{name}{error}')}")
        if not told:
            console.print("[dim]Not an error of culpa's own; --debug shows where it was raised.")
        sys.exit(code)

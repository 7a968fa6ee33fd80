"""The library's progress as bars on standard error."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class RichProgress:
    """Shows the library's progress as a bar on standard error."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.task: TaskID | None = None

    def start(self, what: str, total: int) -> None:
        """See ``culpa.progress``."""
        self.task = self.bars.add_task(what, total=total)

    def advance(self, units: int = 1) -> None:
        """See ``culpa.progress``."""
        if self.task is not None:
            self.bars.advance(self.task, units)

    def finish(self) -> None:
        """See ``culpa.progress``."""
        self.task = None


@contextmanager
def shown(console: Console) -> Generator[RichProgress]:
    """Progress bars, where a person is there to see them."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield RichProgress(bars)

"""The updates of a log, decoded once, and several at a time where they are asked for in turn."""

from __future__ import annotations

from itertools import islice

from culpa.errors import CulpaError
from culpa.trajectory.schema import StepRecord
from culpa.trajectory.tables import Tables

AT_ONCE = 32
"""Updates decoded together: one alone, between two updates of a model whose data fill the
processor's caches, takes ten times as long."""
MOST = 4096
"""Updates that are remembered."""


class Steps:
    """``steps(k)`` is update k, as ``Tables.step`` gives it."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._known: dict[int, StepRecord] = {}

    def __call__(self, k: int) -> StepRecord:
        """One update; the errors are those of ``Tables.step``."""
        found = self._known.get(k)
        if found is None:
            if len(self._known) >= MOST:
                self._known.clear()
            elif k - 1 in self._known:
                self._read_ahead(k)
            if k not in self._known:
                self._known[k] = self._tables.step(k)
            found = self._known[k]
        return found

    def _read_ahead(self, k: int) -> None:
        try:
            for record in islice(self._tables.steps(k), AT_ONCE):
                self._known[record.index] = record
        except CulpaError:
            return  # of a later update perhaps: told when that is asked for

"""Real jobs, watched through their progress and stopped after a few units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from culpa.progress import Progress

LEAST = 0.3
"""Seconds for which a job is watched at least: many updates of a small model, few of a large."""
Clock = Callable[[], float]
"""Seconds since some moment: ``time.perf_counter``, or ``time.process_time``."""


class Enough(BaseException):
    """Stops a job, as Ctrl-C does, and like it is no ``Exception`` that the job might handle."""


class Stopwatch:
    """A ``culpa.progress`` that notes when each unit was done, and stops the job in time.

    After ``enough`` units that took ``LEAST`` seconds besides the first; ``None``: never.
    ``seconds``: of each unit, the first including all that came before it.
    """

    def __init__(self, clock: Clock, enough: int | None) -> None:
        self._clock = clock
        self._enough = enough
        self._last = clock()
        self.seconds: list[float] = []

    def start(self, what: str, total: int) -> None:
        """See ``culpa.progress``."""

    def advance(self, units: int = 1) -> None:
        """See ``culpa.progress``; raises ``Enough`` at the last unit wanted."""
        now = self._clock()
        self.seconds.append(now - self._last)
        self._last = now
        if self._enough is not None and is_enough(self.seconds, self._enough):
            raise Enough

    def finish(self) -> None:
        """See ``culpa.progress``."""


def is_enough(seconds: Sequence[float], count: int) -> bool:
    """Whether these are ``count`` units and, besides the first, ``LEAST`` seconds."""
    return len(seconds) >= count and sum(seconds[1:]) >= LEAST


def watched(clock: Clock, enough: int | None, job: Callable[[Progress], object]) -> list[float]:
    """The seconds of the first units of a job."""
    watch = Stopwatch(clock, enough)
    with suppress(Enough):
        job(watch)
    return watch.seconds


def typical(seconds: Sequence[float]) -> float:
    """The mean of their middle half, or of all but the extremes of a few: others compute too."""
    cut = max(1, len(seconds) // 4) if len(seconds) > 3 else 0
    kept = sorted(seconds)[cut : len(seconds) - cut]
    return sum(kept) / len(kept)

"""The loops over ``recorder.batches`` of one recording: which goes on, how much each has drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from culpa.trajectory.point import LoopEnd, OpenLoop
from culpa.trajectory.rng import RandomState


@dataclass
class LiveLoop:
    """A loop that goes on."""

    number: int
    start: int
    draws: int = 0
    checked: bool = True


@dataclass
class Loops:
    """Numbers the loops in the order in which they begin."""

    begun: int = 0
    open: dict[int, LiveLoop] = field(default_factory=dict[int, LiveLoop])
    drawn: list[tuple[int, int, RandomState]] = field(
        default_factory=list[tuple[int, int, RandomState]]
    )
    """Loop, number and generators of draws that moved the generators, since the last update."""

    def begin(self, start: int) -> LiveLoop:
        """A loop begins at update ``start``."""
        loop = LiveLoop(self.begun, start)
        self.open[loop.number] = loop
        self.begun += 1
        return loop

    def drew(self, loop: LiveLoop, before: RandomState, after: RandomState) -> None:
        """The loop drew a batch."""
        if before != after:
            self.drawn.append((loop.number, loop.draws, before))
        loop.draws += 1

    def take(self) -> tuple[tuple[int, int, RandomState], ...]:
        """The draws since the last update, on their way to the log."""
        taken, self.drawn = tuple(self.drawn), []
        return taken

    def end(self, loop: LiveLoop, index: int, exhausted: bool, random: RandomState) -> LoopEnd:
        """A loop ended, when ``index`` updates were made."""
        del self.open[loop.number]
        drawn = tuple((n, before) for number, n, before in self.drawn if number == loop.number)
        self.drawn = [d for d in self.drawn if d[0] != loop.number]
        return LoopEnd(
            loop.number, loop.start, index, loop.draws, exhausted, loop.checked, random, drawn
        )

    def at_point(self, drawing: LiveLoop | None) -> tuple[OpenLoop, ...]:
        """The open loops just after ``drawing`` drew the first batch of an update."""
        return tuple(
            OpenLoop(o.number, o.start, o.draws - (o is drawing), o.checked)
            for o in self.open.values()
        )

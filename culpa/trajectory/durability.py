"""How much of a recording a crash may cost, as an object."""

from __future__ import annotations

import time
from dataclasses import dataclass

from culpa.errors import OptionError


@dataclass(frozen=True)
class Durability:
    """When updates become durable (written, flushed and committed, so that power may fail).

    After a kill or a lost power line the folder holds every update but at most the last
    ``updates``: training waits for the disk rather than run further ahead. It also lacks none that
    is older than ``seconds``, unless the disk needs longer than that for one state or one flush.
    Smaller numbers cost flushes: about one per ``seconds / 2`` or per ``updates / 2`` updates.
    """

    seconds: float = 2.0
    updates: int = 200

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.seconds > 0 or self.updates < 1:
            raise OptionError(
                "Durability(seconds, updates) needs seconds > 0 and updates >= 1, got"
                f" {self.seconds} and {self.updates}."
            )

    @property
    def batch(self) -> int:
        """Commit when so many updates wait: half, so that training need not stop for a flush."""
        return (self.updates + 1) // 2

    @property
    def age(self) -> float:
        """Commit when an update has waited for so many seconds."""
        return self.seconds / 2


class Cadence:
    """Says when the next point to go on from (point.py) is due: about as often as commits are."""

    def __init__(self, durability: Durability) -> None:
        self._durability = durability
        self._last: tuple[int, float] | None = None

    def due(self, index: int) -> bool:
        """Whether update ``index`` gets one; if so, the next is counted from there."""
        now = time.monotonic()
        if self._last is not None:
            at, moment = self._last
            if index - at < self._durability.batch and now - moment < self._durability.age:
                return False
        self._last = (index, now)
        return True

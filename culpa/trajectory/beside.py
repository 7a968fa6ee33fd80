"""A thread that writes a recording beside training.

It shares Python's interpreter lock with training: whenever it takes the lock, a training loop that
comes back from a kernel waits, and is woken late. So it takes several updates at a time, and spends
nearly all of its own in calls that do not need the lock.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress

from culpa.trajectory.commits import Item, entry
from culpa.trajectory.durability import Durability
from culpa.trajectory.scribe import Scribe
from culpa.trajectory.store import Store

GROUP, GATHERING = 8, 0.05
"""It begins when so many updates wait, or the first of them has for so many seconds."""


class Beside:
    """The thread.

    Args:
        store: only the thread writes it, until ``end``.
        durability: when to commit.
        room: so many items may wait, also those in hand.
    """

    def __init__(self, store: Store, durability: Durability, room: int) -> None:
        self.error: Exception | None = None
        self.done = 0
        """How many items it has handled."""
        self._store = store
        self._scribe = Scribe(store, durability, self._notify)
        self._room = room
        self._group = max(1, min(GROUP, room // 2, durability.batch // 2))
        self._gathering = min(GATHERING, durability.age / 2)
        self._moved = threading.Condition()  # guards the next three, and ``done``
        self._waiting: list[tuple[Item, Sequence[int]]] = []
        self._in_hand = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="culpa-writer", daemon=True)
        self._thread.start()

    def submit(self, handed: Item, drop: Sequence[int], limit: int) -> None:
        """Let it write something, once there is room; wait until ``limit`` updates are durable."""
        store = self._store
        with self._moved:
            self._moved.wait_for(lambda: len(self._waiting) + self._in_hand < self._room)
            self._waiting.append((handed, drop))
            if len(self._waiting) in (1, self._group):
                self._moved.notify_all()
            self._moved.wait_for(lambda: self.error is not None or store.committed >= limit)

    def end(self) -> None:
        """Let it write what waits, and wait for that."""
        with self._moved:
            self._closing = True
            self._moved.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._moved:
                self._moved.wait_for(
                    lambda: self._waiting or self._closing, self._scribe.patience()
                )
                self._moved.wait_for(self._enough, self._gathering)
                taken, self._waiting = self._waiting, []
                count = self._in_hand = len(taken)
                closing = self._closing
            if self.error is None:
                self._handle(taken)
            del taken
            with self._moved:
                self.done += count
                self._in_hand = 0
                self._moved.notify_all()
                if closing and not self._waiting:
                    return

    def _enough(self) -> bool:
        return self._closing or not 0 < len(self._waiting) < self._group

    def _handle(self, taken: Sequence[tuple[Item, Sequence[int]]]) -> None:
        try:
            self._scribe.handle([entry(handed, drop) for handed, drop in taken])
        except Exception as error:  # noqa: BLE001 (told in the thread that trains)
            # The disk may not even take the note: then the folder stays as after a crash.
            with suppress(OSError, sqlite3.Error):
                self._store.truncate(f"{type(error).__name__}: {error}"[:500])
            self.error = error

    def _notify(self) -> None:
        with self._moved:
            self._moved.notify_all()

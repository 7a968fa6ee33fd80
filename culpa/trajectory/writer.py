"""Writes a recording from a thread of its own, so that hashing and disk overlap with training.

The thread shares Python's interpreter lock with training: whenever it takes the lock, a training
loop that comes back from a kernel waits, and is woken late. So it takes several updates at a time,
and spends nearly all of its own in calls that do not need the lock.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from culpa.errors import CulpaError, RecordingStopped, StoreError
from culpa.trajectory.checkpoints import CheckpointPolicy
from culpa.trajectory.commits import Commit, Item, Keep
from culpa.trajectory.durability import Durability
from culpa.trajectory.state import State
from culpa.trajectory.store import Store

QUEUE_BYTES = 256 * 2**20
"""At most about so many bytes of copies wait for the disk before training waits for it."""
GROUP, GATHERING = 8, 0.05
"""The writer begins when so many updates wait, or the first of them has for so many seconds."""


class Writer:
    """Owns a store. ``submit`` returns at once unless the disk is too far behind.

    A failure stops the recording, not the training: the store goes back to its last commit and is
    marked "truncated"; ``alive`` then warns once and is False from there on (``strict``: raises).

    Args:
        folder: for messages.
        open_store: makes or reopens the store.
        policy: which states to keep.
        durability: when to commit.
        strict: whether a failure raises.
        size: bytes of one copy of the parameters.
    """

    def __init__(
        self,
        folder: Path,
        open_store: Callable[[], Store],
        policy: CheckpointPolicy,
        durability: Durability,
        *,
        strict: bool,
        size: int,
    ) -> None:
        self.folder = folder
        self.policy = policy
        self.error: Exception | None = None
        self._durability = durability
        self._strict = strict
        self._warned = False
        self._store: Store | None = None
        self._since: float | None = None  # when the oldest update without a commit was written
        self._room = max(2, min(64, QUEUE_BYTES // (size + 1)))  # for items, also those in hand
        self._group = max(1, min(GROUP, self._room // 2, durability.batch // 2))
        self._gathering = min(GATHERING, durability.age / 2)
        self._moved = threading.Condition()  # guards the next three
        self._waiting: list[Item] = []
        self._in_hand = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="culpa-writer", daemon=True)
        try:
            self._store = open_store()
        except (OSError, sqlite3.Error) as error:
            self.error = error
        else:
            self._thread.start()
        self.alive()

    @property
    def kept(self) -> frozenset[int]:
        """The states on disk, as far as this thread can know."""
        return frozenset(self._store.kept) if self._store else frozenset()

    def submit(self, item: Item) -> None:
        """Hand something over; waits while more updates than allowed are not durable."""
        store = self._store
        if self.error is not None or store is None:
            return
        limit = item.index + 1 - self._durability.updates if isinstance(item, Commit) else 0
        with self._moved:
            self._moved.wait_for(lambda: len(self._waiting) + self._in_hand < self._room)
            self._waiting.append(item)
            if len(self._waiting) in (1, self._group):
                self._moved.notify_all()
            self._moved.wait_for(lambda: self.error is not None or store.committed >= limit)

    def alive(self) -> bool:
        """Whether the recording goes on; says once, and loudly, if it does not.

        Raises:
            StoreError: instead, if the recording is strict.
        """
        if self.error is None:
            return True
        said = f"recording to {self.folder} failed: {type(self.error).__name__}: {self.error}."
        if self._strict or isinstance(self.error, CulpaError):
            raise StoreError(said) from self.error
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{said} Training goes on, but nothing more of it is recorded. What was recorded"
                " before is kept, marked truncated. Pass strict=True to culpa.record to stop"
                " training instead.",
                RecordingStopped,
                stacklevel=2,
            )
        return False

    def close(self, final: State | None, status: str, reason: str, seconds: float) -> None:
        """Write what is left, the final state, and the manifest last of all."""
        if self._thread.is_alive():
            with self._moved:
                self._closing = True
                self._moved.notify_all()
            self._thread.join()
        if self.error is None and self._store is not None:
            try:
                self._store.finish(final, status, reason, seconds)
            except (OSError, sqlite3.Error) as error:
                self._fail(error)
        self.alive()

    def _run(self) -> None:
        while True:
            with self._moved:
                self._moved.wait_for(lambda: self._waiting or self._closing, self._patience())
                self._moved.wait_for(self._enough, self._gathering)
                items, self._waiting = self._waiting, []
                self._in_hand = len(items)
                closing = self._closing
            if self.error is None and self._store is not None:
                try:
                    self._handle(self._store, items)
                except Exception as error:  # noqa: BLE001 (told by alive() in the caller's thread)
                    self._fail(error)
            del items
            with self._moved:
                self._in_hand = 0
                self._moved.notify_all()
                if closing and not self._waiting:
                    return

    def _enough(self) -> bool:
        return self._closing or not 0 < len(self._waiting) < self._group

    def _handle(self, store: Store, items: list[Item]) -> None:
        looked_up = store.look_up([item for item in items if isinstance(item, Commit)])
        for item in items:
            if isinstance(item, Commit):
                store.append(item, looked_up.pop(0), self.policy)
            elif isinstance(item, Keep):
                store.keep(item.index, item.state, None)
            else:
                store.end_loop(item)
            self._commit_if_due(store)
        self._commit_if_due(store)

    def _commit_if_due(self, store: Store) -> None:
        if store.dirty and self._since is None:
            self._since = time.monotonic()
        behind = store.num_steps - store.committed
        if behind >= self._durability.batch or self._patience() == 0:
            store.commit()
            with self._moved:
                self._moved.notify_all()
        if not store.dirty:
            self._since = None

    def _patience(self) -> float | None:
        """Seconds until the next commit is due; ``None``: there is nothing to commit."""
        if self._since is None:
            return None
        return max(0.0, self._since + self._durability.age - time.monotonic())

    def _fail(self, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"[:500]
        try:
            if self._store is not None:
                self._store.truncate(reason)
        except (OSError, sqlite3.Error):
            pass  # the disk does not even take the note: the folder stays as after a crash
        self.error = error
        self._since = None

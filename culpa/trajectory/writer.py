"""Writes a recording from a thread of its own, so that hashing and disk overlap with training."""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from culpa.errors import CulpaError, RecordingStopped, StoreError
from culpa.trajectory.checkpoints import CheckpointPolicy
from culpa.trajectory.durability import Durability
from culpa.trajectory.point import LoopEnd
from culpa.trajectory.state import State
from culpa.trajectory.store import Commit, Keep, Store

QUEUE_BYTES = 256 * 2**20
"""At most about so many bytes of copies wait for the disk before training waits for it."""
Item = Commit | Keep | LoopEnd


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
        self._moved = threading.Condition()
        self._queue: queue.Queue[Item | None] = queue.Queue(
            max(2, min(64, QUEUE_BYTES // (size + 1)))
        )
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
        self._queue.put(item)
        if isinstance(item, Commit):
            limit = item.index + 1 - self._durability.updates
            with self._moved:
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
            self._queue.put(None)
            self._thread.join()
        if self.error is None and self._store is not None:
            try:
                self._store.finish(final, status, reason, seconds)
            except (OSError, sqlite3.Error) as error:
                self._fail(error)
        self.alive()

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=self._patience())
                if item is None:
                    return
            except queue.Empty:
                item = None
            if self.error is not None or self._store is None:
                continue  # drain, so that the training loop never blocks on a dead writer
            try:
                self._handle(self._store, item)
            except Exception as error:  # noqa: BLE001 (told by alive() in the caller's thread)
                self._fail(error)
            with self._moved:
                self._moved.notify_all()

    def _handle(self, store: Store, item: Item | None) -> None:
        if isinstance(item, Commit):
            store.append(item, self.policy)
        elif isinstance(item, Keep):
            store.keep(item.index, item.state, None)
        elif isinstance(item, LoopEnd):
            store.end_loop(item)
        if store.dirty and self._since is None:
            self._since = time.monotonic()
        behind = store.num_steps - store.committed
        if behind >= self._durability.batch or self._patience() == 0:
            store.commit()
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

"""Writes a recording while training goes on, so that hashing and disk overlap with it.

A thread does (beside.py).
"""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from culpa.errors import CulpaError, RecordingStopped, StoreError
from culpa.trajectory.arena import Arena
from culpa.trajectory.beside import Beside
from culpa.trajectory.checkpoints import CheckpointPolicy
from culpa.trajectory.commits import Commit, Item, Keep
from culpa.trajectory.durability import Durability
from culpa.trajectory.state import State, raws
from culpa.trajectory.store import Store

QUEUE_BYTES = 256 * 2**20
"""At most about so many bytes of copies wait for the disk before training waits for it."""


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
        self.arena = Arena()
        self._durability = durability
        self._strict = strict
        self._warned = False
        self._room = max(2, min(64, QUEUE_BYTES // (size + 1)))  # for items, also those in hand
        self._items = 0
        self._kept: set[int] = set()
        self._worker: Beside | None = None  # none if there is no store
        try:
            self._store = open_store()
        except (OSError, sqlite3.Error) as error:
            self.error = error
        else:
            self._kept |= self._store.kept
            self._worker = Beside(self._store, durability, self._room)
        self.alive()

    @property
    def kept(self) -> frozenset[int]:
        """The states that are on disk, or will be."""
        return frozenset(self._kept)

    def submit(self, handed: Item) -> None:
        """Hand something over; waits while more updates than allowed are not durable."""
        worker = self._worker
        if self.error is not None or worker is None:
            return
        drop, limit = self._drop(handed), 0
        if isinstance(handed, Commit):
            limit = handed.index + 1 - self._durability.updates
        worker.submit(handed, drop, limit)
        self.error = worker.error
        self.arena.hand_over(self._items, update=isinstance(handed, Commit))
        self._items += 1
        self.arena.give_back(worker.done)

    def alive(self) -> bool:
        """Whether the recording goes on; says once, and loudly, if it does not.

        Raises:
            StoreError: instead, if the recording is strict.
        """
        if self.error is None and self._worker is not None:
            self.error = self._worker.error
        if self.error is None:
            return True
        said = f"recording to {self.folder} failed: {_told(self.error)}."
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
        self._end_worker()
        if self.error is None:
            tensors = None if final is None else raws(final.flat())
            try:
                self._store.finish(tensors, status, reason, seconds)
            except (OSError, sqlite3.Error) as error:
                self._fail(error)
        self.alive()

    def give_up(self, reason: str) -> None:
        """Write what was handed over, and end there: a truncated run."""
        self._end_worker()
        if self.error is None:
            try:
                self._store.commit()
            except (OSError, sqlite3.Error) as error:
                self._fail(error)
            else:
                self._fail(ConnectionError(reason))

    def _end_worker(self) -> None:
        """The store is this thread's, unless there is an error."""
        if self._worker is not None:
            self._worker.end()
            self.error = self.error or self._worker.error

    def _fail(self, error: Exception) -> None:
        # The disk may not even take the note: then the folder stays as after a crash.
        with suppress(OSError, sqlite3.Error):
            self._store.truncate(f"{type(error).__name__}: {error}"[:500])
        self.error = error

    def _drop(self, handed: Item) -> tuple[int, ...]:
        """Which kept states are not wanted any more, now that another is kept."""
        if isinstance(handed, Keep):
            self._kept.add(handed.index)
        if not isinstance(handed, Commit) or handed.slots is None:
            return ()
        index = handed.index + 1
        if index in self._kept:
            return ()
        began = max((job.stop for job in self._store.manifest.earlier), default=0)
        own = [k for k in self._kept if k > began]  # those of earlier jobs stay
        drop = tuple(k for k in own if self.policy.obsolete(k, index))
        self._kept.difference_update(drop)
        self._kept.add(index)
        return drop


def _told(error: Exception) -> str:
    named = type(error).__name__
    return f"{named}: {error}"

"""What writes a recording: items into a store, and commits when it is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from culpa.trajectory.durability import Durability
from culpa.trajectory.items import Entry, Kept, Update
from culpa.trajectory.store import Store


class Scribe:
    """Writes items into a store, and commits when it is time.

    Args:
        store: owned by the scribe from now on.
        durability: when to commit.
        committed: called after every commit.
    """

    def __init__(
        self, store: Store, durability: Durability, committed: Callable[[], None] = lambda: None
    ) -> None:
        self.store = store
        self._durability = durability
        self._committed = committed
        self._since: float | None = None  # when the oldest update without a commit was written

    def handle(self, items: Sequence[Entry]) -> None:
        """Write several items; the last of them is committed now or within ``patience`` seconds."""
        store = self.store
        looked_up = store.look_up([item for item in items if isinstance(item, Update)])
        for item in items:
            if isinstance(item, Update):
                store.append(item, looked_up.pop(0))
            elif isinstance(item, Kept):
                store.keep(item.index, item.state, ())
            else:
                store.note(item.rows)
            self.commit_if_due()
        self.commit_if_due()

    def commit_if_due(self) -> None:
        """Make durable what has waited for long enough."""
        store = self.store
        if store.dirty and self._since is None:
            self._since = time.monotonic()
        behind = store.num_steps - store.committed
        if behind >= self._durability.batch or self.patience() == 0:
            store.commit()
            self._committed()
        if not store.dirty:
            self._since = None

    def patience(self) -> float | None:
        """Seconds until the next commit is due; ``None``: there is nothing to commit."""
        if self._since is None:
            return None
        return max(0.0, self._since + self._durability.age - time.monotonic())

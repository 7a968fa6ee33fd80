"""What the updates of a walk are made of, read several updates at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator
from typing import Any, NamedTuple

from culpa.errors import CulpaError
from culpa.trajectory.batches import row_bytes
from culpa.trajectory.rng import RandomState
from culpa.trajectory.run import Run
from culpa.trajectory.schema import StepRecord

AT_ONCE = 16
BYTES = 2**23
"""Updates that are read together, and bytes of their batches: code that runs for one update after
the other is still in the processor's caches, where a model's update puts it out of them."""


class Material(NamedTuple):
    """Of one update: its record, its micro-batches, and the generators before each."""

    record: StepRecord
    batches: list[Any]
    randoms: list[RandomState | None]


def ahead(run: Run, updates: range, without: Collection[int] = ()) -> Generator[Material]:
    """The material of ``updates``, in turn; for those ``without``, no batches.

    Memory: the batches of ``AT_ONCE`` updates, as far as they fit into ``BYTES``; of one at least.

    Raises:
        IntegrityError: where an update cannot be read; not before it is reached.
    """
    waiting, at = deque[Material](), updates.start
    while at < updates.stop:
        size = 0
        while at < updates.stop and len(waiting) < AT_ONCE and size < BYTES:
            try:
                waiting.append(_material(run, at, at not in without))
            except CulpaError:
                if not waiting:
                    raise
                break
            size += _size(run, waiting[-1])
            at += 1
        while waiting:
            yield waiting.popleft()


def _material(run: Run, k: int, batches: bool) -> Material:
    return Material(run.step(k), run.batches_of(k) if batches else [], run.randoms_of(k))


def _size(run: Run, made: Material) -> int:
    if not made.batches:
        return 0
    layouts = run.tables.layouts
    micro = made.record.micro_batches
    return sum(len(m.rows) * row_bytes(layouts[m.layout].root) for m in micro)

"""What the training loop hands to the writer of a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from culpa.trajectory import log
from culpa.trajectory.arena import ALIGNMENT, Arena
from culpa.trajectory.batches import EncodedBatch, encode
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.items import Batch, Entry, Kept, Noted, Notes, Update
from culpa.trajectory.point import LoopEnd, Point
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Stage
from culpa.trajectory.snapshot import Snapshot
from culpa.trajectory.state import State, raws
from culpa.tree import Slots


def copied(batch: Any, arena: Arena | None) -> EncodedBatch:
    """A batch taken apart, in memory of its own: the loop may reuse that of its tensors."""
    found = encode(batch)
    form, leaves = found.form, found.leaves
    if not all(leaf.is_contiguous() for leaf in leaves):
        leaves = [leaf.contiguous() for leaf in leaves]
    parts: list[tuple[int, torch.dtype, torch.Size]] = []
    end = 0
    for leaf in leaves:
        parts.append((end, leaf.dtype, leaf.shape))
        end += -(-leaf.nbytes // ALIGNMENT) * ALIGNMENT
    region = None if arena is None else arena.take(end)
    if region is None:
        return EncodedBatch(form, [leaf.clone() for leaf in leaves])
    views = region.views(form, parts)
    for view, leaf in zip(views, leaves, strict=True):
        view.copy_(leaf)
    return EncodedBatch(form, views)


@dataclass(frozen=True)
class Commit:
    """One applied update on its way to the disk."""

    index: int
    stage: Stage
    optimizer: bytes
    """What the log says of it, JSON."""
    hypers: bytes
    batches: Sequence[tuple[EncodedBatch, RandomState | None]]
    detail: StepDetail
    after: Snapshot
    slots: Slots | None
    """The optimizer's, if the state after the update is kept."""
    draws: Sequence[tuple[int, int, RandomState]] = ()
    """Loop, number of the batch, and the generators before it was drawn, where drawing moved
    them."""
    point: Point | None = None
    others: Sequence[Noted] = ()
    """The same of the other ranks, as the log keeps it."""

    def notes(self) -> list[Noted]:
        """Where an unfinished recording is to go on, as far as this update says."""
        found = [(log.draw_id(loop, n), random.encode()) for loop, n, random in self.draws]
        found += self.others
        return found if self.point is None else [*found, (log.POINT, self.point.encode())]


@dataclass(frozen=True)
class Keep:
    """A state to keep at a boundary of stages, its slots included."""

    index: int
    state: State


Item = Commit | Keep | LoopEnd


def entry(handed: Item, drop: Sequence[int]) -> Entry:
    """What the store takes. ``drop``: kept states that are not wanted any more."""
    if isinstance(handed, Keep):
        return Kept(handed.index, raws(handed.state.flat()))
    if isinstance(handed, LoopEnd):
        return Notes(ended(handed))
    return Update(
        handed.index,
        handed.stage,
        handed.optimizer,
        handed.hypers,
        msgspec.json.encode(handed.detail),
        [
            Batch(b.form.json, b.form.placements, b.rows, random and random.encode())
            for b, random in handed.batches
        ],
        handed.after.raws(),
        None if handed.slots is None else raws(State({}, {}, handed.slots).flat()),
        drop,
        handed.notes(),
    )


def ended(end: LoopEnd) -> list[Noted]:
    """What the log keeps of a loop that ended."""
    drawn = [(log.draw_id(end.number, n), random.encode()) for n, random in end.drawn]
    return [*drawn, (log.loop_id(end.number), end.encode())]

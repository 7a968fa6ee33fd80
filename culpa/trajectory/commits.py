"""What the training loop hands to the writer of a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from culpa.trajectory import log
from culpa.trajectory.arena import ALIGNMENT, Arena
from culpa.trajectory.batches import EncodedBatch, columns_of
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.forms import Form, form_of
from culpa.trajectory.items import Batch, Entry, Kept, Noted, Notes, Update
from culpa.trajectory.point import LoopEnd, Point
from culpa.trajectory.recognition import Rows
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Stage
from culpa.trajectory.snapshot import Snapshot
from culpa.trajectory.state import State, raws
from culpa.tree import Slots


def copied(batch: Any, arena: Arena | None) -> EncodedBatch:
    """A batch taken apart, in memory of its own: the loop may reuse that of its tensors."""
    leaves: list[Tensor] = []
    form = form_of(batch, leaves)
    leaves = [leaf if leaf.is_cpu else leaf.detach().cpu() for leaf in leaves]
    size = sum(-(-leaf.nbytes // ALIGNMENT) * ALIGNMENT for leaf in leaves)
    region = None if arena is None or not leaves else arena.take(size)
    if region is None:
        return EncodedBatch(form, [leaf.detach().clone() for leaf in leaves])
    views, columns = region.made(form, partial(_laid, form, leaves))
    with torch.no_grad():
        torch._foreach_copy_(views, leaves)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return EncodedBatch(form, views, columns)


def _laid(
    form: Form, leaves: Sequence[Tensor], memory: Tensor
) -> tuple[list[Tensor], Sequence[Rows]]:
    """Where the tensors of a batch of this form lie in a region, and their rows."""
    views: list[Tensor] = []
    at = 0
    for leaf in leaves:
        views.append(memory[at : at + leaf.nbytes].view(leaf.dtype).view(leaf.shape))
        at += -(-leaf.nbytes // ALIGNMENT) * ALIGNMENT
    return views, columns_of(form, views)


@dataclass
class Commit:
    """One applied update on its way to the disk. Nobody changes it."""

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
            Batch(b.form.json, b.form.placements, b.columns, random and random.encode())
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

"""What the training loop hands to the writer of a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from culpa.trajectory.batches import EncodedBatch
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.point import LoopEnd, Point
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import OptimizerSpec, Stage
from culpa.trajectory.snapshot import Snapshot
from culpa.trajectory.state import State
from culpa.tree import Slots


@dataclass(frozen=True)
class Commit:
    """One applied update on its way to the disk."""

    index: int
    stage: Stage
    optimizer: OptimizerSpec
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


@dataclass(frozen=True)
class Keep:
    """A state to keep at a boundary of stages, its slots included."""

    index: int
    state: State


Item = Commit | Keep | LoopEnd

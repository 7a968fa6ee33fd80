"""What reaches the store of a recording: bytes, and no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from culpa.trajectory.raw import Raw
from culpa.trajectory.recognition import Rows
from culpa.trajectory.schema import Placement, Stage

Noted = tuple[int, bytes]
"""A row of the table ``resume``: where an unfinished recording is to go on."""


class Batch(NamedTuple):
    """A micro-batch taken apart."""

    layout: bytes
    """JSON."""
    placements: tuple[Placement, ...]
    columns: Sequence[Rows]
    """Of each of its tensors, ``[rows, bytes]``."""
    random: bytes | None
    """The generators before its forward pass, if they are to be kept."""


@dataclass(frozen=True)
class Update:
    """One applied update."""

    index: int
    stage: Stage
    optimizer: bytes
    """JSON, as ``hypers`` and ``detail``."""
    hypers: bytes
    detail: bytes
    batches: Sequence[Batch]
    after: Sequence[Raw]
    """Parameters and buffers."""
    slots: Sequence[Raw] | None
    """The optimizer's, if the state after the update is kept."""
    drop: Sequence[int]
    """Kept states that are not wanted any more once this one is kept."""
    notes: Sequence[Noted]


@dataclass(frozen=True)
class Kept:
    """A state to keep at a boundary of stages, its slots included."""

    index: int
    state: Sequence[Raw]


@dataclass(frozen=True)
class Notes:
    """Rows of the table ``resume`` beside any update."""

    rows: Sequence[Noted]


Entry = Update | Kept | Notes

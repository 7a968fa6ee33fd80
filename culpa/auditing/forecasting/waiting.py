"""What a recomputed update takes while it waits for the sweep, by where and how it is held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from culpa.trajectory import rounded
from culpa.trajectory.hold import ANCHORED, Hold, OnCpu, OnDisk
from culpa.trajectory.state import State


@dataclass(frozen=True)
class Waiting:
    """Bytes of one update: where the model is, in the machine's memory besides, on disk."""

    beside: int
    machine: int = 0
    disk: int = 0

    def times(self, count: int) -> Waiting:
        """Of so many updates."""
        return Waiting(count * self.beside, count * self.machine, count * self.disk)


def waiting(hold: Hold | None, state: State, batch: int) -> Waiting:
    """What an update takes with the state before it, its gradients and its batch of so many bytes.

    ``state``: one with all that the optimizer holds; every parameter in it counts as trained.
    """
    half = hold is not None and hold.dtype is not None
    moving = [*state.params.values(), *(v for slot in state.slots.values() for v in slot.values())]
    parts = _bytes(moving, half) + _bytes(state.params.values(), half)
    parts += _bytes(state.buffers.values(), False)
    if half:
        parts += sum(v.nbytes for v in moving if rounded.rounds(v)) // ANCHORED
    match hold:
        case OnDisk():
            return Waiting(batch, disk=parts)
        case OnCpu():
            return Waiting(batch, machine=parts)
        case _:
            return Waiting(batch + parts)


def _bytes(values: Iterable[Tensor], half: bool) -> int:
    return sum(v.nbytes // 2 if half and rounded.rounds(v) else v.nbytes for v in values)

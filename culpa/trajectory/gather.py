"""Rows of a pack as the columns of a batch: one copy from the file to each tensor."""

from __future__ import annotations

import warnings
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from culpa.trajectory.recognition import Rows


@runtime_checkable
class Columns(Protocol):
    """``count`` rows of ``width`` bytes each, of which parts can be taken."""

    count: int
    width: int

    def column(self, start: int, stop: int) -> Tensor:
        """The bytes ``[start, stop)`` of every row: uint8 ``[count * (stop - start)]``, a copy.

        In memory that torch has allocated, which is aligned; NumPy's is not.
        """
        ...


class Matrix:
    """Of rows that are in memory already, uint8 ``[count, width]``."""

    def __init__(self, rows: Rows) -> None:
        self.count, self.width = rows.shape
        self._rows = rows

    def column(self, start: int, stop: int) -> Tensor:
        """See ``Columns``."""
        flat = np.ascontiguousarray(self._rows[:, start:stop]).reshape(-1)
        return torch.from_numpy(flat).clone()


class Gathered:
    """Of rows that lie anywhere in one piece of memory.

    Args:
        memory: uint8, all of it (``viewed``).
        starts: int64, where each row begins; none of them ends beyond the memory.
        width: bytes of a row.
    """

    def __init__(self, memory: Tensor, starts: Tensor, width: int) -> None:
        self.count, self.width = len(starts), width
        self._memory = memory
        self._starts = starts

    def column(self, start: int, stop: int) -> Tensor:
        """See ``Columns``."""
        width = stop - start
        # Overlapping windows, one beginning at every byte: rows of any size are rows of this.
        windows = self._memory.as_strided((len(self._memory) - stop + 1, width), (1, 1), start)
        return windows.index_select(0, self._starts).reshape(-1)


def viewed(memory: memoryview) -> Tensor:
    """Memory that must not be written to as a tensor, without a copy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))

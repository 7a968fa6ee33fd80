"""Recognising rows that are in the pack already, without hashing each of them.

From its second epoch on nearly every row of a training run is known. Its BLAKE3 costs one call
from Python a row; here a whole batch is looked up with a few calls of NumPy. A sum with random
weights says which row of the pack each may be, and a comparison byte by byte with the pack itself
says whether it is: no row is ever taken for another. Whatever is not recognised, the weights being
no cryptographic hash, is hashed with BLAKE3 like a new one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

Rows = npt.NDArray[np.uint8]
"""``[rows, bytes per row]``."""
WIDEST = 2**13
"""Bytes; longer rows are hashed as fast as they are compared."""
Words = npt.NDArray[np.uint64]


Ids = npt.NDArray[np.int64]
"""Numbers of rows in the log, -1 for a row whose number is not known."""


def joined(columns: Sequence[Rows]) -> Rows:
    """Whole rows, given the part of each that lies in each of a batch's tensors."""
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


class Recognition:
    """The rows of one layout, by the sums that they have.

    Args:
        widths: bytes of a row in each tensor of a batch.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = [*widths]
        self._weights = [
            np.frombuffer(os.urandom(-(-width // 8) * 8), dtype=np.uint64) | np.uint64(1)
            for width in widths
        ]
        self._ids: dict[int, int] = {}

    def sums(self, columns: Sequence[Rows]) -> list[int]:
        """A number for each row, the same for the same bytes."""
        parts = [
            np.einsum("ij,j->i", _words(column), weights)
            for column, weights in zip(columns, self._weights, strict=True)
        ]
        return np.sum(parts, axis=0).tolist()

    def add(self, rows: Iterable[tuple[int, int]]) -> None:
        """Rows, by sum and number, are in the pack, or will be."""
        for found, number in rows:
            self._ids.setdefault(found, number)

    def find(self, columns: Sequence[Rows], sums: Sequence[int], offsets: Ids, pack: Mapped) -> Ids:
        """The number of each row, -1 where it has to be hashed.

        Args:
            columns: uint8 ``[n, width]`` each.
            sums: theirs.
            offsets: of all rows in the pack.
            pack: to compare with.
        """
        ids = np.fromiter(map(self._ids.get, sums, repeat(-1)), np.int64, len(sums))
        known = ids >= 0
        if not known.all():
            at = known.nonzero()[0]
            if len(at):
                mine = [column[at] for column in columns]
                ids[at[~self._same(mine, offsets[ids[at]], pack)]] = -1
            return ids
        same = self._same(columns, offsets[ids], pack)
        if not same.all():
            ids[~same] = -1
        return ids

    def _same(self, columns: Sequence[Rows], starts: Ids, pack: Mapped) -> npt.NDArray[np.bool_]:
        there, same = pack.columns(starts, self._widths)
        for here, packed in zip(columns, there, strict=True):
            same &= (_words(here) == _words(packed)).all(1)
        return same


class Mapped:
    """The pack as far as it is written, in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = np.zeros(0, dtype=np.uint8)
        self._windows: dict[int, Rows] = {}

    def columns(
        self, starts: npt.NDArray[np.int64], widths: Sequence[int]
    ) -> tuple[list[Rows], npt.NDArray[np.bool_]]:
        """Copies of the rows from ``starts`` on, in columns, and which are written already."""
        width = sum(widths)
        if int(starts.max()) + width > len(self._bytes):
            self._extend()
        last = len(self._bytes) - width
        if last < 0:
            found = [np.zeros((len(starts), each), dtype=np.uint8) for each in widths]
            return found, np.zeros(len(starts), dtype=bool)
        found, at = list[Rows](), np.minimum(starts, last)
        for each in widths:
            found.append(self._beginning_anywhere(each)[at])
            at = at + each
        return found, starts <= last

    def _beginning_anywhere(self, width: int) -> Rows:
        windows = self._windows.get(width)
        if windows is None:
            shape = len(self._bytes) - width + 1, width
            windows = as_strided(self._bytes, shape, (1, 1), writeable=False)
            self._windows[width] = windows
        return windows

    def _extend(self) -> None:
        # Where a file system cannot map files, no row is recognised, and all are hashed.
        with suppress(OSError, ValueError), self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > len(self._bytes):
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._bytes = np.frombuffer(data, dtype=np.uint8)
                self._windows.clear()


def _words(rows: Rows) -> Words:
    """Rows as words of eight bytes, filled up with zeros."""
    missing = -rows.shape[1] % 8
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return np.ascontiguousarray(rows).view(np.uint64)

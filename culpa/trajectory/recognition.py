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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

Rows = npt.NDArray[np.uint8]
"""``[rows, bytes per row]``."""
WIDEST = 2**13
"""Bytes; longer rows are hashed as fast as they are compared."""
Words = npt.NDArray[np.uint64]


def joined(columns: Sequence[Any], count: int) -> Rows:
    """The rows of a batch, given the bytes of each of its tensors, ``count`` rows each."""
    parts = [np.frombuffer(column, dtype=np.uint8).reshape(count, -1) for column in columns]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts, axis=1) if parts else np.zeros((1, 0), dtype=np.uint8)


class Recognition:
    """The rows of one layout, by the sums that they have.

    Args:
        width: bytes of a row.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._weights = np.frombuffer(os.urandom(-(-width // 8) * 8), dtype=np.uint64) | np.uint64(
            1
        )
        self._ids: dict[int, int] = {}

    def sums(self, rows: Rows) -> list[int]:
        """A number for each row, the same for the same bytes."""
        return np.einsum("ij,j->i", _words(rows), self._weights).tolist()

    def add(self, rows: Iterable[tuple[int, int]]) -> None:
        """Rows, by sum and number, are in the pack, or will be."""
        for found, number in rows:
            self._ids.setdefault(found, number)

    def find(
        self, rows: Rows, sums: Sequence[int], offsets: Sequence[int], pack: Mapped
    ) -> list[int]:
        """The number of each row, -1 where it has to be hashed.

        Args:
            rows: uint8 ``[n, width]``.
            sums: theirs.
            offsets: of all rows in the pack.
            pack: to compare with.
        """
        ids = [self._ids.get(s, -1) for s in sums]
        at = [i for i, number in enumerate(ids) if number >= 0]
        if not at:
            return ids
        starts = np.array([offsets[ids[i]] for i in at])
        there, written = pack.rows(starts, self.width)
        mine = rows if len(at) == len(rows) else rows[at]
        same = (_words(there) == _words(mine)).all(1) & written
        if not same.all():
            for i, equal in zip(at, same.tolist(), strict=True):
                ids[i] = ids[i] if equal else -1
        return ids


class Mapped:
    """The pack as far as it is written, in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = np.zeros(0, dtype=np.uint8)

    def rows(self, starts: npt.NDArray[np.int64], width: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Copies of the bytes from ``starts`` on, and which of them are written already."""
        if int(starts.max()) + width > len(self._bytes):
            self._extend()
        last = len(self._bytes) - width
        if last < 0:
            return np.zeros((len(starts), width), dtype=np.uint8), np.zeros(len(starts), dtype=bool)
        windows = as_strided(self._bytes, (last + 1, width), (1, 1), writeable=False)
        return windows[np.minimum(starts, last)], starts <= last

    def _extend(self) -> None:
        # Where a file system cannot map files, no row is recognised, and all are hashed.
        with suppress(OSError, ValueError), self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > len(self._bytes):
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._bytes = np.frombuffer(data, dtype=np.uint8)


def _words(rows: Rows) -> Words:
    """Rows as words of eight bytes, filled up with zeros."""
    missing = -rows.shape[1] % 8
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return np.ascontiguousarray(rows).view(np.uint64)

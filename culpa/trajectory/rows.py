"""Which rows of batches were seen before: each distinct row goes to the pack once."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np
from blake3 import blake3

from culpa.trajectory import files, log
from culpa.trajectory.items import Batch
from culpa.trajectory.recognition import WIDEST, Mapped, Recognition, Rows

PIECE = 2**22
"""Bytes of new rows that are gathered before they are written."""
NOTED = 4096
"""New rows that are gathered before they are told to the log."""


@dataclass
class LookedUp:
    """The rows of a batch, the numbers of those that were recognised (others: -1), and sums."""

    rows: Rows
    ids: list[int]
    sums: list[int] = field(default_factory=list[int])


class RowIndex:
    """The digests of all rows, their numbers, and the end of the pack.

    Args:
        connection: the log, for the table of examples.
        pack: open for writing at its end.
        stored: whether the bytes are written; otherwise only their digests are.
    """

    def __init__(self, connection: sqlite3.Connection, pack: FileIO, *, stored: bool) -> None:
        self._log = connection
        self._pack = pack
        self._stored = stored
        self._known: dict[bytes, int] = {}
        self._digests: list[bytes] = []
        self._offsets: list[int] = []
        self._size = 0
        self._flushed = -1
        self._waiting: list[bytes] = []
        self._written = 0
        self._noted: list[tuple[int, bytes, int, int, int]] = []
        self._recognitions: dict[bytes, Recognition] = {}
        self._mapped = Mapped(Path(str(pack.name)))

    def load(self) -> None:
        """What an existing log and pack hold."""
        for digest, offset in log.rows(self._log, "SELECT digest, offset FROM example ORDER BY id"):
            self._known[digest] = len(self._digests)
            self._digests.append(digest)
            self._offsets.append(offset)
        self._size = self._written = self._pack.tell()

    def look_up(self, batches: Sequence[Batch]) -> list[LookedUp]:
        """Which rows of several batches are known, as far as that is told quickly."""
        found = [LookedUp(batch.rows, [-1] * len(batch.rows)) for batch in batches]
        if not self._stored:
            return found
        alike: dict[bytes, list[LookedUp]] = {}
        for batch, looked_up in zip(batches, found, strict=True):
            if 0 < looked_up.rows.shape[1] <= WIDEST:
                alike.setdefault(batch.layout, []).append(looked_up)
        for layout, group in alike.items():
            recognition = self._recognition(layout, group[0].rows.shape[1])
            rows = np.concatenate([one.rows for one in group]) if len(group) > 1 else group[0].rows
            sums = recognition.sums(rows)
            ids = recognition.find(rows, sums, self._offsets, self._mapped)
            at = 0
            for one in group:
                one.ids, one.sums = ids[at : at + len(one.rows)], sums[at : at + len(one.rows)]
                at += len(one.rows)
        return found

    def find(
        self, layout: bytes, number: int, looked_up: LookedUp
    ) -> tuple[list[int], list[bytes]]:
        """The numbers and digests (chain.row_digest) of a batch's rows; new ones are noted.

        Args:
            layout: its JSON.
            number: the layout's.
            looked_up: what ``look_up`` gave, since when rows may have been added.
        """
        ids = looked_up.ids
        unknown = [at for at, known in enumerate(ids) if known < 0]
        if unknown:
            self._hash(layout, number, looked_up, unknown)
        if unknown and looked_up.sums:
            recognition = self._recognition(layout, looked_up.rows.shape[1])
            recognition.add((looked_up.sums[at], ids[at]) for at in unknown)
        digests = self._digests
        return ids, [digests[i] for i in ids]

    def _recognition(self, layout: bytes, width: int) -> Recognition:
        known = self._recognitions.get(layout)
        if known is None:
            known = self._recognitions[layout] = Recognition(width)
        return known

    def _hash(self, layout: bytes, number: int, looked_up: LookedUp, unknown: list[int]) -> None:
        """Fill in the numbers of rows that were not recognised, by their digests."""
        prefix, known, digests = blake3(layout).digest(), self._known, self._digests
        rows, ids = looked_up.rows, looked_up.ids
        width, stored = rows.shape[1], self._stored
        for at in unknown:
            row = rows[at].tobytes()
            digest = blake3(prefix + row).digest()
            found = known.get(digest)
            if found is None:
                found = known[digest] = len(digests)
                digests.append(digest)
                offset = self._size if stored else -1
                self._offsets.append(offset)
                self._noted.append((found, digest, number, offset, width))
                if stored:
                    self._size += width
                    self._waiting.append(row)
            ids[at] = found
        if len(self._noted) >= NOTED:
            self._note()
        if self._size - self._written >= PIECE:
            self._write()

    def flush(self) -> None:
        """Make every row durable, and tell the log of it, which is to be committed next."""
        if self._waiting or self._size != self._flushed:
            self._write()
            files.flush(self._pack)
            self._flushed = self._size
        self._note()

    def _write(self) -> None:
        files.write(self._pack, b"".join(self._waiting))
        self._waiting, self._written = [], self._size

    def _note(self) -> None:
        if self._noted:
            log.execute_many(self._log, "INSERT INTO example VALUES (?, ?, ?, ?, ?)", self._noted)
            self._noted = []

    def close(self) -> None:
        """Close the pack."""
        self._pack.close()

"""Which rows of batches were seen before: each distinct row goes to the pack once."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from culpa.trajectory import digest, files, log
from culpa.trajectory.items import Batch
from culpa.trajectory.recognition import WIDEST, Ids, Mapped, Recognition, Rows, joined

PIECE = 2**22
"""Bytes of new rows that are gathered before they are written."""
NOTED = 4096
"""New rows that are gathered before they are told to the log."""
BINARY = bytes([0xC4, digest.DIGEST_BYTES])
"""What msgpack has before a digest."""
PACKED = len(BINARY) + digest.DIGEST_BYTES


@dataclass
class LookedUp:
    """The rows of a batch, the numbers of those that were recognised (others: -1), and sums."""

    columns: Sequence[Rows]
    ids: Ids
    sums: list[int] = field(default_factory=list[int])


class Grown:
    """An array to which rows are added at its end."""

    def __init__(self, empty: Any) -> None:
        self._memory, self._count = empty, 0

    def __len__(self) -> int:
        """How many rows there are."""
        return self._count

    def add(self, rows: Any) -> None:
        """Put them behind the others."""
        before, self._count = self._count, self._count + len(rows)
        if self._count > len(self._memory):
            larger = np.empty((2 * self._count, *rows.shape[1:]), rows.dtype)
            larger[:before] = self._memory[:before]
            self._memory = larger
        self._memory[before : self._count] = rows

    @property
    def rows(self) -> Any:
        """All of them, as a view."""
        return self._memory[: self._count]


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
        # Taken by the hundred at every update, so not as objects of Python.
        self._packed = Grown(np.empty((0, PACKED), np.uint8))
        self._offsets = Grown(np.empty(0, np.int64))
        self._size = 0
        self._flushed = -1
        self._waiting: list[bytes] = []
        self._written = 0
        self._noted: list[tuple[int, bytes, int, int, int]] = []
        self._recognitions: dict[bytes, Recognition] = {}
        self._mapped = Mapped(Path(str(pack.name)))

    def load(self) -> None:
        """What an existing log and pack hold."""
        found = log.rows(self._log, "SELECT digest, offset FROM example ORDER BY id")
        for row, (content, _) in enumerate(found):
            self._known[content] = row
        self._append([content for content, _ in found], [offset for _, offset in found])
        self._size = self._written = self._pack.tell()

    def look_up(self, batches: Sequence[Batch]) -> list[LookedUp]:
        """Which rows of several batches are known, as far as that is told quickly."""
        found: list[LookedUp] = []
        for batch in batches:
            columns = batch.columns
            looked_up = LookedUp(columns, np.full(len(columns[0]), -1))
            found.append(looked_up)
            if self._stored and 0 < sum(column.shape[1] for column in columns) <= WIDEST:
                recognition = self._recognition(batch.layout, columns)
                looked_up.sums = recognition.sums(columns)
                looked_up.ids = recognition.find(
                    columns, looked_up.sums, self._offsets.rows, self._mapped
                )
        return found

    def find(self, layout: bytes, number: int, looked_up: LookedUp) -> tuple[Ids, msgspec.Raw]:
        """The numbers of a batch's rows, and their digests (chain.row_digest); new ones are noted.

        Args:
            layout: its JSON.
            number: the layout's.
            looked_up: what ``look_up`` gave, since when rows may have been added.

        Returns:
            The digests as a list in msgpack.
        """
        ids = looked_up.ids
        if len(ids) and ids.min() < 0:
            unknown = np.nonzero(ids < 0)[0].tolist()
            numbers = self._hash(layout, number, joined(looked_up.columns), unknown)
            ids[unknown] = numbers
            if looked_up.sums:
                recognition = self._recognition(layout, looked_up.columns)
                recognition.add(zip([looked_up.sums[at] for at in unknown], numbers, strict=True))
        return ids, msgspec.Raw(_begun(len(ids)) + self._packed.rows[ids].tobytes())

    def _recognition(self, layout: bytes, columns: Sequence[Rows]) -> Recognition:
        known = self._recognitions.get(layout)
        if known is None:
            widths = [column.shape[1] for column in columns]
            known = self._recognitions[layout] = Recognition(widths)
        return known

    def _hash(self, layout: bytes, number: int, rows: Rows, unknown: Sequence[int]) -> list[int]:
        """The numbers of rows that were not recognised, by their digests."""
        prefix, known = blake3(layout).digest(), self._known
        width, stored = rows.shape[1], self._stored
        numbers: list[int] = []
        digests: list[bytes] = []
        offsets: list[int] = []
        for at in unknown:
            row = rows[at].tobytes()
            content = blake3(prefix + row).digest()
            found = known.get(content)
            if found is None:
                found = known[content] = len(known)
                offset = self._size if stored else -1
                digests.append(content)
                offsets.append(offset)
                self._noted.append((found, content, number, offset, width))
                if stored:
                    self._size += width
                    self._waiting.append(row)
            numbers.append(found)
        self._append(digests, offsets)
        if len(self._noted) >= NOTED:
            self._note()
        if self._size - self._written >= PIECE:
            self._write()
        return numbers

    def _append(self, digests: Sequence[bytes], offsets: Sequence[int]) -> None:
        packed = b"".join(BINARY + one for one in digests)
        self._packed.add(np.frombuffer(packed, np.uint8).reshape(-1, PACKED))
        self._offsets.add(np.array(offsets, np.int64))

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


def _begun(count: int) -> bytes:
    """What msgpack has before the items of a list."""
    if count < 2**4:
        return bytes([0x90 | count])
    return (
        b"\xdc" + count.to_bytes(2, "big") if count < 2**16 else b"\xdd" + count.to_bytes(4, "big")
    )

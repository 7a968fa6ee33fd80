"""Which rows of batches were seen before: each distinct row goes to the pack once."""

from __future__ import annotations

import sqlite3
from io import FileIO

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from culpa.trajectory import files, log
from culpa.trajectory.batches import Rows

PIECE = 2**22
"""Bytes of new rows that are gathered before they are written."""


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
        self._size = 0
        self._flushed = -1
        self._waiting: list[bytes] = []
        self._waiting_size = 0
        self._prefixes: dict[bytes, bytes] = {}

    def load(self) -> None:
        """What an existing log and pack hold."""
        self._known.update(log.rows(self._log, "SELECT digest, id FROM example"))
        self._size = self._pack.tell()

    def find(
        self, layout: bytes, number: int, rows: Rows
    ) -> tuple[npt.NDArray[np.uint32], list[bytes]]:
        """The numbers and digests (chain.row_digest) of a batch's rows; new ones are noted."""
        prefix = self._prefixes.get(layout)
        if prefix is None:
            prefix = self._prefixes[layout] = blake3(layout).digest()
        known, width = self._known, rows.shape[1]
        ids = np.empty(len(rows), dtype=np.uint32)
        digests: list[bytes] = []
        data = rows.tobytes()
        for at in range(len(rows)):
            row = data[at * width : (at + 1) * width]
            found = blake3(prefix + row).digest()
            digests.append(found)
            if found not in known:
                self._add(found, number, row)
            ids[at] = known[found]
        return ids, digests

    def _add(self, found: bytes, layout: int, row: bytes) -> None:
        number = self._known[found] = len(self._known)
        offset = self._size if self._stored else -1
        log.execute(
            self._log,
            "INSERT INTO example VALUES (?, ?, ?, ?, ?)",
            (number, found, layout, offset, len(row)),
        )
        if not self._stored:
            return
        self._size += len(row)
        self._waiting.append(row)
        self._waiting_size += len(row)
        if self._waiting_size >= PIECE:
            self._write()

    def flush(self) -> None:
        """Make every row durable."""
        if self._waiting or self._size != self._flushed:
            self._write()
            files.flush(self._pack)
            self._flushed = self._size

    def _write(self) -> None:
        files.write(self._pack, b"".join(self._waiting))
        self._waiting, self._waiting_size = [], 0

    def close(self) -> None:
        """Close the pack."""
        self._pack.close()

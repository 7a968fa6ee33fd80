"""The step log: one SQLite file in which every table is append-only and every step is chained.

``resume`` says where a crashed recording is to go on (resume.py), and has the seal that binds it,
and whatever else a root digest covers, to the last update committed (seal.py).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from culpa.errors import RecordError
from culpa.trajectory import files

SCHEMA = """
CREATE TABLE layout    (id INTEGER PRIMARY KEY, json BLOB NOT NULL UNIQUE);
CREATE TABLE optimizer (id INTEGER PRIMARY KEY, json BLOB NOT NULL UNIQUE);
CREATE TABLE hypers    (id INTEGER PRIMARY KEY, json BLOB NOT NULL UNIQUE);
CREATE TABLE random    (id INTEGER PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE example   (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE,
                        layout INTEGER NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL);
CREATE TABLE step      (k INTEGER PRIMARY KEY, optimizer INTEGER NOT NULL, hypers INTEGER NOT NULL,
                        micro_batches BLOB NOT NULL, detail BLOB NOT NULL, digest BLOB NOT NULL,
                        fingerprints BLOB NOT NULL, chain BLOB NOT NULL, fields BLOB NOT NULL);
CREATE TABLE stage     (name TEXT PRIMARY KEY, start INTEGER NOT NULL, stop INTEGER NOT NULL);
CREATE TABLE state     (k INTEGER PRIMARY KEY, digest BLOB NOT NULL, size INTEGER NOT NULL);
CREATE TABLE resume    (id INTEGER PRIMARY KEY, content BLOB NOT NULL);
"""
SEAL = -1
"""The row of ``resume`` that holds the seal; the only one of a complete run."""
POINT = 0
"""The row of ``resume`` that holds the point to go on from."""
OF_RANK = 52
"""The rows of the r-th rank are those of the first one, plus r times two to this."""


def draw_id(loop: int, n: int) -> int:
    """The row of ``resume`` with the generators before the n-th draw of a loop."""
    return ((loop + 1) << 32) + n


def loop_id(loop: int) -> int:
    """The row of ``resume`` with the end of a loop: after all of its draws."""
    return ((loop + 2) << 32) - 1


def of_rank(rank: int, key: int) -> int:
    """The row in which stands of a rank what stands of the first one in row ``key``.

    Raises:
        RecordError: beyond 2048 ranks, or a million loops of one of them.
    """
    if rank >> (63 - OF_RANK) or key >> OF_RANK:
        raise RecordError(
            f"rank {rank} has begun {(key >> 32) - 1} loops over recorder.batches; where a"
            " recording is to go on is kept of at most 2048 ranks and a million loops each. Use"
            " recorder.step where every update has a loop of its own."
        )
    return (rank << OF_RANK) + key


def create(path: Path) -> sqlite3.Connection:
    """A new log, write-ahead, used by the writer's thread alone."""
    connection = _connect(path)
    execute(connection, "BEGIN")
    for statement in SCHEMA.split(";")[:-1]:
        execute(connection, statement)
    return connection


def recover(path: Path) -> None:
    """Let SQLite roll back what a crash left half done; reading alone cannot.

    It is one plain file then, which other hosts can read too, unless somebody has it open.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        rows(connection, "SELECT count(*) FROM step")
        with contextlib.suppress(sqlite3.OperationalError):
            execute(connection, "PRAGMA busy_timeout=100")
            execute(connection, "PRAGMA journal_mode=DELETE")


def reopen(path: Path) -> sqlite3.Connection:
    """An existing log to write on; SQLite drops what was not committed."""
    connection = _connect(path)
    execute(connection, "BEGIN")
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    execute(connection, "PRAGMA journal_mode=WAL")
    execute(connection, "PRAGMA synchronous=FULL")
    return connection


def execute(connection: sqlite3.Connection, query: str, values: Iterable[Any] = ()) -> int:
    """Execute one statement that writes; returns the id of the last row inserted."""
    return connection.execute(query, tuple(values)).lastrowid or 0


def execute_many(connection: sqlite3.Connection, query: str, values: Iterable[Any]) -> None:
    """Execute a statement that writes for every one of many values."""
    connection.executemany(query, values)


def commit(connection: sqlite3.Connection) -> None:
    """Make everything since the last commit durable, and begin anew."""
    execute(connection, "COMMIT")
    execute(connection, "BEGIN")


def close(connection: sqlite3.Connection, path: Path, *, compact: bool) -> None:
    """Commit, and fold the write-ahead file into the log, so that it is one plain file.

    ``compact``: leave no space of deleted rows in it, where nobody would notice a change.

    Raises:
        sqlite3.OperationalError: if somebody reads the log just now and does not end for seconds.
    """
    execute(connection, "COMMIT")
    if compact:
        with contextlib.suppress(sqlite3.OperationalError):  # no room for a copy: it stays larger
            execute(connection, "VACUUM")
    busy = rows(connection, "PRAGMA wal_checkpoint(TRUNCATE)")[0][0]
    if busy:
        raise sqlite3.OperationalError("the log is being read, so it cannot be closed")
    with contextlib.suppress(sqlite3.OperationalError):  # somebody has it open; it is whole
        execute(connection, "PRAGMA busy_timeout=100")
        execute(connection, "PRAGMA journal_mode=DELETE")
    connection.close()
    # The first two are empty, and no more is written to a closed log; a process that was killed
    # while it closed the log may have left a journal, which opening it again has dealt with.
    for journal in ("wal", "shm", "journal"):
        files.remove(path.with_name(f"{path.name}-{journal}"))


def abandon(connection: sqlite3.Connection) -> None:
    """Close without committing, whatever state the log is in."""
    with contextlib.suppress(sqlite3.Error):
        connection.rollback()
    with contextlib.suppress(sqlite3.Error):
        connection.close()


def rows(connection: sqlite3.Connection, query: str, values: Iterable[Any] = ()) -> list[Any]:
    """All rows of a query."""
    return connection.execute(query, tuple(values)).fetchall()

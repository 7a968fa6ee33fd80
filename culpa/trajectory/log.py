"""The step log: one SQLite file in which every table is append-only and every step is chained."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE layout    (id INTEGER PRIMARY KEY, json BLOB NOT NULL UNIQUE);
CREATE TABLE optimizer (id INTEGER PRIMARY KEY, json BLOB NOT NULL UNIQUE);
CREATE TABLE hypers    (id INTEGER PRIMARY KEY, json BLOB NOT NULL UNIQUE);
CREATE TABLE random    (id INTEGER PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE example   (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE,
                        layout INTEGER NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL);
CREATE TABLE step      (k INTEGER PRIMARY KEY, optimizer INTEGER NOT NULL, hypers INTEGER NOT NULL,
                        micro_batches BLOB NOT NULL, detail BLOB NOT NULL, digest BLOB NOT NULL,
                        fingerprints BLOB NOT NULL, chain BLOB NOT NULL);
CREATE TABLE stage     (name TEXT PRIMARY KEY, start INTEGER NOT NULL, stop INTEGER NOT NULL);
CREATE TABLE state     (k INTEGER PRIMARY KEY, digest BLOB NOT NULL, size INTEGER NOT NULL);
"""


def create(path: Path) -> sqlite3.Connection:
    """A new log, write-ahead, used by the writer's thread alone."""
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.executescript(SCHEMA)
    connection.execute("BEGIN")
    return connection


def commit(connection: sqlite3.Connection) -> None:
    """Make everything since the last commit durable, and begin anew."""
    connection.execute("COMMIT")
    connection.execute("BEGIN")


def close(connection: sqlite3.Connection) -> None:
    """Commit, and fold the write-ahead file into the log, so that a run is one plain file."""
    connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()


def open_readonly(path: Path) -> sqlite3.Connection:
    """An existing log for reading."""
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False
    )
    connection.execute("PRAGMA query_only=ON")
    return connection


def rows(connection: sqlite3.Connection, query: str, values: Iterable[Any] = ()) -> list[Any]:
    """All rows of a query."""
    return connection.execute(query, tuple(values)).fetchall()

"""Reading a log that a stranger may have written: checked types, bounded work, nothing executed.

An SQLite file can hold views and triggers, values of any type in any column, records that claim
gigabytes and pages that point at each other. So: the schema must be ours to the letter, a value
may not be longer than the file, every value's type is checked, keys must grow from row to row (a
loop of pages repeats them), and the work of one query is bounded by the size of the file.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from culpa.errors import IntegrityError
from culpa.trajectory import log
from culpa.trajectory.schema import LOG
from culpa.trajectory.source import Source

JOURNALS = (f"{LOG}-wal", f"{LOG}-shm", f"{LOG}-journal")
"""What SQLite leaves beside a log that was not closed."""
TYPES: dict[str, type] = {"INTEGER": int, "BLOB": bytes, "TEXT": str}


def _expected() -> tuple[list[Any], dict[str, dict[str, type]]]:
    """The schema of every log, and by table the types of its columns."""
    with sqlite3.connect(":memory:") as memory:
        memory.executescript(log.SCHEMA)
        schema = memory.execute(SCHEMA_QUERY).fetchall()
        columns = {
            name: {c[1]: TYPES[c[2]] for c in memory.execute(f"PRAGMA table_info({name})")}
            for kind, name, *_ in schema
            if kind == "table"
        }
    memory.close()
    return schema, columns


SCHEMA_QUERY = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name"
SCHEMA, COLUMNS = _expected()


class LogReader:
    """A log opened for reading. Every failure is an ``IntegrityError`` that names the table."""

    def __init__(self, source: Source, *, finished: bool) -> None:
        self.where = f"{source.where}/{LOG}"
        path, size = _place(source, finished)
        self._plain = size if finished else None
        # immutable: neither a journal nor a write-ahead file beside a closed log is looked at.
        options = "mode=ro&immutable=1" if finished else "mode=ro"
        try:
            self._connection = _connect(self, path, options, size)
            self._check_schema()
        except sqlite3.OperationalError:
            if finished:
                raise
            # In a folder that cannot be written, SQLite cannot read a write-ahead log: a copy can.
            self._connection = _connect(self, _copy(self, path), "mode=rw", size)
            self._check_schema()

    def _check_schema(self) -> None:
        found = self._connection.execute(SCHEMA_QUERY).fetchmany(len(SCHEMA) + 1)
        if found != SCHEMA:
            odd = sorted({str(row[1]) for row in {*found} ^ {*SCHEMA}})
            raise IntegrityError(
                f"{self.where} has not the tables of a log: {', '.join(odd[:4])} should not be"
                " there, or is missing or declared differently."
            )

    def rows(
        self, table: str, columns: Sequence[str] = (), start: int | None = None
    ) -> Iterator[Any]:
        """All rows of a table as tuples, in the order of its integer key, which comes first.

        ``start``: only those whose key is no less.
        """
        types = COLUMNS[table]
        chosen = list(columns or types)
        keyed = types[chosen[0]] is int
        query = f"SELECT {', '.join(chosen)} FROM {table}"
        if start is not None:
            query += f" WHERE {chosen[0]} >= ?"
        last, wanted = None, tuple(types[column] for column in chosen)
        values = () if start is None else (start,)
        for row in self._run(table, f"{query} ORDER BY {chosen[0]}" if keyed else query, values):
            if tuple(map(type, row)) != wanted:
                self._check_types(table, chosen, row)
            if keyed and last is not None and row[0] <= last:
                raise IntegrityError(f"{self.where}: table {table} repeats {chosen[0]} {row[0]}.")
            last = row[0]
            yield row

    def numbered(self, table: str, columns: Sequence[str] = (), start: int = 0) -> Iterator[Any]:
        """As ``rows``, of a table whose key counts from ``start`` without a gap."""
        for expected, row in enumerate(self.rows(table, columns), start):
            if row[0] != expected:
                raise IntegrityError(
                    f"{self.where}: table {table} lacks row {expected} (the next is {row[0]})."
                )
            yield row

    def row(self, table: str, key: int) -> Any:
        """One row of a table by its integer key, or ``None``."""
        types = COLUMNS[table]
        chosen = list(types)
        query = f"SELECT {', '.join(chosen)} FROM {table} WHERE {chosen[0]} = ?"
        found = next(iter(self._run(table, query, (key,))), None)
        if found is not None:
            self._check_types(table, chosen, found)
        return found

    def last_key(self, table: str) -> int | None:
        """The largest integer key of a table."""
        key = next(iter(COLUMNS[table]))
        found = next(iter(self._run(table, f"SELECT max({key}) FROM {table}", ())))[0]
        if found is not None and not isinstance(found, int):
            raise IntegrityError(f"{self.where}: table {table} has the key {found!r}.")
        return found

    def check_pages(self) -> None:
        """SQLite's own check of every page and index; a closed log ends with its last page."""
        found = next(iter(self._run("every", "PRAGMA integrity_check(1)", ())))[0]
        if found != "ok":
            raise IntegrityError(f"{self.where} is damaged: {found}.")
        pages, size = (
            next(iter(self._run("every", f"PRAGMA {name}", ())))[0]
            for name in ("page_count", "page_size")
        )
        if self._plain not in (None, pages * size):
            raise IntegrityError(
                f"{self.where} has {self._plain} bytes; its {pages} pages have {pages * size}."
            )

    def _run(self, table: str, query: str, values: Sequence[Any]) -> Iterator[Any]:
        try:
            yield from self._connection.execute(query, tuple(values))
        except (sqlite3.Error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise IntegrityError(f"{self.where}: table {table} is damaged: {error}.") from error

    def _check_types(self, table: str, columns: Sequence[str], row: Sequence[Any]) -> None:
        for column, value in zip(columns, row, strict=True):
            expected = COLUMNS[table][column]
            if type(value) is not expected:
                raise IntegrityError(
                    f"{self.where}: table {table}, row {row[0]!r}: {column} is a"
                    f" {type(value).__name__}, not {expected.__name__}."
                )


def _place(source: Source, finished: bool) -> tuple[Path, int]:
    """A local path of the log, and how long a value in it can be at most."""
    path = source.local(LOG)
    size = path.stat().st_size
    if not finished:
        present = source.files()
        for name in JOURNALS:
            if name in present:
                beside = source.local(name)  # refuses links, which SQLite would follow
                size += beside.stat().st_size
    return path, size


def _connect(owner: LogReader, path: Path, options: str, size: int) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?{options}", uri=True, check_same_thread=False
    )
    weakref.finalize(owner, connection.close)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(size, 2**20))
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "query_only=ON", "mmap_size=0"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _copy(owner: LogReader, path: Path) -> Path:
    """The log and its write-ahead file in a temporary folder, which goes with ``owner``.

    Never a journal: it can name files elsewhere that SQLite would delete.
    """
    folder = Path(tempfile.mkdtemp(prefix="culpa-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    for name in (LOG, f"{LOG}-wal"):
        beside = path.with_name(name)
        if beside.is_file():
            shutil.copyfile(beside, folder / name)
    return folder / LOG

"""Every way in which a recording touches the disk, counted, so that the k-th one can fail."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from culpa.trajectory import files, log

FUNCTIONS = (
    (files, "open_new"),
    (files, "open_at"),
    (files, "write"),
    (files, "flush"),
    (files, "rename"),
    (files, "remove"),
    (files, "make_folder"),
    (files, "flush_folder"),
    (log, "execute"),
    (log, "execute_many"),
)


class Disk:
    """Stands between the library and the disk.

    Args:
        fails: from this operation on ...
        until: ... and before this one, operations fail.
        half: whether a failing write has written half.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fails: int | None = None,
        until: int = 10**9,
        *,
        half: bool = False,
        before: Callable[[int, str], None] = lambda k, name: None,
    ) -> None:
        self.count = 0
        self.names: list[str] = []
        self.failed: list[str] = []
        self.fails, self.until, self.half, self.before = fails, until, half, before
        for module, name in FUNCTIONS:
            monkeypatch.setattr(module, name, self.counted(name, getattr(module, name)))

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            k, self.count = self.count, self.count + 1
            self.names.append(name)
            self.before(k, name)
            if self.fails is not None and self.fails <= k < self.until:
                self.failed.append(name)
                if self.half and name == "write":
                    function(args[0], memoryview(args[1])[: len(args[1]) // 2])
                if name.startswith("execute"):
                    raise sqlite3.OperationalError("database or disk is full")
                raise OSError(errno.ENOSPC, "No space left on device", name)
            return function(*args)

        return call


class Platter:
    """What would be on the disk if the power went: contents as last flushed, names likewise.

    A model that keeps nothing which was not flushed. SQLite flushes by itself: its files count as
    flushed when a COMMIT (or a change of the journal's mode) has returned.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[str, bytes] = {}  # flushed, by the name they had then
        self.names: dict[str, bytes] = {}  # whose names are durable too
        flush, rename = files.flush, files.rename
        flush_folder, remove, execute = files.flush_folder, files.remove, log.execute

        def flushed(file: Any) -> None:
            flush(file)
            self.contents[str(file.name)] = Path(file.name).read_bytes()
            if str(file.name) in self.names:
                self.names[str(file.name)] = self.contents[str(file.name)]

        def renamed(old: Path, new: Path) -> None:
            rename(old, new)
            self.contents[str(new)] = self.contents.pop(str(old), b"")

        def folder_flushed(path: Path) -> None:
            flush_folder(path)
            for name in [n for n in self.names if Path(n).parent == path]:
                if not Path(name).exists():
                    del self.names[name]
            for file in path.iterdir():
                if file.is_file() and "sqlite" not in file.name:
                    self.names[str(file)] = self.contents.get(str(file), b"")
                elif file.is_file():
                    self.names.setdefault(str(file), b"")

        def executed(connection: sqlite3.Connection, query: str, values: Any = ()) -> int:
            done = execute(connection, query, values)
            if query == "COMMIT" or query.startswith("PRAGMA journal_mode"):
                for suffix in ("", "-wal"):
                    file = folder / f"log.sqlite{suffix}"
                    self.names.pop(str(file), None)
                    if file.exists():
                        self.names[str(file)] = file.read_bytes()
            return done

        for module, name, function in (
            (files, "flush", flushed),
            (files, "rename", renamed),
            (files, "flush_folder", folder_flushed),
            (files, "remove", remove),
            (log, "execute", executed),
        ):
            monkeypatch.setattr(module, name, function)

    def restore(self, to: Path) -> None:
        """The folder as it would be found when the power is back."""
        if to.exists():
            shutil.rmtree(to)
        (to / "states").mkdir(parents=True)
        for name, data in self.names.items():
            (to / Path(name).relative_to(self.folder)).write_bytes(data)

"""Runs on object stores: what is needed is fetched when it is needed, through fsspec."""

from __future__ import annotations

import importlib
import shutil
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from culpa.errors import IntegrityError, StoreError, UnsupportedError
from culpa.trajectory.source import Filesystem, Span, joined

GAP = 16 * 2**10
"""Bytes between two wanted parts that cost less to fetch than another request would."""


class Remote:
    """A run at an address that fsspec understands.

    Whole files are fetched for states; of the pack only the rows that a batch needs; the log once,
    into a temporary file that goes when this object does. ``fetched`` counts the bytes by file.
    """

    def __init__(self, address: str) -> None:
        self.where = address.rstrip("/")
        self.fetched: dict[str, int] = {}
        try:
            fsspec: Any = importlib.import_module("fsspec")
        except ImportError as error:
            raise UnsupportedError(
                f"reading {address} needs fsspec: pip install 'culpa[remote]', and the package of"
                " the store (s3fs, gcsfs, ...)."
            ) from error
        try:
            self._files: Filesystem
            self._files, self._root = fsspec.core.url_to_fs(self.where)
        except (ImportError, ValueError) as error:
            raise UnsupportedError(f"{address} cannot be opened: {error}.") from error
        self._temporary = Path(tempfile.mkdtemp(prefix="culpa-"))
        weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)

    def files(self) -> dict[str, int]:
        """See ``Source``."""
        try:
            found = self._files.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:  # each store fails in its own way
            raise StoreError(f"{self.where} cannot be listed: {error}.") from error
        names = {path: path.removeprefix(self._root).lstrip("/") for path in found}
        return {names[path]: int(facts["size"] or 0) for path, facts in found.items()}

    def read(self, name: str) -> memoryview:
        """See ``Source``."""
        try:
            data: bytes = self._files.cat_file(self._path(name))
        except FileNotFoundError as error:
            raise IntegrityError(f"{self.where}/{name} is missing.") from error
        except Exception as error:  # each store fails in its own way
            raise StoreError(f"{self.where}/{name} cannot be fetched: {error}.") from error
        self._count(name, len(data))
        return memoryview(data)

    def spans(self, name: str, spans: Sequence[Span]) -> list[memoryview]:
        """See ``Source``."""
        wanted = joined(spans, GAP)
        if not wanted:
            return []
        try:
            parts: list[bytes] = self._files.cat_ranges(
                [self._path(name)] * len(wanted),
                [start for start, _ in wanted],
                [stop for _, stop in wanted],
                on_error="raise",
            )
        except FileNotFoundError as error:
            raise IntegrityError(f"{self.where}/{name} is missing.") from error
        except Exception as error:  # each store fails in its own way
            raise StoreError(f"{self.where}/{name} cannot be fetched: {error}.") from error
        self._count(name, sum(map(len, parts)))
        views, starts = [memoryview(part) for part in parts], [start for start, _ in wanted]
        found: list[memoryview] = []
        for start, stop in spans:
            at = bisect_right(starts, start) - 1
            found.append(views[at][start - starts[at] : stop - starts[at]])
        return found

    def local(self, name: str) -> Path:
        """See ``Source``."""
        target = self._temporary / Path(name).name
        if not target.exists():
            target.write_bytes(self.read(name))
        return target

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _count(self, name: str, size: int) -> None:
        self.fetched[name] = self.fetched.get(name, 0) + size

"""Where a run's files are: a folder, or an object store through fsspec. Reading only."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from culpa.errors import IntegrityError, StoreError

Span = tuple[int, int]
"""From a byte to a byte, as in ``data[start:stop]``."""


@runtime_checkable
class Source(Protocol):
    """The files of one run. Names are relative paths with ``/``."""

    where: str

    def files(self) -> dict[str, int]:
        """Every file with its size.

        Raises:
            IntegrityError: if something there is neither a plain file nor a folder.
        """
        ...

    def read(self, name: str) -> memoryview:
        """A whole file."""
        ...

    def spans(self, name: str, spans: Sequence[Span]) -> list[memoryview]:
        """Parts of a file."""
        ...

    def local(self, name: str) -> Path:
        """A path by which a library that needs a file of the operating system can open it."""
        ...


def physical_memory() -> int:
    """Of this machine, in bytes; no state larger than that can be honest here."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this operating system
        return 2**40


class Folder:
    """A folder of this machine. Files are mapped into memory, and links are never followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)
        self._mapped: dict[str, memoryview] = {}

    def files(self) -> dict[str, int]:
        """See ``Source``."""
        found: dict[str, int] = {}
        folders = [self.path]
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    name = Path(entry.path).relative_to(self.path).as_posix()
                    mode = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(mode.st_mode):
                        if name != "states":
                            raise IntegrityError(f"{entry.path} is a folder that no run has.")
                        folders.append(Path(entry.path))
                    else:
                        found[name] = self._regular(Path(entry.path), mode).st_size
        return found

    def read(self, name: str) -> memoryview:
        """See ``Source``."""
        return self._map(name)

    def spans(self, name: str, spans: Sequence[Span]) -> list[memoryview]:
        """See ``Source``."""
        if name not in self._mapped:
            self._mapped[name] = self._map(name)
        return [self._mapped[name][start:stop] for start, stop in spans]

    def local(self, name: str) -> Path:
        """See ``Source``."""
        path = self.path / name
        self._regular(path, self._status(path))
        return path

    def _status(self, path: Path) -> os.stat_result:
        for folder in path.relative_to(self.path).parents:
            if folder != Path() and (self.path / folder).is_symlink():
                raise IntegrityError(f"{self.path / folder} is a link; a run holds plain files.")
        try:
            return path.lstat()
        except FileNotFoundError as error:
            raise IntegrityError(f"{path} is missing.") from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}.") from error

    @staticmethod
    def _regular(path: Path, status: os.stat_result) -> os.stat_result:
        if not stat.S_ISREG(status.st_mode):
            kind = "a link" if stat.S_ISLNK(status.st_mode) else "no plain file"
            raise IntegrityError(f"{path} is {kind}; a run holds plain files only.")
        return status

    def _map(self, name: str) -> memoryview:
        path = self.local(name)
        try:
            # O_NOFOLLOW and O_NONBLOCK: should the file become a link or a pipe meanwhile.
            flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | flags)
            try:
                if not os.fstat(descriptor).st_size:
                    return memoryview(b"")
                return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {error}.") from error


def open_source(path: str | Path) -> Source:
    """The source for a path, or for an address such as ``"s3://bucket/run"``."""
    if isinstance(path, str) and "://" in path:
        from culpa.trajectory.remote import Remote  # fsspec is optional

        return Remote(path)
    return Folder(Path(path))


def joined(spans: Sequence[Span], gap: int) -> list[Span]:
    """Fewer, larger spans that cover the given ones and at most ``gap`` bytes between two."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


Filesystem = Any
"""An fsspec filesystem, which has no types."""

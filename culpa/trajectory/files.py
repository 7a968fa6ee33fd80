"""Durable file writing: a name appears in a folder only with its whole contents on disk.

Whatever a recording does to the disk, it does through these functions and those of log.py, so that
tests can make each of them fail in turn.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old contents or the new, never a part.

    A temporary file in the same folder is written, flushed to disk and renamed; then the folder
    itself is flushed, without which the rename may be lost with the power.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open_new(temporary) as file:
        write(file, data)
        flush(file)
    rename(temporary, path)
    flush_folder(path.parent)


def open_new(path: Path) -> FileIO:
    """A file to write, empty, without a buffer: what ``write`` returns from is with the system."""
    return FileIO(path, "w")


def open_at(path: Path, size: int) -> FileIO:
    """An existing file to write on at byte ``size``; what follows is cut off.

    Raises:
        OSError: also if the file is shorter than that.
    """
    file = FileIO(path, "r+")
    if file.seek(0, os.SEEK_END) < size:
        file.close()
        raise OSError(f"{path} has fewer than {size} bytes")
    file.truncate(size)
    file.seek(size)
    return file


def write(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data``; the system may take it in parts."""
    left = memoryview(data).cast("B")
    while len(left):
        left = left[file.write(left) :]


def flush(file: FileIO) -> None:
    """Wait until the file's contents are on the disk."""
    os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Give a file its name, replacing one of that name."""
    old.replace(new)


def remove(path: Path) -> None:
    """Remove a file that need not be there."""
    path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, those above it, and make all of them durable."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True)
    for folder in made:
        flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

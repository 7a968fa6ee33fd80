"""The rows of a run's batches: in its pack, or in data that the user still has."""

from __future__ import annotations

import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from culpa.errors import IntegrityError, OptionError
from culpa.trajectory.batches import Rows, encode
from culpa.trajectory.chain import row_digest
from culpa.trajectory.gather import Columns, Gathered, Matrix, viewed
from culpa.trajectory.schema import PACK
from culpa.trajectory.source import Folder, Source

Collate = Callable[[list[Any]], Any]
"""What makes a batch of items, as ``torch.utils.data.default_collate`` does."""


@runtime_checkable
class RowStore(Protocol):
    """Where rows come from, by their number in the log."""

    def rows(self, ids: Sequence[int], size: int) -> Rows:
        """Their bytes, uint8 ``[len(ids), size]``."""
        ...


class Pack:
    """Rows stored in the run. ``offsets``: int64, by number, where each begins."""

    def __init__(self, source: Source, offsets: Any) -> None:
        self._source = source
        self._offsets = offsets
        self._memory: Tensor | None = None

    def columns(self, ids: Sequence[int], size: int) -> Columns:
        """The same rows, to be taken column by column: from a folder, in one copy each."""
        if not size or not len(ids) or not isinstance(self._source, Folder):
            return Matrix(self.rows(ids, size))
        if self._memory is None:
            self._memory = viewed(self._source.spans(PACK, [(0, sys.maxsize)])[0])
        starts = self._offsets[np.array(ids)]
        if int(starts.max()) + size > len(self._memory):
            return Matrix(self.rows(ids, size))  # which says which row is missing
        return Gathered(self._memory, torch.from_numpy(starts), size)

    def rows(self, ids: Sequence[int], size: int) -> Rows:
        """See ``RowStore``."""
        starts = self._offsets[list(ids)].tolist()
        parts: list[memoryview] = []
        if size:
            parts = self._source.spans(PACK, [(start, start + size) for start in starts])
        for at, part in enumerate(parts):
            if len(part) != size:
                raise IntegrityError(
                    f"{self._source.where}/{PACK} ends before training example {ids[at]}."
                )
        # Joined at once: row by row it took as long as a small model's forward pass.
        return np.frombuffer(bytearray().join(parts), dtype=np.uint8).reshape(len(starts), size)


def columns(store: RowStore, ids: Sequence[int], size: int) -> Columns:
    """Rows of a store, to be taken column by column."""
    return store.columns(ids, size) if isinstance(store, Pack) else Matrix(store.rows(ids, size))


class Missing:
    """A run recorded with ``examples="reference"`` and opened without its data."""

    def __init__(self, where: str) -> None:
        self._where = where

    def rows(self, ids: Sequence[int], size: int) -> Rows:
        """See ``RowStore``: refused."""
        raise OptionError(
            f"{self._where} keeps digests of its training examples, not the examples: pass the"
            " data, culpa.open_run(path, examples=...)."
        )


class FromBatches:
    """Rows found by digest in batches collated as they were; kept in an anonymous temporary file.

    Args:
        wanted: digest of a row -> its number.
        layouts: every layout of the run, as its canonical JSON.
        batches: read until every row is found.
        where: of the run, for messages.
    """

    def __init__(
        self, wanted: dict[bytes, int], layouts: set[bytes], batches: Iterable[Any], where: str
    ) -> None:
        self._file = tempfile.TemporaryFile(prefix="culpa-")  # noqa: SIM115 (lives as long as this)
        weakref.finalize(self, self._file.close)
        self._offsets: dict[int, int] = {}
        missing = dict(wanted)
        for batch in batches if missing else ():
            encoded = encode(batch)
            layout = encoded.layout.encode()
            if layout not in layouts:
                continue
            for row in encoded.rows:
                number = missing.pop(row_digest(layout, row.data), None)
                if number is not None:
                    self._offsets[number] = self._file.tell()
                    self._file.write(row.data)
            if not missing:
                break
        _none_missing(len(missing), len(wanted), where)

    def rows(self, ids: Sequence[int], size: int) -> Rows:
        """See ``RowStore``."""
        found = np.empty((len(ids), size), dtype=np.uint8)
        for at, number in enumerate(ids):
            self._file.seek(self._offsets[number])
            found[at] = np.frombuffer(self._file.read(size), dtype=np.uint8)
        return found


class FromDataset:
    """Rows found by digest in a map-style data set; read again from it whenever needed.

    Only where each row is found is remembered, and every row read is proved by its digest again.
    """

    def __init__(
        self,
        wanted: dict[bytes, int],
        layouts: set[bytes],
        dataset: Any,
        collate: Collate,
        where: str,
    ) -> None:
        self._dataset, self._collate, self._where = dataset, collate, where
        self._items: dict[int, tuple[int, bytes]] = {}
        missing = dict(wanted)
        for item in range(len(dataset)) if missing else ():
            layout, row = self._row(item)
            if layout in layouts:
                found = row_digest(layout, row.data)
                number = missing.pop(found, None)
                if number is not None:
                    self._items[number] = (item, found)
            if not missing:
                break
        _none_missing(len(missing), len(wanted), where)

    def rows(self, ids: Sequence[int], size: int) -> Rows:
        """See ``RowStore``."""
        found = np.empty((len(ids), size), dtype=np.uint8)
        for at, number in enumerate(ids):
            item, expected = self._items[number]
            layout, row = self._row(item)
            if row_digest(layout, row.data) != expected:
                raise IntegrityError(
                    f"item {item} of the data set given for {self._where} has changed since the"
                    " run was opened. Leave random augmentation out of it."
                )
            found[at] = row
        return found

    def _row(self, item: int) -> tuple[bytes, Any]:
        encoded = encode(self._collate([self._dataset[item]]))
        return encoded.layout.encode(), np.ascontiguousarray(encoded.rows[0])


def given(
    wanted: dict[bytes, int], layouts: set[bytes], data: Any, collate: Collate | None, where: str
) -> RowStore:
    """The rows as ``culpa.open_run(path, examples=data, collate=collate)`` was given them."""
    if collate is not None:
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise OptionError(
                f"open_run(collate=...) goes with a map-style data set, got {type(data).__name__}."
            )
        return FromDataset(wanted, layouts, data, collate, where)
    if not isinstance(data, Iterable):
        raise OptionError(
            f"open_run(examples=...) is an iterable of batches, got {type(data).__name__}; with a"
            " map-style data set pass collate= too."
        )
    return FromBatches(wanted, layouts, data, where)


def _none_missing(missing: int, wanted: int, where: str) -> None:
    if missing:
        raise IntegrityError(
            f"{missing} of the {wanted} training examples of {where} are not in the data given:"
            " it is not the same data, or not collated into the same shapes and dtypes (padding"
            " included)."
        )

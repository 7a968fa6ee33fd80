"""The files of a recording, written one update after another.

culpa.json                    the manifest, replaced whole; a folder without it is no run yet
log.sqlite                    steps, stages, layouts, hyperparameters, generators (log.py)
examples.pack                 the bytes of every distinct row of every batch, end to end
states/000000042.safetensors  a kept state s_42; states/frozen.safetensors what never trains

After a crash the log is what it was at the last commit. The pack may be longer than the log says
and states may lie there that it does not name; both are dropped when the recording goes on. The
pack is flushed, and a state's file is complete, before a commit names them.

A run that was not closed has no root digest. Its chain still stands for all of it up to the last
committed update, and its kept states are those that the log names.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import msgspec
from blake3 import blake3

from culpa.trajectory import digest, files, log, raw
from culpa.trajectory.chain import (
    ChainedMicroBatch,
    StoredMicroBatch,
    field_fingerprints,
    link_content,
)
from culpa.trajectory.frozen import digest_of_all
from culpa.trajectory.items import Noted, Update
from culpa.trajectory.raw import Raw
from culpa.trajectory.rows import LookedUp, RowIndex
from culpa.trajectory.schema import (
    FROZEN_NAME,
    LOG,
    MANIFEST,
    PACK,
    STATES,
    Manifest,
    Stage,
    state_name,
)
from culpa.trajectory.seal import Resuming, as_closed

LARGE_STATE = 2**24  # bytes; the updates before such a state are committed before it is written


class Store:
    """One run folder being written. Errors of disk and database come through as they are."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        connection: sqlite3.Connection,
        pack: FileIO,
        frozen: bytes,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.num_steps = self.committed = 0
        self.dirty = False
        self._log = connection
        self._link = bytes(digest.DIGEST_BYTES)
        self._ids: dict[str, dict[bytes, int]] = {t: {} for t in ("layout", "optimizer", "hypers")}
        self._rows = RowIndex(connection, pack, stored=manifest.examples == "stored")
        self._resuming = Resuming(connection, frozen)
        self._steps: list[tuple[object, ...]] = []  # rows of the log that wait for the commit
        self._stage: Stage | None = None
        self.kept: set[int] = set()

    @classmethod
    def create(
        cls, folder: Path, manifest: Manifest, initial: Sequence[Raw], frozen: bytes
    ) -> Store:
        """A new folder, with the manifest last: before it is there, nothing was recorded.

        Args:
            folder: does not exist.
            manifest: of a recording that begins.
            initial: s_0.
            frozen: the content of the file of the frozen parameters.
        """
        files.make_folder(folder / STATES)
        files.write_durably(folder / FROZEN_NAME, frozen)
        with contextlib.ExitStack() as undo:
            undo.callback(log.abandon, connection := log.create(folder / LOG))
            undo.callback((pack := files.open_new(folder / PACK)).close)
            store = cls(folder, manifest, connection, pack, digest_of_all(frozen, manifest))
            store.keep(0, initial, ())
            store.commit()
            files.flush_folder(folder)
            undo.callback(files.remove, folder / MANIFEST)  # there, but perhaps not for good
            store._write_manifest(manifest)
            undo.pop_all()
        return store

    @classmethod
    def reopen(cls, folder: Path, manifest: Manifest) -> Store:
        """A folder to go on with, back at its last commit; ``manifest`` replaces its own."""
        frozen = digest_of_all((folder / FROZEN_NAME).read_bytes(), manifest)
        with contextlib.ExitStack() as undo:
            undo.callback(log.abandon, connection := log.reopen(folder / LOG))
            rows = "SELECT max(offset + size) FROM example WHERE offset >= 0"  # -1: by reference
            end = log.rows(connection, rows)[0][0] or 0
            undo.callback((pack := files.open_at(folder / PACK, end)).close)
            store = cls(folder, manifest, connection, pack, frozen)
            store._load()
            store._remove_orphans()
            store._write_manifest(manifest)
            undo.pop_all()
        return store

    def _load(self) -> None:
        for table, known in self._ids.items():
            known.update(log.rows(self._log, f"SELECT json, id FROM {table}"))
        self._rows.load()
        self._resuming.load()
        found = log.rows(self._log, "SELECT k + 1, chain FROM step ORDER BY k DESC LIMIT 1")
        if found:
            self.num_steps, self._link = found[0]
        self.committed = self.num_steps
        self.kept = {k for (k,) in log.rows(self._log, "SELECT k FROM state")}

    def look_up(self, updates: Sequence[Update]) -> list[list[LookedUp]]:
        """The rows of updates that are to be appended: which are known already. Writes nothing."""
        found = self._rows.look_up([batch for update in updates for batch in update.batches])
        return [[found.pop(0) for _ in update.batches] for update in updates]

    def append(self, update: Update, rows: Sequence[LookedUp]) -> None:
        """Write one update; durable with the next commit."""
        self.dirty = True
        digests = raw.digests(update.after)
        step = digest.combine(digests)
        fingerprints = b"".join(d[: digest.FINGERPRINT_BYTES] for d in digests)
        stored: list[StoredMicroBatch] = []
        chained: list[ChainedMicroBatch] = []
        for (layout, placements, _, random), looked_up in zip(update.batches, rows, strict=True):
            number = self._id("layout", layout)
            ids, row_digests = self._rows.find(layout, number, looked_up)
            packed_ids = ids.astype("<u4").tobytes()
            stored.append((number, packed_ids, self._random(random), placements))
            random_digest = blake3(random).digest() if random else None
            chained.append((layout, row_digests, random_digest, placements))
        content = (update.optimizer, update.hypers, chained, update.detail, step, fingerprints)
        self._link = digest.chain(self._link, link_content(update.index, *content))
        values = (
            update.index,
            self._id("optimizer", update.optimizer),
            self._id("hypers", update.hypers),
            msgspec.msgpack.encode(stored),
            update.detail,
            step,
            fingerprints,
            self._link,
            field_fingerprints(*content),
        )
        self._steps.append(values)
        self.note(update.notes)
        if self._stage is None or update.stage.name != self._stage.name:
            self._write_stage()
        self._stage = update.stage
        self.num_steps = update.index + 1
        if update.slots is not None:
            self.keep(self.num_steps, [*update.after, *update.slots], update.drop)

    def note(self, rows: Sequence[Noted]) -> None:
        """Where an unfinished recording is to go on."""
        for key, content in rows:
            self.dirty = True
            self._resuming.write(key, content)

    def keep(self, index: int, state: Sequence[Raw], drop: Sequence[int]) -> None:
        """Write a state, and drop others that are not wanted any more."""
        if index in self.kept:
            return
        path, data = self.folder / state_name(index), raw.encode(state)
        if self.dirty and len(data) >= LARGE_STATE:
            self.commit()
        files.write_durably(path, data)
        whole = digest.combine(raw.digests(state))
        self._insert("INTO state VALUES (?, ?, ?)", (index, whole, len(data)))
        self.kept.add(index)
        self.dirty = True
        if drop:
            for k in drop:
                log.execute(self._log, "DELETE FROM state WHERE k = ?", (k,))
            self.commit()  # the log must not name a state whose file is gone
            for k in drop:
                self.kept.remove(k)
                files.remove(self.folder / state_name(k))

    def commit(self) -> None:
        """Make everything so far durable."""
        self._rows.flush()  # rows first: the log must not name bytes that are not there
        self._write_steps()
        self._write_stage()
        self._resuming.seal(self.manifest, self._link)
        log.commit(self._log)
        self.committed, self.dirty = self.num_steps, False

    def finish(self, final: Sequence[Raw] | None, status: str, reason: str, seconds: float) -> None:
        """Write the final state, close the log, and last of all the manifest with the root."""
        if final is not None:
            self.keep(self.num_steps, final, ())
        closed = as_closed(self.manifest, self.num_steps, status, reason, seconds)
        if closed.status == "complete":
            self._resuming.clear()
        self._write_steps()
        self._write_stage()
        self._resuming.seal(closed, self._link)
        self._rows.flush()
        self._rows.close()
        root = self._resuming.root(closed, self._link)
        log.close(self._log, self.folder / LOG, compact=closed.status == "complete")
        self._remove_orphans()
        if status == "recording":
            return
        self._write_manifest(msgspec.structs.replace(closed, root_digest=root))

    def truncate(self, reason: str) -> None:
        """Give up: back to the last commit, and say why in the manifest."""
        log.abandon(self._log)
        self._rows.close()
        self._write_manifest(
            msgspec.structs.replace(self.manifest, status="truncated", reason=reason)
        )

    def _write_manifest(self, manifest: Manifest) -> None:
        files.write_durably(self.folder / MANIFEST, manifest.encode())
        self.manifest = manifest

    def _write_steps(self) -> None:
        if self._steps:
            query = "INSERT INTO step VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            log.execute_many(self._log, query, self._steps)
            self._steps = []

    def _write_stage(self) -> None:
        if self._stage is not None:
            stage = self._stage
            self._insert(
                "OR REPLACE INTO stage VALUES (?, ?, ?)", (stage.name, stage.start, stage.stop)
            )

    def _remove_orphans(self) -> None:
        """Temporary files, and states that a crash left behind before the log named them."""
        named = {self.folder / name for name in (FROZEN_NAME, *map(state_name, self.kept))}
        for path in sorted({*(self.folder / STATES).iterdir()} - named):
            files.remove(path)
        files.remove(self.folder / f"{MANIFEST}.tmp")

    def _insert(self, rest: str, values: Sequence[object]) -> int:
        return log.execute(self._log, f"INSERT {rest}", values)

    def _id(self, table: str, content: bytes) -> int:
        known = self._ids[table]
        if content not in known:
            known[content] = len(known)
            self._insert(f"INTO {table} VALUES (?, ?)", (known[content], content))
        return known[content]

    def _random(self, encoded: bytes | None) -> int | None:
        insert = "INTO random (state) VALUES (?)"
        return None if encoded is None else self._insert(insert, (encoded,))

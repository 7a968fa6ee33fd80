"""Writes a run folder from a thread of its own, so that hashing and disk overlap with training.

culpa.json                    the manifest, replaced whole
log.sqlite                    steps, stages, layouts, hyperparameters, generators (log.py)
examples.pack                 the bytes of every distinct row of every batch, end to end
states/000000042.safetensors  a kept state s_42; states/frozen.safetensors what never trains
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from culpa.errors import StoreError
from culpa.trajectory import digest, log
from culpa.trajectory.batches import EncodedBatch
from culpa.trajectory.chain import (
    ChainedMicroBatch,
    StepDetail,
    StoredMicroBatch,
    link_content,
    root_digest,
    row_digest,
)
from culpa.trajectory.checkpoints import CheckpointPolicy
from culpa.trajectory.files import write_durably
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Manifest, OptimizerSpec, Stage
from culpa.trajectory.state import State

MANIFEST, LOG, PACK, STATES, FROZEN = (
    "culpa.json",
    "log.sqlite",
    "examples.pack",
    "states",
    "frozen",
)
COMMIT_SECONDS = 2.0
"""A crash loses at most the updates of so many seconds."""
QUEUE_BYTES = 256 * 2**20
"""At most about so many bytes of copies wait for the disk before training waits for it."""


@dataclass(frozen=True)
class Commit:
    """One applied update on its way to the disk. ``after.slots`` is filled if ``keep``."""

    index: int
    optimizer: OptimizerSpec
    hypers: bytes
    batches: Sequence[tuple[EncodedBatch, RandomState | None]]
    detail: StepDetail
    after: State
    keep: bool


def state_file(folder: Path, index: int) -> Path:
    """Where s_index is kept."""
    return folder / STATES / f"{index:09d}.safetensors"


class Writer:
    """Owns the files of one recording. ``submit`` returns at once; errors surface later."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        initial: State,
        frozen: State,
        policy: CheckpointPolicy,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.policy = policy
        self.error: Exception | None = None
        self.kept: dict[int, bytes] = {}
        self._stages: list[Stage] = []
        self._link = bytes(digest.DIGEST_BYTES)
        self._ids: dict[str, dict[bytes, int]] = {
            t: {} for t in ("layout", "optimizer", "hypers", "example")
        }
        self._layout_digests: dict[bytes, bytes] = {}
        self._frozen = frozen.digest()
        self._num_steps = 0
        self._last_commit = time.monotonic()
        try:
            (folder / STATES).mkdir(parents=True)
            write_durably(folder / MANIFEST, msgspec.json.encode(manifest))
            write_durably(folder / STATES / f"{FROZEN}.safetensors", frozen.encode())
            self._log = log.create(folder / LOG)
            self._pack = (folder / PACK).open("wb")
            self._keep(0, initial)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot write a run to {folder}: {error}.") from error
        size = sum(v.nbytes for v in initial.params.values()) + 1
        self._queue: queue.Queue[Commit | None] = queue.Queue(max(2, min(64, QUEUE_BYTES // size)))
        self._thread = threading.Thread(target=self._run, name="culpa-writer", daemon=True)
        self._thread.start()

    def submit(self, commit: Commit) -> None:
        """Hand over one update; waits only if the disk is far behind."""
        self.check()
        self._queue.put(commit)

    def check(self) -> None:
        """Raise what went wrong in the writing thread, if anything did."""
        if self.error is not None:
            raise StoreError(f"recording to {self.folder} failed: {self.error}.") from self.error

    def add_stage(self, stage: Stage) -> None:
        """A stage ended."""
        self._stages.append(stage)

    def close(self, final: State | None, status: str, reason: str, plain_seconds: float) -> None:
        """Write what is left, the final state, and the manifest last of all."""
        self._queue.put(None)
        self._thread.join()
        try:
            self.check()
            if final is not None and self._num_steps not in self.kept:
                self._keep(self._num_steps, final)
            with self._pack as pack:
                _flush(pack)
            for stage in self._stages:
                self._log.execute(
                    "INSERT INTO stage VALUES (?, ?, ?)", (stage.name, stage.start, stage.stop)
                )
            log.close(self._log)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot finish the run in {self.folder}: {error}.") from error
        states = sorted(self.kept.items())
        self.manifest = msgspec.structs.replace(
            self.manifest,
            status=status,
            reason=reason,
            num_steps=self._num_steps,
            plain_seconds=plain_seconds,
            root_digest=root_digest(self.manifest, self._link, self._stages, states, self._frozen),
        )
        write_durably(
            self.folder / MANIFEST, msgspec.json.format(msgspec.json.encode(self.manifest))
        )

    def _run(self) -> None:
        while (commit := self._queue.get()) is not None:
            if self.error is not None:
                continue  # drain, so that the training loop never blocks on a dead writer
            try:
                self._write(commit)
            except Exception as error:  # noqa: BLE001 (reported by check() in the caller's thread)
                self.error = error

    def _write(self, commit: Commit) -> None:
        digests = commit.after.step_digests()
        step = digest.combine(digests)
        fingerprints = b"".join(d[: digest.FINGERPRINT_BYTES] for d in digests)
        optimizer = msgspec.json.encode(commit.optimizer)
        detail = msgspec.json.encode(commit.detail)
        stored: list[StoredMicroBatch] = []
        chained: list[ChainedMicroBatch] = []
        for batch, random in commit.batches:
            layout = batch.layout.encode()
            ids, row_digests = self._examples(layout, batch)
            encoded = random.encode() if random is not None else None
            number = self._id("layout", layout)
            stored.append((number, ids.tobytes(), self._random(encoded), batch.placements))
            random_digest = blake3(encoded).digest() if encoded else None
            chained.append((layout, row_digests, random_digest, batch.placements))
        content = link_content(
            commit.index, optimizer, commit.hypers, chained, detail, step, fingerprints
        )
        self._link = digest.chain(self._link, content)
        self._log.execute(
            "INSERT INTO step VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                commit.index,
                self._id("optimizer", optimizer),
                self._id("hypers", commit.hypers),
                msgspec.msgpack.encode(stored),
                detail,
                step,
                fingerprints,
                self._link,
            ),
        )
        self._num_steps = commit.index + 1
        if commit.keep:
            self._keep(commit.index + 1, commit.after)
        if time.monotonic() - self._last_commit > COMMIT_SECONDS:
            self._commit()

    def _examples(
        self, layout: bytes, batch: EncodedBatch
    ) -> tuple[npt.NDArray[np.uint32], list[bytes]]:
        """The ids of a batch's rows, new rows appended to the pack."""
        known, row_digests = self._ids["example"], list[bytes]()
        ids = np.empty(len(batch.rows), dtype="<u4")
        for at, row in enumerate(batch.rows):
            found = row_digest(layout, row.data)
            row_digests.append(found)
            if found not in known:
                known[found] = len(known)
                values = (
                    known[found],
                    found,
                    self._id("layout", layout),
                    self._pack.tell(),
                    row.nbytes,
                )
                self._log.execute("INSERT INTO example VALUES (?, ?, ?, ?, ?)", values)
                self._pack.write(row.data)
            ids[at] = known[found]
        return ids, row_digests

    def _id(self, table: str, content: bytes) -> int:
        known = self._ids[table]
        if content not in known:
            known[content] = len(known)
            self._log.execute(f"INSERT INTO {table} VALUES (?, ?)", (known[content], content))
        return known[content]

    def _random(self, encoded: bytes | None) -> int | None:
        if encoded is None:
            return None
        return self._log.execute("INSERT INTO random (state) VALUES (?)", (encoded,)).lastrowid

    def _keep(self, index: int, state: State) -> None:
        write_durably(state_file(self.folder, index), state.encode())
        found, size = state.digest(), state_file(self.folder, index).stat().st_size
        self._log.execute("INSERT INTO state VALUES (?, ?, ?)", (index, found, size))
        self.kept[index] = found
        dropped = [k for k in self.kept if k not in (0, index) and self.policy.obsolete(k, index)]
        if dropped:
            for k in dropped:
                del self.kept[k]
                self._log.execute("DELETE FROM state WHERE k = ?", (k,))
            self._commit()  # the log must not name a state whose file is gone
            for k in dropped:
                with contextlib.suppress(FileNotFoundError):
                    state_file(self.folder, k).unlink()

    def _commit(self) -> None:
        _flush(self._pack)  # rows first: the log must not name bytes that are not there
        log.commit(self._log)
        self._last_commit = time.monotonic()


def _flush(pack: BufferedWriter) -> None:
    pack.flush()
    os.fsync(pack.fileno())

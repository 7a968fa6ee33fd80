"""The seal of a log: what stands for a run whose root digest nobody has computed yet.

Each commit writes one, into a row of the table ``resume``. It is the root digest that the run would
have if it ended there: so the rows of that table, stages, kept states, the frozen parameters and
the manifest of a recording that crashed are bound to its last update, as those of a closed one are.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

import msgspec

from culpa.trajectory import log
from culpa.trajectory.chain import resuming_digest, resuming_row, root_digest
from culpa.trajectory.schema import Manifest, Stage


class Resuming:
    """The table ``resume`` of a log being written: where it goes on, and the seal.

    Args:
        connection: the log.
        frozen: digest of the parameters that never train.
    """

    def __init__(self, connection: sqlite3.Connection, frozen: bytes) -> None:
        self._log = connection
        self._frozen = frozen
        self._rows: dict[int, bytes] = {}

    def load(self) -> None:
        """What an existing log holds."""
        found = log.rows(self._log, "SELECT id, content FROM resume WHERE id != ?", (log.SEAL,))
        self._rows = {key: resuming_row(key, content) for key, content in found}

    def write(self, key: int, content: bytes) -> None:
        """Write or replace a row."""
        self._rows[key] = resuming_row(key, content)
        self._insert(key, content)

    def clear(self) -> None:
        """There is nothing to go on with any more."""
        self._rows.clear()
        log.execute(self._log, "DELETE FROM resume")

    def seal(self, manifest: Manifest, link: bytes) -> None:
        """Write the seal; to be followed by a commit."""
        self._insert(log.SEAL, bytes.fromhex(self.root(as_recording(manifest), link)))

    def root(self, manifest: Manifest, link: bytes) -> str:
        """The root digest of the log as it stands."""
        named = log.rows(self._log, "SELECT name, start, stop FROM stage ORDER BY start")
        states = log.rows(self._log, "SELECT k, digest FROM state ORDER BY k")
        stages, rest = [Stage(*row) for row in named], in_order(self._rows)
        return root_digest(manifest, link, stages, states, self._frozen, rest)

    def _insert(self, key: int, content: bytes) -> None:
        log.execute(self._log, "INSERT OR REPLACE INTO resume VALUES (?, ?)", (key, content))


def in_order(rows: Mapping[int, bytes]) -> bytes:
    """The digest of the rows to go on from, given each one's by its key."""
    return resuming_digest(rows[key] for key in sorted(rows))


def as_recording(manifest: Manifest) -> Manifest:
    """The manifest as it was, or will be, while the run goes on."""
    return msgspec.structs.replace(
        manifest, status="recording", reason="", num_steps=0, root_digest="", plain_seconds=0.0
    )


def after_job(manifest: Manifest, number: int) -> Manifest:
    """The manifest of the complete run that a further job went on with, but its root digest."""
    job = manifest.earlier[number]
    return msgspec.structs.replace(
        manifest,
        status="complete",
        reason="",
        num_steps=job.stop,
        root_digest="",
        plain_seconds=job.plain_seconds,
        jobs=manifest.earlier[:number] or msgspec.UNSET,
    )


def as_closed(
    manifest: Manifest, num_steps: int, status: str, reason: str, seconds: float
) -> Manifest:
    """The manifest at the end of a job, but its root digest.

    A job that went on with a run and made no update leaves it as it was.
    """
    jobs = manifest.earlier
    if jobs and jobs[-1].stop == num_steps:
        return after_job(manifest, len(jobs) - 1)
    seconds += jobs[-1].plain_seconds if jobs else 0.0
    return msgspec.structs.replace(
        manifest, status=status, reason=reason, num_steps=num_steps, plain_seconds=seconds
    )

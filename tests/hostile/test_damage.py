"""Flipped, missing, truncated, swapped and added bytes; runs that a crash left unfinished."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

import culpa
from culpa.trajectory import reader
from culpa.trajectory.schema import LOG, MANIFEST, PACK, state_name
from hostile import forge

STRIDE = {LOG: 211, MANIFEST: 7, PACK: 1}
"""Every so-manieth byte is flipped; of states every 5th. (All of them were tried once by hand.)"""
COARSER = [pytest.param(5, id="quick"), pytest.param(1, id="whole", marks=pytest.mark.slow)]
"""Times a stride; odd, so that every byte of a number has its turn."""


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forge.record(tmp_path_factory.mktemp("honest") / "run").path


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return forge.copy_of(honest, tmp_path / "run")


def refused(path: Path) -> str:
    """What a reader says, which must be an error of ours; empty if it notices nothing."""
    try:
        forge.examine(path)
    except culpa.CulpaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("coarser", COARSER)
def test_no_flipped_byte_that_matters_goes_unnoticed(coarser: int, run: Path) -> None:
    honest_log = forge.contents(run / LOG)
    missed: list[tuple[str, int]] = []
    tried = harmless = 0
    for file in sorted(f for f in run.rglob("*") if f.is_file()):
        name = file.relative_to(run).as_posix()
        for at in range(0, file.stat().st_size, coarser * STRIDE.get(name, 5)):
            mask = 1 << (at % 8)
            forge.flip(file, at, mask)
            tried += 1
            if not refused(run):
                # SQLite leaves space unused in its pages and numbers in its header that it does
                # not read: such a byte changes the answer of no query, looked up or scanned.
                if name == LOG and forge.contents(file) == honest_log:
                    harmless += 1
                else:
                    missed.append((name, at))
            forge.flip(file, at, mask)
    assert not missed
    assert tried > 1500 / coarser
    assert harmless < 0.6 * len(range(0, (run / LOG).stat().st_size, coarser * STRIDE[LOG]))
    assert not refused(run)


@pytest.mark.parametrize("file", [MANIFEST, LOG, PACK, state_name(0), state_name(4), state_name(6)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_no_cut_goes_unnoticed(file: str, share: float, run: Path) -> None:
    os.truncate(run / file, int((run / file).stat().st_size * share))
    assert str(run) in refused(run)


def test_no_missing_file_goes_unnoticed(run: Path, tmp_path: Path) -> None:
    for name in sorted(f.relative_to(run).as_posix() for f in run.rglob("*") if f.is_file()):
        damaged = forge.copy_of(run, tmp_path / "damaged")
        (damaged / name).unlink()
        assert Path(name).name in refused(damaged)


def change(statement: str) -> Callable[[Path], None]:
    return lambda path: forge.sql(path, statement)


NAMED: dict[str, tuple[Callable[[Path], None], str]] = {
    "detail": (
        change(
            "UPDATE step SET detail = CAST(replace(CAST(detail AS TEXT), 'true', 'false') AS BLOB)"
            " WHERE k = 4"
        ),
        "update 4 .* its detail",
    ),
    "hypers": (
        change("UPDATE hypers SET json = CAST(replace(CAST(json AS TEXT), '0.05', '0.5') AS BLOB)"),
        "update 0 .* its hypers",
    ),
    "optimizer": (
        change(
            "UPDATE optimizer SET json = CAST(replace(CAST(json AS TEXT), 'AdamW', 'Adam') AS BLOB)"
        ),
        "update 0 .* its optimizer",
    ),
    "digest": (
        change("UPDATE step SET digest = zeroblob(32) WHERE k = 2"),
        "update 2 .* its digest",
    ),
    "fingerprints": (
        change("UPDATE step SET fingerprints = zeroblob(length(fingerprints)) WHERE k = 2"),
        "update 2 .* its fingerprints",
    ),
    "rows": (
        change(
            "UPDATE step SET micro_batches = (SELECT micro_batches FROM step WHERE k = 3),"
            " fields = fields WHERE k = 4"
        ),
        "update 4 .* its rows, random",
    ),
    "link": (change("UPDATE step SET chain = zeroblob(32) WHERE k = 2"), "update 2 .* its link"),
    "fields": (
        change("UPDATE step SET fields = zeroblob(36) WHERE k = 4"),
        "update 4 .* its optimizer",
    ),
    "tensor": (
        lambda path: forge.flip(path / state_name(4), (path / state_name(4)).stat().st_size - 1),
        f"{state_name(4)} was changed: a slot of the optimizer",
    ),
    "example": (lambda path: forge.flip(path / PACK, 45), f"{PACK}: training example 2"),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_message_names_file_update_and_field(name: str, run: Path) -> None:
    damage, message = NAMED[name]
    damage(run)
    with pytest.raises(culpa.IntegrityError, match=message) as caught:
        forge.examine(run)
    assert str(run) in str(caught.value)


def test_a_parameter_changed_in_a_state_is_named(run: Path) -> None:
    file = run / state_name(4)
    data = file.read_bytes()
    from culpa.trajectory import tensors

    wanted = {name: e for name, e, _ in tensors.entries(memoryview(data))}["params/head.weight"]
    body = 8 + int.from_bytes(data[:8], "little")
    forge.flip(file, body + wanted.data_offsets[0], 1)
    with pytest.raises(culpa.IntegrityError, match=r"update 3 led to: .*in params/head\.weight\."):
        forge.examine(run)


def test_a_forger_who_reseals_the_folder_is_caught_by_the_quoted_digest(run: Path) -> None:
    quoted = culpa.open_run(run).root_digest
    culpa.open_run(run).verify(root_digest=quoted)
    forge.edit_manifest(run, lambda fields: fields.update(created="1999-01-01T00:00:00+00:00"))
    with pytest.raises(culpa.IntegrityError, match="root digest"):
        culpa.open_run(run).verify()
    forge.reseal(run)
    culpa.open_run(run).verify()  # whole again in itself
    with pytest.raises(culpa.IntegrityError, match="not the run quoted"):
        culpa.open_run(run).verify(root_digest=quoted)


def test_a_forger_who_reseals_other_slots_is_caught_by_replay(run: Path) -> None:
    file = run / state_name(4)
    forge.flip(file, file.stat().st_size - 1, 1)  # of the step counter, the last tensor there
    from culpa.trajectory import digest, tensors

    found = {
        n: tensors.entry_digest(n, e, raw)
        for n, e, raw in tensors.entries(memoryview(file.read_bytes()))
    }
    forged = digest.combine(found[n] for n in sorted(found))
    forge.sql(run, "UPDATE state SET digest = ? WHERE k = 4", values=(forged,))
    forge.reseal(run)
    opened = culpa.open_run(run)
    opened.verify()
    with pytest.raises(culpa.IntegrityError, match=r"update 3 leads to another optimizer state"):
        opened.verify(forge.problem(), level="replay")


def test_sampled_segments_are_fewer_and_random(run: Path) -> None:
    opened = culpa.open_run(run)
    counts = {opened.verify(forge.problem(), level="replay", sample=n).executed for n in (1, 2)}
    assert counts == {2, 4}
    assert opened.verify(forge.problem(), level="replay", sample=99).executed == forge.UPDATES
    for options in ({"sample": 1}, {"sample": 0, "level": "replay"}):
        with pytest.raises(culpa.OptionError, match="sample"):
            opened.verify(forge.problem(), **options)


# Unfinished runs: no root digest, but every update that was committed counts.


def crash(path: Path) -> None:
    """What a crash in update 5 leaves: no last state, one stage, half-written files, a manifest
    that was written when recording began."""
    forge.sql(
        path,
        "DELETE FROM step WHERE k = 5",
        "DELETE FROM random WHERE id > 4",
        "DELETE FROM state WHERE k = 6",
        "DELETE FROM stage WHERE start = 3",
    )
    forge.edit_manifest(
        path, lambda m: m.update(status="recording", root_digest="", num_steps=0, plain_seconds=0.0)
    )
    forge.seal(path)
    with (path / PACK).open("ab") as pack:
        pack.write(b"half a row")
    (path / f"{MANIFEST}.tmp").write_bytes(b"{")
    (path / f"{state_name(5)}.tmp").write_bytes(b"\0\0")


def test_an_unfinished_run_verifies_and_says_so(run: Path) -> None:
    crash(run)
    opened = culpa.open_run(run)
    found = opened.verify()
    assert not found.finished
    assert "UNFINISHED" in str(found)
    assert (found.updates, found.states) == (5, 3)
    assert opened.verify(forge.problem(), level="replay").executed == 5
    with pytest.raises(culpa.IntegrityError, match="not the run quoted"):
        opened.verify(root_digest="0" * 64)


@pytest.mark.parametrize("damage", NAMED)
def test_damage_to_what_was_committed_is_found_in_unfinished_runs(damage: str, run: Path) -> None:
    crash(run)
    NAMED[damage][0](run)
    assert refused(run)


def test_an_unfinished_run_is_no_place_to_hide_things(run: Path) -> None:
    crash(run)
    (run / "model.pkl").write_bytes(b"\x80")
    assert "model.pkl is not part" in refused(run)


def test_orphans_of_a_crash_are_refused_in_finished_runs(run: Path, tmp_path: Path) -> None:
    for name in (f"{MANIFEST}.tmp", state_name(3), f"{LOG}-wal"):
        damaged = forge.copy_of(run, tmp_path / "damaged")
        (damaged / name).write_bytes(b"x")
        assert "is not part of the run" in refused(damaged)
    with (run / PACK).open("ab") as pack:
        pack.write(b"x")
    assert PACK in refused(run)


def test_calling_a_run_unfinished_does_not_hide_that_it_has_a_root(run: Path) -> None:
    forge.edit_manifest(run, lambda fields: fields.update(status="recording"))
    assert "root digest" in refused(run)


@pytest.fixture
def write_ahead(run: Path, tmp_path: Path) -> Path:
    """A crashed run whose last update is only in the write-ahead file."""
    crash(run)
    connection = sqlite3.connect(run / LOG)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    with connection:
        connection.execute("DELETE FROM step WHERE k = 4")
        connection.execute("DELETE FROM random WHERE id > 3")
    forge.seal(run)
    crashed = tmp_path / "crashed"
    shutil.copytree(run, crashed)
    connection.close()
    return crashed


def test_what_is_only_in_the_write_ahead_file_counts(write_ahead: Path) -> None:
    assert (write_ahead / f"{LOG}-wal").stat().st_size
    assert culpa.open_run(write_ahead).verify().updates == 4


def test_a_write_ahead_log_that_cannot_be_opened_in_place_is_read_from_a_copy(
    write_ahead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = reader._connect

    def read_only(owner, path: Path, options: str, size: int) -> sqlite3.Connection:
        if path.parent == write_ahead:
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(owner, path, options, size)

    monkeypatch.setattr(reader, "_connect", read_only)
    assert culpa.open_run(write_ahead).verify().updates == 4

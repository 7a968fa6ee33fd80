"""Every write, flush, rename, removal and statement fails in turn; then the power goes at each."""

from __future__ import annotations

import shutil
import sqlite3
import warnings
from pathlib import Path
from typing import Any

import pytest

import culpa
from crash.faults import Disk, Platter
from crash.harness import STEPS, fingerprint, train
from culpa.trajectory import log
from culpa.trajectory.schema import MANIFEST

OPTIONS: dict[str, Any] = {"epochs": 1, "durability": culpa.Durability(seconds=60.0, updates=6)}


class Operations:
    """What a recording without a fault does to the disk, and where it ends."""

    def __init__(self, folder: Path) -> None:
        begun: list[int] = []

        def note(k: int, name: str) -> None:
            if (folder / "whole" / MANIFEST).exists():
                begun.append(k)

        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, before=note)
            self.final = fingerprint(train(folder / "whole", **OPTIONS))
        self.count = disk.count
        self.begun = begun[0]  # the first manifest has its name, and is not yet durable
        self.kinds = set(disk.names)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Operations:
    return Operations(tmp_path_factory.mktemp("operations"))


def test_the_shim_sees_what_there_is(operations: Operations) -> None:
    expected = {"write", "flush", "rename", "remove", "make_folder", "flush_folder", "execute"}
    assert operations.kinds >= expected
    assert operations.count > 100


def fault(path: Path, truth: bytes, k: int, until: int, *, half: bool) -> int:
    """One fault: training ends as if nothing was; the updates lost of those committed (none)."""
    committed = [0]

    def counting(connection: sqlite3.Connection) -> None:
        real(connection)
        committed[0] = connection.execute("SELECT count(*) FROM step").fetchone()[0]

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disk = Disk(patch, k, until, half=half)
        real = log.commit
        patch.setattr(log, "commit", counting)
        assert fingerprint(train(path, **OPTIONS)) == truth
    told = [w for w in caught if issubclass(w.category, culpa.RecordingStopped)]
    try:
        run = culpa.open_run(path)
    except culpa.StoreError:
        assert committed[0] == 0  # before there was a run, so there is none
        run = None
    if run is not None:
        run.verify(level="digest")
        assert run.num_steps >= committed[0]
        complete = run.manifest.status == "complete"
        # A folder that cannot be flushed any more is told of, though its manifest is there.
        assert len(told) == (disk.failed[0] == "flush_folder" if complete else 1)
        if told and until - k == 1:  # the disk was well again for the note
            assert run.manifest.status == "truncated"
            assert run.manifest.reason
        lost = committed[0] - run.num_steps
        if complete:
            assert run.num_steps == 15
            return 0
    else:
        assert len(told) == 1
        lost = 0
    assert disk.failed
    del run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = fingerprint(train(path, resume=True, **OPTIONS))
        except culpa.StoreError:  # only the manifest had been missing
            assert culpa.open_run(path).manifest.status == "complete"
            found = truth
    assert found == truth
    again = culpa.open_run(path)
    assert again.verify(level="digest").finished
    assert fingerprint({**again.final_state(), **again.final_buffers()}) == truth
    return max(0, lost)


def faults(folder: Path, operations: Operations, step: int, first: int = 0) -> int:
    tried = 0
    for k in range(first, operations.count, step):
        for until, half in ((k + 1, True), (10**9, False)):
            path = folder / "run"
            assert fault(path, operations.final, k, until, half=half) == 0, k
            shutil.rmtree(path, ignore_errors=True)
            tried += 1
    return tried


def test_training_survives_a_failing_disk(operations: Operations, tmp_path: Path) -> None:
    assert faults(tmp_path, operations, step=29, first=3) > 10


def test_training_survives_a_fault_just_as_the_run_begins_and_ends(
    operations: Operations, tmp_path: Path
) -> None:
    begins = range(operations.begun - 1, operations.begun + 2)
    ends = range(operations.count - 6, operations.count)
    for k in (*begins, *ends):
        for until, half in ((k + 1, True), (10**9, False)):
            assert fault(tmp_path / "run", operations.final, k, until, half=half) == 0, k
            shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.slow
def test_training_survives_every_fault(operations: Operations, tmp_path: Path) -> None:
    assert faults(tmp_path, operations, step=1) == 2 * operations.count


def power_lost(folder: Path, truth: bytes, k: int) -> int:
    """Cut the power before operation k; the updates lost of those committed."""
    path, found = folder / "run", folder / "found"
    committed = [0]
    with pytest.MonkeyPatch.context() as patch:
        platter = Platter(patch, path)
        real = log.commit

        def counting(connection: sqlite3.Connection) -> None:
            real(connection)
            committed[0] = connection.execute("SELECT count(*) FROM step").fetchone()[0]

        patch.setattr(log, "commit", counting)
        at_loss = [0]

        def cut(operation: int, name: str) -> None:
            if operation == k:
                platter.restore(found)
                at_loss[0] = committed[0]

        Disk(patch, before=cut)
        train(path, **OPTIONS)
    shutil.rmtree(path)
    found.rename(path)
    try:
        run = culpa.open_run(path)
    except culpa.StoreError:
        assert at_loss[0] == 0
    else:
        run.verify(level="digest")
        assert run.num_steps >= at_loss[0]
        del run
    try:
        assert fingerprint(train(path, resume=True, **OPTIONS)) == truth
    except culpa.StoreError:
        again = culpa.open_run(path)
        assert again.manifest.status == "complete"
        assert fingerprint({**again.final_state(), **again.final_buffers()}) == truth
    shutil.rmtree(path)
    return 0


def test_a_lost_power_line_loses_no_committed_update(
    operations: Operations, tmp_path: Path
) -> None:
    for k in range(2, operations.count, 41):
        power_lost(tmp_path, operations.final, k)


@pytest.mark.slow
def test_the_power_may_go_at_any_operation(operations: Operations, tmp_path: Path) -> None:
    for k in range(operations.count):
        power_lost(tmp_path, operations.final, k)


def test_strict_raises(tmp_path: Path, operations: Operations) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, operations.count // 2)
        with pytest.raises(culpa.StoreError, match=r"disk is full|No space left"):
            train(tmp_path / "run", strict=True, **OPTIONS)
    run = culpa.open_run(tmp_path / "run")
    run.verify(level="digest")
    assert run.num_steps < STEPS


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path, operations: Operations) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(culpa.RecordingStopped, match="Not a directory"):
        assert fingerprint(train(tmp_path / "file" / "run", **OPTIONS)) == operations.final
    with pytest.raises(culpa.StoreError):
        train(tmp_path / "file" / "run", strict=True, **OPTIONS)

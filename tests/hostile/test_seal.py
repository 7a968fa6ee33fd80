"""Runs that nobody closed have no root digest; their seal stands for all that they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import culpa
from culpa.trajectory.log import POINT, SEAL, draw_id, loop_id
from culpa.trajectory.schema import FROZEN_NAME, LOG, MANIFEST, state_name
from hostile import forge

STRIDE = {LOG: 151, MANIFEST: 5}
"""Every so-manieth byte is flipped here; all of them were, by hand."""
COARSER = [pytest.param(5, id="quick"), pytest.param(1, id="whole", marks=pytest.mark.slow)]
"""Times a stride."""


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forge.record_in_part(tmp_path_factory.mktemp("unfinished") / "run")


@pytest.fixture
def run(unfinished: Path, tmp_path: Path) -> Path:
    return forge.copy_of(unfinished, tmp_path / "run")


def refused(path: Path) -> str:
    try:
        forge.examine(path)
    except culpa.CulpaError as error:
        return str(error)
    return ""


def test_an_honest_one_passes_and_goes_on(run: Path) -> None:
    opened = culpa.open_run(run)
    found = opened.verify()
    assert (found.finished, found.updates) == (False, 4)
    keys = {key for key, _ in opened.tables.log.rows("resume")}
    assert {SEAL, POINT, draw_id(0, 0), loop_id(0), draw_id(1, 0)} <= keys


@pytest.mark.parametrize("coarser", COARSER)
def test_every_flipped_byte_is_noticed(coarser: int, run: Path) -> None:
    honest = forge.contents(run / LOG)
    missed: list[tuple[str, int]] = []
    harmless = 0
    for name in (LOG, MANIFEST, FROZEN_NAME, state_name(0), state_name(4)):
        file = run / name
        for at in range(0, file.stat().st_size, coarser * STRIDE.get(name, 3)):
            forge.flip(file, at, mask := 1 << (at % 8))
            if not refused(run):
                if name == LOG and forge.contents(file) == honest:
                    harmless += 1  # of a page's unused space
                else:
                    missed.append((name, at))
            forge.flip(file, at, mask)
    assert not missed
    assert not refused(run)
    assert harmless


CONTENT = "UPDATE resume SET content = ? WHERE id = ?"
CHANGED: dict[str, Callable[[Path], None]] = {
    "a bit of the point": lambda path: flip_row(path, POINT),
    "a bit of the generators before a draw": lambda path: flip_row(path, draw_id(0, 0)),
    "a bit of the end of a loop": lambda path: flip_row(path, loop_id(0)),
    "a bit of the seal": lambda path: flip_row(path, SEAL),
    "the point removed": lambda path: forge.sql(path, f"DELETE FROM resume WHERE id = {POINT}"),
    "a draw removed": lambda path: forge.sql(
        path, f"DELETE FROM resume WHERE id = {draw_id(1, 0)}"
    ),
    "a draw added": lambda path: forge.sql(
        path, f"INSERT INTO resume SELECT {draw_id(1, 1)}, content FROM resume WHERE id > 0 LIMIT 1"
    ),
    "a draw moved": lambda path: forge.sql(
        path, f"UPDATE resume SET id = {draw_id(1, 7)} WHERE id = {draw_id(1, 0)}"
    ),
    "the seal removed": lambda path: forge.sql(path, f"DELETE FROM resume WHERE id = {SEAL}"),
    "all removed": lambda path: forge.sql(path, "DELETE FROM resume"),
    "a stage renamed": lambda path: forge.sql(path, "UPDATE stage SET name = 'other'"),
    "a stage longer": lambda path: forge.sql(path, "UPDATE stage SET stop = 68"),
    "a stage moved": lambda path: forge.sql(path, "UPDATE stage SET start = 1"),
    "a state removed": lambda path: remove_state(path, 2),
    "the last update removed": lambda path: remove_update(path, 3),
    "another environment": lambda path: forge.edit_manifest(
        path, lambda m: m["environment"].update(torch="1.0")
    ),
    "another date": lambda path: forge.edit_manifest(path, lambda m: m.update(created="1999")),
    "a number of updates": lambda path: forge.edit_manifest(path, lambda m: m.update(num_steps=3)),
    "a manifest in other words": lambda path: (path / MANIFEST).write_bytes(
        (path / MANIFEST).read_bytes() + b"\n"
    ),
}


def flip_row(path: Path, key: int) -> None:
    found = dict(culpa.open_run(path).tables.log.rows("resume"))[key]
    changed = found[:-1] + bytes([found[-1] ^ 4])
    forge.sql(path, CONTENT, values=(changed, key))


def remove_state(path: Path, k: int) -> None:
    forge.sql(path, f"DELETE FROM state WHERE k = {k}")
    (path / state_name(k)).unlink()


def remove_update(path: Path, k: int) -> None:
    forge.sql(
        path,
        f"DELETE FROM step WHERE k = {k}",
        f"DELETE FROM state WHERE k = {k + 1}",
        f"UPDATE stage SET stop = {k}",
    )
    (path / state_name(k + 1)).unlink()


@pytest.mark.parametrize("name", CHANGED)
def test_what_was_changed_is_noticed(name: str, run: Path) -> None:
    CHANGED[name](run)
    assert refused(run)


def test_a_damaged_point_is_not_gone_on_from(run: Path) -> None:
    flip_row(run, POINT)
    task = forge.problem()
    optimizer = forge.torch.optim.AdamW(task.model.head.parameters(), lr=0.05)
    scheduler = forge.torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with (
        pytest.raises(culpa.IntegrityError, match=r"table resume: its seal"),
        culpa.record(run, task, optimizer, scheduler=scheduler, resume=True),
    ):
        pass

"""kill -9 at random moments: the folder opens, is whole, and training goes on as if undisturbed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import culpa
from crash.harness import Tally, fingerprint, life, train, undisturbed
from culpa.trajectory.schema import state_name


def kill(folder: Path, kills: int, seed: int) -> Tally:
    undisturbed(folder / "warm")
    truth, tally, chance = undisturbed(folder / "truth"), Tally(), random.Random(seed)
    number = 0
    while tally.kills < kills:
        life(folder / str(number), truth, chance, tally)
        number += 1
    return tally


def test_killed_recordings_go_on(tmp_path: Path) -> None:
    tally = kill(tmp_path, 12, seed=1)
    assert tally.resumed > 0


def test_a_run_that_was_being_replaced_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    truth = fingerprint(train(path, epochs=1))

    def killed(folder: Path) -> None:
        (folder / state_name(0)).unlink()  # any of its files may be the first to go
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train(path, epochs=1, overwrite=True)
    with pytest.raises(culpa.StoreError, match="no culpa run"):
        culpa.open_run(path)
    assert fingerprint(train(path, epochs=1, resume=True)) == truth
    assert culpa.open_run(path).verify().finished


@pytest.mark.slow
def test_killed_recordings_go_on_hundreds_of_times(tmp_path: Path) -> None:
    tally = kill(tmp_path, 250, seed=2)
    assert tally.resumed > 50
    assert tally.most_lost > 0  # the bound was tried

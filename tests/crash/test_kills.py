"""kill -9 at random moments: the folder opens, is whole, and training goes on as if undisturbed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from crash.harness import Tally, life, undisturbed


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


@pytest.mark.slow
def test_killed_recordings_go_on_hundreds_of_times(tmp_path: Path) -> None:
    tally = kill(tmp_path, 250, seed=2)
    assert tally.resumed > 50
    assert tally.most_lost > 0  # the bound was tried

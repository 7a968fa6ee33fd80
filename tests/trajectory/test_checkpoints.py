"""Policies decide which states are kept; the first and the last always are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import culpa
from crash.harness import STEPS, fingerprint, train

BOUNDARIES = {0, STEPS // 3, 2 * STEPS // 3, STEPS}


def kept(path: Path, policy: Any) -> tuple[set[int], culpa.Run]:
    final = fingerprint(train(path, checkpoints=policy))
    run = culpa.open_run(path)
    run.verify(level="digest")
    assert fingerprint({**run.final_state(), **run.final_buffers()}) == final
    return set(run.kept_states), run


def test_all_every_and_stages(tmp_path: Path) -> None:
    assert kept(tmp_path / "all", culpa.All())[0] == set(range(STEPS + 1))
    assert kept(tmp_path / "every", culpa.Every(10))[0] == {*range(0, STEPS, 10), STEPS}
    assert kept(tmp_path / "stages", culpa.AtStages())[0] == BOUNDARIES


@pytest.mark.parametrize("states", [2, 3, 7, 20, 1000])
def test_a_budget_is_used_and_kept(states: int, tmp_path: Path) -> None:
    whole = kept(tmp_path / "whole", culpa.Every(STEPS))[1]
    size = (whole.path / "states" / f"{STEPS:09d}.safetensors").stat().st_size
    budget = culpa.Budget(int(states * size * 1.25))
    found, run = kept(tmp_path / "run", budget)
    files = [f for f in (run.path / "states").iterdir() if f.stem.isdigit()]
    assert sum(f.stat().st_size for f in files) <= budget.bytes
    assert {0, STEPS} <= found
    if 2 < states < STEPS:
        assert len(found) > states / 3  # strides are powers of two
    gaps = {b - a for a, b in zip(sorted(found), sorted(found)[1:], strict=False)}
    assert len(gaps) <= 2


@pytest.mark.parametrize("policy", [lambda: culpa.Budget(0), lambda: culpa.Every(0)])
def test_impossible_policies_are_refused(policy: Any) -> None:
    with pytest.raises(culpa.OptionError):
        policy()

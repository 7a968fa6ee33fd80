"""Reading several updates at once, columns gathered from the pack, and digests of live tensors."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import culpa
from culpa.trajectory import ahead as ahead_module
from culpa.trajectory import digest, steps
from culpa.trajectory.ahead import ahead
from culpa.trajectory.gather import Gathered, Matrix, viewed
from culpa.trajectory.live import Live
from culpa.trajectory.walk import session
from oracles.compare import assert_bitwise

K = 70
Made = tuple[culpa.Run, culpa.Problem, list[Any]]


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Seventy updates, more than are read at once, and the batches they were made of."""
    torch.manual_seed(3)
    model = nn.Linear(4, 3)
    problem = culpa.Problem(model, _loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = torch.randn(30, 4), torch.randint(0, 3, (30,))
    rows = [torch.randperm(30)[: 2 + k % 5] for k in range(K)]
    batches: list[Any] = [(inputs[i], targets[i]) for i in rows]
    folder = tmp_path_factory.mktemp("ahead") / "run"
    with culpa.record(folder, problem, optimizer) as recorder:
        for batch in recorder.batches(batches):
            optimizer.zero_grad()
            _loss(model, batch).backward()
            optimizer.step()
    return culpa.open_run(folder), problem, batches


@pytest.mark.parametrize("most", [1, 300, 2**23])
def test_material_is_that_of_each_update(
    made: Made, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_module, "BYTES", most)
    run, _, batches = culpa.open_run(made[0].path), made[1], made[2]
    without = {4, 5, 40}
    for k, material in zip(range(3, K), ahead(run, range(3, K), without), strict=True):
        assert material.record == run.tables.step(k)
        assert material.randoms == run.randoms_of(k)
        if k in without:
            assert material.batches == []
            continue
        (found,) = material.batches
        assert isinstance(found, tuple)
        for here, there in zip(found, batches[k], strict=True):
            assert torch.equal(here, there)
            assert here.dtype == there.dtype
            assert here.data_ptr() % 64 == 0  # what recorded tensors were, or their placement says


def test_every_batch_is_a_copy(made: Made) -> None:
    run, _, batches = made
    for material in ahead(run, range(K)):
        material.batches[0][0].zero_()  # as a loss may that normalises in place
    (again,) = run.batches_of(7)
    assert torch.equal(again[0], batches[7][0])


def test_few_updates_wait(made: Made) -> None:
    run, walked = culpa.open_run(made[0].path), ahead(made[0], range(K))
    read = list[int]()

    def counted(k: int) -> list[Any]:
        read.append(k)
        return run.batches_of(k)

    made[0].batches_of = counted
    try:
        next(walked)
        assert read == list(range(ahead_module.AT_ONCE))
        for _ in range(ahead_module.AT_ONCE - 1):
            next(walked)
        assert len(read) == ahead_module.AT_ONCE
    finally:
        del made[0].batches_of


def test_steps_are_read_together_only_in_turn(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    run = culpa.open_run(made[0].path)
    asked, step = list[int](), run.tables.step
    monkeypatch.setattr(run.tables, "step", lambda k: asked.append(k) or step(k))
    for k in (60, 10, 30):
        assert run.step(k).index == k
    assert asked == [60, 10, 30]  # one by one: nothing tells what comes next
    for k in range(11, 11 + steps.AT_ONCE):
        assert run.step(k) == step(k)
    assert asked == [60, 10, 30]  # all of these in one query


def test_a_damaged_update_is_told_when_it_is_reached(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made[0].path, tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "log.sqlite") as log:
        log.execute("UPDATE step SET digest = x'00' WHERE k = 9")
    log.close()
    run, seen = culpa.open_run(tmp_path / "run"), list[int]()
    with pytest.raises(culpa.IntegrityError, match="update 9"):
        seen.extend(material.record.index for material in ahead(run, range(K)))
    assert seen == list(range(9))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 30), st.lists(st.integers(0, 200), min_size=1))
def test_gathered_columns_are_those_of_the_rows(width: int, at: int, starts: list[int]) -> None:
    memory = bytes(range(256)) * 2
    at = min(at, width - 1)
    rows = np.stack([np.frombuffer(memory[s : s + width], dtype=np.uint8) for s in starts])
    found = Gathered(viewed(memoryview(memory)[: 200 + width]), torch.tensor(starts), width)
    plain = Matrix(rows)
    assert (found.count, found.width) == (plain.count, plain.width) == rows.shape
    for part in ((0, width), (at, width), (at, at + 1)):
        expected = rows[:, part[0] : part[1]].reshape(-1).tolist()
        assert found.column(*part).tolist() == plain.column(*part).tolist() == expected


def test_a_pack_that_ends_early_is_named(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made[0].path, tmp_path / "run")
    pack = next(p for p in (tmp_path / "run").iterdir() if p.name.startswith("examples"))
    pack.write_bytes(pack.read_bytes()[:-1])
    run = culpa.open_run(tmp_path / "run")
    last = len(run.tables.examples) - 1
    k = next(k for k in range(K) if last in run.example_ids(k))
    with pytest.raises(culpa.IntegrityError, match=f"before training example {last}"):
        run.batches_of(k)


def test_live_digests_follow_the_tensors() -> None:
    named = {
        "params/b": torch.randn(3, 4),
        "params/a": torch.randn(()),
        "buffers/n": torch.tensor(7),
        "buffers/t": torch.randn(4, 3).T,
        "params/none": torch.empty(0, 3),
        "params/half": torch.randn(5).bfloat16(),
    }
    live = Live(named)
    assert live.names == sorted(named)
    for _ in range(2):
        assert live.digests() == digest.tensor_digests(named)
        named["params/b"].add_(1)
        named["buffers/n"].add_(1)
        named["buffers/t"].mul_(2)
    named["params/b"].data = torch.randn(3, 4)  # other memory
    assert live.digests() == digest.tensor_digests(named)


def test_the_engine_looks_at_what_it_holds(made: Made) -> None:
    run, problem, _ = made
    with session(run, problem) as engine:
        engine.load(run.state(0))
        assert engine.looked_at().digests() == run.state(0).step_digests()
        names = engine.looked_at(frozenset({"bias"})).names
        assert names == ["params/weight"]
        state = engine.live()
        with torch.no_grad():
            problem.model.get_parameter("bias").add_(1)
        assert_bitwise({"bias": state.params["bias"]}, {"bias": engine.state().params["bias"]})
        assert engine.looked_at().digests() != run.state(0).step_digests()

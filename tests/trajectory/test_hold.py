"""Where the updates of a backward walk wait changes nothing of what they are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.trajectory.hold import Hold, InMemory, OnCpu, OnDisk, backward
from culpa.trajectory.walk import Transition, forward, session
from oracles.compare import assert_bitwise, assert_close

Batch = tuple[Tensor, Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def loss(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> culpa.Run:
    """Two jobs, each with a fresh optimizer, two micro-batches an update."""
    path, net = tmp_path_factory.mktemp("hold") / "run", model()
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    problem = culpa.Problem(net, loss)
    first = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with culpa.record(path, problem, first, checkpoints=culpa.AtStages()) as recorder:
        for name in ("one", "two"):
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
            with recorder.stage(name, optimizer=optimizer):
                for _ in range(7):
                    inputs = torch.randn(2, 6, 5, generator=generator)
                    targets = torch.randint(3, (2, 6), generator=generator)
                    with recorder.step(*zip(inputs, targets, strict=True)):
                        optimizer.zero_grad()
                        for one in zip(inputs, targets, strict=True):
                            (loss(net, one) / 2).backward()
                        optimizer.step()
    return culpa.open_run(path)


def same(found: Transition, expected: Transition) -> None:
    assert found.record == expected.record
    assert found.loss == expected.loss
    assert found.randoms == expected.randoms
    assert found.before.slots.keys() == expected.before.slots.keys()
    for here, there in (
        (found.before.flat(), expected.before.flat()),
        (found.after.flat(), expected.after.flat()),
        (found.grads, expected.grads),
    ):
        assert_bitwise(here, there)


@pytest.mark.parametrize("hold", [InMemory(), OnCpu(), OnDisk()], ids=repr)
@pytest.mark.parametrize("start", [0, 3, 9])
def test_every_update_comes_as_it_was(run: culpa.Run, hold: Hold, start: int) -> None:
    problem = culpa.Problem(model(), loss)
    with session(run, problem) as engine:
        expected = [t for t in forward(run, engine, 0, run.num_steps) if t.index >= start]
        found = list(backward(run, engine, start, hold))
    assert [t.index for t in found] == [*range(run.num_steps - 1, start - 1, -1)]
    assert any(t.record.reset and not t.before.slots for t in expected[1:]) == (start < 7)
    for one, other in zip(reversed(found), expected, strict=True):
        same(one, other)


def test_on_disk_memory_holds_a_few_states_only(run: culpa.Run, tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []

    def counted(way: Iterator[Transition]) -> Iterator[Transition]:
        for transition in way:
            alive.append(weakref.ref(transition.after.params["0.weight"]))
            most.append(sum(value() is not None for value in alive))
            yield transition
            del transition

    with session(run, culpa.Problem(model(), loss)) as engine:
        for _ in OnDisk(tmp_path).backwards(counted(forward(run, engine, 0, 7))):
            gc.collect()
            most.append(sum(value() is not None for value in alive))
    assert len(alive) == 7
    assert max(most) <= 3
    assert [*tmp_path.iterdir()] == []


def test_files_are_removed_when_a_sweep_ends_early(run: culpa.Run, tmp_path: Path) -> None:
    with session(run, culpa.Problem(model(), loss)) as engine:
        way = backward(run, engine, hold=OnDisk(tmp_path))
        next(way)
        (scratch,) = tmp_path.iterdir()
        assert len([*scratch.iterdir()]) == 6  # of seven and the state they end with: both read
        way.close()  # type: ignore[attr-defined]
    assert [*tmp_path.iterdir()] == []


def test_scores_are_the_same(run: culpa.Run, tmp_path: Path) -> None:
    problem: Any = culpa.Problem(model(), loss)
    generator = torch.Generator().manual_seed(8)
    test = torch.randn(20, 5, generator=generator), torch.randint(3, (20,), generator=generator)
    asked = [culpa.log_likelihood("test", test)]
    expected = culpa.attribute(run, problem, asked)
    for hold in (OnCpu(), OnDisk(tmp_path)):
        # Kernels choose their order of summation by where tensors lie.
        assert_close(culpa.attribute(run, problem, asked, hold=hold).steps, expected.steps, 1e-5)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(culpa.OptionError, match="existing folder"):
        OnDisk(tmp_path / "nowhere")

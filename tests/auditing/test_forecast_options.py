"""The forecast of what waits elsewhere, of a base by reference, and of several processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.auditing.forecasting.plan import LEAST, rehearse
from culpa.auditing.forecasting.waiting import Graphed, graphed, waiting
from culpa.report import forecast as module
from culpa.trajectory.hold import ANCHORED, backward
from culpa.trajectory.schema import FROZEN_NAME
from culpa.trajectory.walk import session

Batch = tuple[Tensor, Tensor]
HALF = torch.bfloat16
WIDTH, ROWS = 40, 12


def net() -> nn.Module:
    """A base that never trains, and a head with running statistics that does."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.GELU(), nn.Linear(WIDTH, 60), nn.BatchNorm1d(60))
    model[0].requires_grad_(False)
    return model


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def batches(count: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(3)
    return [
        (torch.randn(ROWS, 6, generator=draw), torch.randint(60, (ROWS,), generator=draw))
        for _ in range(count)
    ]


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> culpa.Run:
    """One segment of a few anchors."""
    path, model = tmp_path_factory.mktemp("forecast") / "run", net()
    optimizer = adamw(model)
    policy = culpa.AtStages()
    with culpa.record(path, culpa.Problem(model, loss), optimizer, checkpoints=policy) as recorder:
        for batch in recorder.batches(batches(3 * ANCHORED)):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return culpa.open_run(path)


@pytest.mark.parametrize("dtype", [None, HALF])
def test_what_waits_on_disk_is_as_large_as_its_files(
    run: culpa.Run, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    hold = culpa.OnDisk(tmp_path, dtype=dtype)
    told = waiting(hold, run.state(run.num_steps), 77)
    with session(run, culpa.Problem(net(), loss)) as engine:
        way = backward(run, engine, 0, hold)
        next(way)  # which reads the last update and the state after it
        written = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
        way.close()  # type: ignore[attr-defined]
    assert told.beside == 77
    assert told.machine == 0
    header = 3_000  # names, shapes and offsets of a file
    assert written == pytest.approx((run.num_steps - 1) * told.disk, rel=0.02, abs=96 * header)
    assert written > (run.num_steps - 1) * told.disk * 0.98


def test_elsewhere_is_not_where_the_model_is(run: culpa.Run) -> None:
    state = run.state(run.num_steps)
    here = waiting(None, state, 100)
    beside = waiting(culpa.OnCpu(), state, 100)
    assert (beside.beside, beside.machine, beside.disk) == (100, here.beside - 100, 0)
    half = waiting(culpa.InMemory(HALF), state, 0).beside
    assert 0.5 < half / waiting(culpa.InMemory(), state, 0).beside < 0.56  # anchors, statistics
    assert waiting(culpa.OnCpu(HALF), state, 0).machine == half


def test_graphs_of_the_replay_are_counted_up_to_their_budget(run: culpa.Run) -> None:
    problem = culpa.Problem(net(), loss)

    def kept_by(hold: Any, propagator: culpa.Propagator | None = None) -> Graphed:
        return graphed(run, problem, hold, propagator, lambda: 0.0, 2.0)

    one = kept_by(None).size
    activations = ROWS * (WIDTH + 60) * 4
    assert activations < one < 20 * activations
    kept = kept_by(culpa.InMemory(graphs=10 * one + 1), culpa.Exact())
    assert [kept.count(n) for n in (4, 10, 96)] == [4, 10, 10]
    assert kept.memory(96, 4) == 6 * one
    assert kept.dearer(10, 4) == 0.0
    assert kept.dearer(96, 4) == pytest.approx(2.0 * 86 / 96)  # their products are whole ones
    others = (culpa.OnDisk(), culpa.InMemory(HALF), culpa.InMemory(graphs=0))
    for none in (*map(kept_by, others), kept_by(None, culpa.Identity())):
        assert none.count(96) == none.memory(96, 4) == 0
        assert none.dearer(96, 4) == 0.0


def test_a_plan_is_forecast_as_it_will_be_held_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    plan = culpa.Plan(culpa.Problem(model, loss), adamw(model), batches(8), {"a": 100_000})
    asked = [culpa.log_likelihood("test", batches(1)[0])]

    state = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    hold = culpa.OnDisk(dtype=HALF)
    on_disk = culpa.forecast(plan, behaviours=asked, hold=hold, processes=2)
    attribute = on_disk["attribute"]
    least = 2 * 256 * 2 * state  # two processes, so many updates, half of four such trees each
    assert least < attribute.disk < 1.2 * least
    waits = 240 * 4 * state  # of an audit, which lets nothing wait elsewhere
    assert on_disk["audit"].memory - attribute.memory > 0.5 * waits
    assert on_disk["audit"].disk == 0
    assert attribute.processes == on_disk["embed"].processes == on_disk["replay"].processes == 2
    assert on_disk["audit"].processes == on_disk["record"].processes == 1
    assert attribute.more > attribute.memory
    assert on_disk["audit"].more < 0.5 * on_disk["audit"].memory  # of which there is one
    assert "2 x " in on_disk.table()
    monkeypatch.setattr(module, "disk_left", lambda folder: least // 2)
    assert "of disk" in on_disk.missing("attribute")
    monkeypatch.setattr(module, "memory_left", lambda: attribute.memory)
    assert "dtype=torch.bfloat16" in on_disk.missing("attribute")


def test_a_base_by_reference_takes_no_disk(tmp_path: Path) -> None:
    model = net()

    def base(frozen: str) -> int:
        plan = culpa.Plan(
            culpa.Problem(model, loss), adamw(model), batches(4), {"a": 50}, frozen=frozen
        )
        rehearse(plan, tmp_path / frozen, LEAST, time.perf_counter)
        return culpa.open_run(tmp_path / frozen).source.files()[FROZEN_NAME]

    size = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert base("stored") - base("reference") == pytest.approx(size, abs=300)


def test_wrong_numbers_of_processes(run: culpa.Run) -> None:
    with pytest.raises(culpa.OptionError, match="at least 1; got 0"):
        culpa.forecast(run, culpa.Problem(net(), loss), processes=0)

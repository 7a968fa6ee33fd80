"""What several ranks cannot record is refused on every rank; a rank that dies costs little."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import culpa
from culpa.trajectory.ranks import exchange
from tests.distributed.processes import outcomes, run_ranks
from tests.distributed.training import Case, loss


def wrapped(**options: Any) -> DistributedDataParallel:
    torch.manual_seed(3)
    return DistributedDataParallel(Case().model(), **options)


def record(path: Path, model: nn.Module, **options: Any) -> None:
    """One update, recorded."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with culpa.record(path, culpa.Problem(model, loss), optimizer, **options) as recorder:
        for batch in recorder.batches(Case().batches(torch.distributed.get_rank(), 0)[:1]):
            loss(model, batch).backward()
            optimizer.step()


def hooked() -> nn.Module:
    model = wrapped()
    model.register_comm_hook(None, allreduce_hook)
    return model


def synchronised() -> nn.Module:
    model = wrapped()
    model.module[1] = nn.SyncBatchNorm(16)  # which DDP itself takes on GPUs only
    return model


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "not wrapped": (lambda path: record(path, Case().model()), "DistributedDataParallel"),
    "hook": (lambda path: record(path, hooked()), "communication hook"),
    "SyncBatchNorm": (lambda path: record(path, synchronised()), "SyncBatchNorm"),
    "scaler": (
        lambda path: record(path, wrapped(), scaler=torch.amp.GradScaler("cpu")),
        "GradScaler",
    ),
}


def joined(path: Path) -> None:
    model = wrapped()
    with model.join():
        record(path, model)


def edited(path: Path) -> None:
    model = wrapped()
    with torch.no_grad():
        model.module[0].weight += torch.distributed.get_rank()
    record(path, model)


def taken(path: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "mine.txt").write_text("something else", encoding="utf-8")
    record(path, wrapped())


REFUSED |= {
    "join": (joined, "join"),
    "edited": (edited, "differ in parameters"),
    "folder in use": (taken, "no culpa run"),
}


def test_refusals_name_what_was_given_on_every_rank(tmp_path: Path) -> None:
    """One after another in the same two processes: no rank waits for another for ever."""

    def work(rank: int) -> dict[str, str]:
        said: dict[str, str] = {}
        for name, (attempt, _) in REFUSED.items():
            try:
                attempt(tmp_path / name)
            except culpa.CulpaError as error:
                said[name] = str(error)
        return said

    for said in run_ranks(2, tmp_path / "stores", work):
        assert said.keys() == REFUSED.keys()
        for name, (_, expected) in REFUSED.items():
            assert expected in said[name]


def test_across_ranks_needs_several() -> None:
    """One process has nobody to share with."""
    with pytest.raises(culpa.OptionError, match="not one of several"), culpa.across_ranks():
        pass


def test_a_rank_with_fewer_batches_is_told_instead_of_waiting_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends its recording while the other waits for its gradients."""
    monkeypatch.setattr(exchange, "PATIENCE", 1.0)
    job = Case(updates=3)

    def work(rank: int) -> None:
        whole = job.batches
        job.batches = lambda rank, stage: whole(rank, stage)[: 2 if rank and stage == 2 else None]
        job.train(rank, tmp_path / "run")

    first, second = outcomes(2, tmp_path / "stores", work)
    assert isinstance(second, culpa.RecordError)
    assert "as many updates" in str(second)
    assert isinstance(first, RuntimeError)
    # By whether an update was still to be exchanged when the other rank left.
    assert culpa.open_run(tmp_path / "run").manifest.status in ("truncated", "interrupted")


def test_a_killed_rank_leaves_a_readable_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was exchanged is there, bit for bit; the other rank's loop fails as it does anyway."""
    monkeypatch.setattr(exchange, "GATHERING", 1e9)  # after updates 1, 9 and 17
    job = Case(updates=8)

    def work(rank: int) -> None:
        whole = job.batches

        def batches(rank: int, stage: int) -> Any:
            for i, batch in enumerate(whole(rank, stage)):
                if rank == 1 and (stage, i) == (2, 3):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        job.batches = batches
        job.train(rank, tmp_path / "run")

    first, second = outcomes(2, tmp_path / "stores", work)
    assert second is None
    assert isinstance(first, RuntimeError)
    run = culpa.open_run(tmp_path / "run")
    assert run.manifest.status == "truncated"
    assert run.num_steps == 17
    assert "2 updates were not exchanged" in run.manifest.reason
    problem = job.problem(job.model())
    run.verify(problem, level="replay")
    optimizer = job.optimizer(problem.model.parameters())
    again = culpa.record(tmp_path / "run", problem, optimizer, resume=True)
    with pytest.raises(culpa.UnsupportedError, match="on 2 processes"), again:
        pass

"""Sharded jobs that are killed go on, and complete ones are gone on with, in the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import culpa
from culpa.trajectory.ranks import exchange
from tests.distributed.processes import outcomes, run_ranks
from tests.distributed.sharding import MOMENTUM, Sharding, whole
from tests.distributed.test_recording import assert_same
from tests.distributed.training import loss


class Job(Sharding):
    """Two epochs in one stage, or one more in another that begins where the first ended.

    The optimizer is a new one for each; what it is told of the past is in its slots only.
    """

    def epochs(
        self,
        rank: int,
        path: Path | None,
        count: int = 2,
        name: str = "first",
        start: dict[str, Tensor] | None = None,
        die: Callable[[int], bool] = lambda _: False,
        **options: Any,
    ) -> dict[str, Tensor]:
        bare = self.model()
        if start is not None:
            bare.load_state_dict(start)
        model: Any = self.sharded(bare)
        optimizer = self.optimizer(model.parameters())
        torch.manual_seed(50 + rank)
        batches = [b for n in range(count) for b in self.batches(rank, n)]
        if path is None:
            for batch in batches:
                self._part(model, optimizer, batch, 0)
            return whole(model)
        with (
            culpa.record(path, culpa.Problem(model, loss), optimizer, **options) as recorder,
            recorder.stage(name),
        ):
            for batch in recorder.batches(batches):
                self._part(model, optimizer, batch, 0)
                if die(recorder.num_steps):
                    os.kill(os.getpid(), signal.SIGKILL)
        return whole(model)


def both(job: Job, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What plain FSDP2 training ends the two jobs with."""

    def work(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        first = job.epochs(rank, None)
        return first, job.epochs(rank, None, 1, start=first)

    return run_ranks(2, folder, work)[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", [None, MOMENTUM], ids=["AdamW", "momentum"])
def test_a_killed_sharded_job_goes_on_and_is_gone_on_with(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout throughout; the second job is killed too."""
    monkeypatch.setattr(exchange, "GATHERED", 2)
    job = Job(updates=4, dropout=0.3, optimizer=make)
    path, stores = tmp_path / "run", tmp_path / "stores"
    first, second = both(job, stores)
    often: dict[str, Any] = {"durability": culpa.Durability(60.0, 1)}

    def lives(died: int, expected: dict[str, Tensor], *given: Any, **options: Any) -> None:
        def work(rank: int, **how: Any) -> Any:
            return job.epochs(rank, path, *given, **often, **options, **how)

        assert None in outcomes(2, stores, lambda r: work(r, die=lambda k: r == 1 and k == died))
        assert culpa.open_run(path).manifest.status != "complete"
        for found in outcomes(2, stores, lambda r: work(r, resume=True)):
            assert isinstance(found, dict), found
            assert_same(found, expected)

    lives(6, first)
    assert culpa.open_run(path).num_steps == 8
    lives(3, second, 1, "second", first, append=True)
    run, same = culpa.open_run(path), job.problem(job.model())
    problem = culpa.Problem.by_stage({"first": same, "second": same})
    assert (run.num_steps, [stage.name for stage in run.stages]) == (12, ["first", "second"])
    again = culpa.replay(run, problem)
    assert again.claim == "bitwise"
    assert_same(again.state, second)
    assert run.verify(problem, level="replay").finished

"""``attribute``, ``embed`` and ``replay`` shared by 2 and 4 processes: the scores of one process.

Retraining without a stage, under DDP, is what they are held against besides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.dynamics import shares
from tests.distributed.processes import run_ranks
from tests.distributed.training import Case, loss

SGD: Callable[[Any], torch.optim.Optimizer] = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def record_alone(job: Case, path: Path, function: Any = loss) -> None:
    """The same stages on one process, from the first rank's batches."""
    model = job.model()
    optimizer = job.optimizer(model.parameters())
    with culpa.record(path, culpa.Problem(model, function), optimizer) as recorder:
        for number, name in enumerate(("first", "second")):
            with recorder.stage(name):
                for batch in recorder.batches(job.batches(0, number)):
                    function(model, batch).backward()
                    optimizer.step()
                    optimizer.zero_grad()


def numbers(job: Case, path: Path, shared: bool, problem: culpa.Problem | None = None) -> dict:
    """Scores, example scores, embeddings and a true effect."""
    run, problem = culpa.open_run(path), problem or job.problem(job.model())
    stage, found = run.stages[0].name, dict[str, Tensor]()
    with culpa.across_ranks() if shared else nullcontext():
        graded = problem.example_losses is not None
        scores = culpa.attribute(run, problem, [job.behaviour()], examples=graded)
        found["scores"] = scores.steps
        if scores.examples is not None:
            found["examples"] = scores.examples
        chosen = [culpa.Exact(at="gauss"), culpa.Secant(1.0 if job.batch_norm else 0.6)]
        for propagator in chosen:
            embedded = culpa.embed(run, problem, propagator=propagator)
            found[repr(propagator)] = flat(embedded[stage])
        found["additive"] = flat(culpa.embed(run, problem, form="additive")[stage])
        removed = culpa.replay(run, problem, without=stage)
        found["replay"] = removed.effect(job.behaviour())
        found["removed"] = flat(removed.state)
    return found


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([tree[name].reshape(-1) for name in sorted(tree)])


NORMALISED = Case(updates=3, batch_norm=True, dtype=torch.float64, optimizer=SGD, clip=1.0)
RUNS = {
    "one process, rows split": (1, 2, Case(updates=3, rows=8)),
    "two ranks": (2, 2, Case(updates=2)),
}
SLOW = {
    "one process, rows split among four": (1, 4, Case(updates=4, rows=8)),
    "one process, dropout": (1, 2, Case(updates=3, dropout=0.2)),
    "two ranks, shared by four": (2, 4, Case(updates=3)),
    "two ranks, BatchNorm": (2, 2, NORMALISED),
    "four ranks, accumulation": (4, 2, Case(updates=2, accumulate=2)),
}


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_several_processes_give_the_scores_of_one(name: str, tmp_path: Path) -> None:
    """To 1e-5 relative, and the same bits on every rank."""
    recorders, size, job = (RUNS | SLOW)[name]
    path, stores = tmp_path / "run", tmp_path / "stores"
    if recorders == 1:
        record_alone(job, path)
    else:
        run_ranks(recorders, stores, lambda rank: job.train(rank, path))
    alone = numbers(job, path, shared=False)
    found = run_ranks(size, stores, lambda _: numbers(job, path, shared=True))
    for what, expected in alone.items():
        gap = float((found[0][what] - expected).norm() / expected.norm())
        assert gap < 1e-5, (what, gap)
        assert all(torch.equal(found[0][what], other[what]) for other in found)
        if what in ("replay", "removed"):
            assert torch.equal(found[0][what], expected)


def test_secant_one_is_retraining_without_the_stage_under_ddp(tmp_path: Path) -> None:
    """Float64, BatchNorm and clipping included: the counterfactual is the retrained model."""
    job = NORMALISED

    def work(rank: int) -> tuple[dict, dict]:
        final = job.train(rank, tmp_path / "run")
        retrained = job.train(rank, skip=range(job.updates))
        run, problem = culpa.open_run(tmp_path / "run"), job.problem(job.model())
        with culpa.across_ranks():
            embedded = culpa.embed(run, problem, propagator=culpa.Secant(1.0))
        return {n: final[n] - retrained[n] for n in embedded["first"]}, embedded["first"]

    for true, estimated in run_ranks(2, tmp_path / "stores", work):
        torch.testing.assert_close(flat(estimated), flat(true), rtol=1e-8, atol=1e-10)


def test_each_rank_works_on_its_own_rows(tmp_path: Path) -> None:
    """Half of the rows each: else nothing would be shared, and no score would tell."""
    job = Case(updates=2, rows=8)
    record_alone(job, tmp_path / "run")

    def work(_: int) -> set[int]:
        seen: set[int] = set()

        def watched(model: nn.Module, batch: Any) -> Tensor:
            seen.update([len(batch[0])] if torch.is_grad_enabled() else [])
            return loss(model, batch)

        run, problem = culpa.open_run(tmp_path / "run"), culpa.Problem(job.model(), watched)
        with culpa.across_ranks():
            run.verify(problem, level="replay")
            seen.clear()
            culpa.attribute(run, problem, [job.behaviour()], propagator=culpa.GaussNewton())
        return seen

    assert run_ranks(2, tmp_path / "stores", work) == [{4, 8}] * 2


@pytest.mark.slow
def test_a_loss_that_is_no_mean_over_rows_is_not_split_by_rows(tmp_path: Path) -> None:
    """Its whole micro-batches are dealt out, and the scores are right all the same."""
    job = Case(updates=3, rows=8)

    def summed(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * len(batch[0]) / 8 + model(batch[0]).std()

    record_alone(job, tmp_path / "run", summed)

    def work(_: int) -> dict:
        return numbers(job, tmp_path / "run", True, culpa.Problem(job.model(), summed))

    alone = numbers(job, tmp_path / "run", False, culpa.Problem(job.model(), summed))
    for found in run_ranks(2, tmp_path / "stores", work):
        for what, expected in alone.items():
            torch.testing.assert_close(found[what], expected, rtol=1e-5, atol=1e-7)


def test_an_error_on_one_rank_reaches_all(tmp_path: Path) -> None:
    """No rank waits for one that cannot do its part."""
    job = Case(updates=2)
    run_ranks(2, tmp_path / "stores", lambda rank: job.train(rank, tmp_path / "run"))

    def work(rank: int) -> str:
        taken = shares._taken

        def broken(local: Any, group: Any, by_rows: bool) -> Any:
            part = taken(local, group, by_rows)
            if rank == 1:
                part.problem = None
            return part

        shares._taken = broken
        run, problem = culpa.open_run(tmp_path / "run"), job.problem(job.model())
        with (
            pytest.raises((AttributeError, culpa.UnsupportedError)) as raised,
            culpa.across_ranks(),
        ):
            culpa.attribute(run, problem, [job.behaviour()], propagator=culpa.GaussNewton())
        return str(raised.value)

    first, second = run_ranks(2, tmp_path / "stores", work)
    assert "1 of 2 ranks could not do their part" in first
    assert "'NoneType' object has no attribute" in second

"""Runs of models that ``fully_shard`` was applied to: recorded, replayed, attributed.

Plain FSDP2 training by code that shares nothing with culpa (sharding.py) is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import culpa
from culpa.trajectory.ranks import exchange
from tests.distributed.processes import outcomes, run_ranks
from tests.distributed.sharding import MOMENTUM, Sharding, whole
from tests.distributed.test_estimators import flat, numbers
from tests.distributed.test_recording import assert_same
from tests.distributed.training import Case

CASES = {
    "two, AdamW, dropout, reduced after each micro-batch": (
        2,
        Sharding(updates=2, dropout=0.3, accumulate=3, sync_each=True),
    ),
    "three, momentum, BatchNorm, clipped, evaluated in between": (
        3,
        Sharding(updates=2, optimizer=MOMENTUM, batch_norm=True, clip=0.1, aside=True),
    ),
}
SLOW = {
    "two, bfloat16": (2, Sharding(updates=3, optimizer=MOMENTUM, dtype=torch.bfloat16)),
    "three, float64, reduced once": (3, Sharding(updates=3, accumulate=2, dtype=torch.float64)),
    "three, AdamW, clipped": (3, Sharding(updates=3, clip=0.1)),
    "four, not resharded": (
        4,
        Sharding(updates=3, accumulate=2, options={"reshard_after_forward": False}),
    ),
    "two, computed in bfloat16": (
        2,
        Sharding(
            updates=3, accumulate=2, options={"mp_policy": MixedPrecisionPolicy(torch.bfloat16)}
        ),
    ),
    "four, momentum, dropout": (4, Sharding(updates=3, optimizer=MOMENTUM, dropout=0.3)),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)])
def test_a_sharded_run_replays_bit_for_bit_on_one_process_and_on_as_many(
    case: str, tmp_path: Path
) -> None:
    """With and without a stage; recording changes no bit of the training."""
    size, job = (CASES | SLOW)[case]
    path, removed = tmp_path / "run", range(job.updates, 2 * job.updates)

    def work(rank: int) -> tuple[dict, dict, dict, dict]:
        recorded = job.train(rank, path)
        assert_same(recorded, job.train(rank))
        run, problem = culpa.open_run(path), job.problem(job.model())
        with pytest.raises(culpa.ProblemError, match="nothing shards"):
            culpa.replay(run, job.problem(job.sharded()))
        with culpa.across_ranks():
            again = culpa.replay(run, problem)
            without = culpa.replay(run, problem, without="second")
        assert again.claim == without.claim == "bitwise"
        replayed = again.state | again.buffers, without.state | without.buffers
        return recorded, job.train(rank, skip=removed), *replayed

    found = run_ranks(size, tmp_path / "stores", work)
    recorded, skipped = found[0][:2]
    for _, _, again, without in found:
        assert_same(again, recorded)
        assert_same(without, skipped)
    run, problem = culpa.open_run(path), job.problem(job.model())
    again, without = culpa.replay(run, problem), culpa.replay(run, problem, without="second")
    assert again.claim == without.claim == "bitwise"
    assert_same(again.state | again.buffers, recorded)
    assert_same(without.state | without.buffers, skipped)
    run.verify(problem, level="replay")
    reduction = run.step(0).optimizer.reduction
    assert reduction is not None
    assert (reduction.ranks, reduction.backend, reduction.sharded) == (size, "gloo", True)
    assert reduction.each == job.sync_each
    own = [tuple(n for n, _ in job.model().named_parameters() if n[:2] != "4.")]
    assert reduction.buckets == (*own, ("4.0.weight", "4.0.bias", "4.1.weight", "4.1.bias"))


def few_numbers(job: Case, path: Path, shared: bool) -> dict[str, Tensor]:
    """Scores of steps and of examples, and embeddings."""
    run, problem = culpa.open_run(path), job.problem(job.model())
    with culpa.across_ranks() if shared else nullcontext():
        scores = culpa.attribute(run, problem, [job.behaviour()], examples=True)
        embedded = culpa.embed(run, problem, propagator=culpa.Secant(0.6))
    assert scores.examples is not None
    return {"steps": scores.steps, "examples": scores.examples} | {
        name: flat(embedded[name]) for name in ("first", "third")
    }


@pytest.mark.parametrize(
    ("size", "measured"), [(2, few_numbers), pytest.param(4, numbers, marks=pytest.mark.slow)]
)
def test_attribution_of_a_sharded_run_is_the_same_on_one_process_and_on_several(
    size: int, measured: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    """To 1e-5 relative, and the same bits on every rank."""
    job, path = Sharding(updates=1 if size == 2 else 2), tmp_path / "run"
    run_ranks(2, tmp_path / "stores", lambda rank: job.train(rank, path))
    alone = measured(job, path, shared=False)
    found = run_ranks(size, tmp_path / "stores", lambda _: measured(job, path, shared=True))
    for what, expected in alone.items():
        gap = float((found[0][what] - expected).norm() / expected.norm())
        assert gap < 1e-5, (what, gap)
        assert all(torch.equal(found[0][what], other[what]) for other in found)


@pytest.mark.slow
def test_secant_one_is_retraining_without_the_stage_under_fsdp(tmp_path: Path) -> None:
    """The embedding against plain FSDP2 training that skips it; float64, BatchNorm and clipping."""
    job = Sharding(updates=3, batch_norm=True, dtype=torch.float64, optimizer=MOMENTUM, clip=1.0)

    def work(rank: int) -> tuple[dict, dict]:
        return job.train(rank, tmp_path / "run"), job.train(rank, skip=range(job.updates))

    final, retrained = run_ranks(2, tmp_path / "stores", work)[0]
    run, problem = culpa.open_run(tmp_path / "run"), job.problem(job.model())
    embedded = culpa.embed(run, problem, propagator=culpa.Secant(1.0))["first"]
    true = {name: final[name] - retrained[name] for name in embedded}
    torch.testing.assert_close(flat(embedded), flat(true), rtol=1e-8, atol=1e-10)


class Tied(nn.Module):
    """Two layers with one weight, a block of its own, and a method that FSDP2 must be told of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 9, bias=False)
        self.block = nn.Sequential(nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 6))
        self.outer = nn.Linear(6, 9, bias=False)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.block(self.inner(x))))

    def logits(self, x: Tensor) -> Tensor:
        return self(x)


def made() -> Tied:
    torch.manual_seed(3)
    return Tied()


def by_method(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model.logits(batch[0]), batch[1])


def test_frozen_and_tied_parameters_methods_and_several_optimizers(tmp_path: Path) -> None:
    """One block trains first; then all but it, by two optimizers. The model stays as it was."""
    path = tmp_path / "run"

    def work(rank: int) -> dict[str, Tensor]:
        model: Any = made()
        around = [*model.inner.parameters(), *model.head.parameters()]
        for p in around:
            p.requires_grad_(False)
        fully_shard(model.block)
        fully_shard(model)
        torch.distributed.fsdp.register_fsdp_forward_method(model, "logits")
        around = [*model.inner.parameters(), *model.head.parameters()]
        looked_at = Case().batches(rank, 0)[0][0]
        with torch.no_grad():
            model(looked_at)  # leaves whole parameters in the root
        first = torch.optim.AdamW(model.block.parameters(), lr=1e-2)
        with culpa.record(path, culpa.Problem(model, by_method), first) as recorder:
            with recorder.stage("block"):
                trained(recorder, model, [first], rank, 0)
            model.requires_grad_(True)
            model.block.requires_grad_(False)
            second = [torch.optim.SGD(around[:1], lr=0.1), torch.optim.AdamW(around[1:], lr=1e-2)]
            with torch.no_grad():
                model(looked_at)
            with recorder.stage("around", optimizer=second):
                trained(recorder, model, second, rank, 1, micro_batches=2)
            kept = recorder._last().params["block.0.weight"]
            assert len(kept) == (9 if rank == 0 else 4), "a whole copy, or one of its shard"
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        return whole(model)

    final = run_ranks(2, tmp_path / "stores", work)[0]
    run, problem = culpa.open_run(path), culpa.Problem(made(), by_method)
    assert run.manifest.frozen == ("head.bias", "head.weight", "inner.weight")
    again = culpa.replay(run, problem)
    assert again.claim == "bitwise"
    assert_same(again.state, {name: final[name] for name in again.state})
    assert len(again.state) == len(final) - 1  # the weight that is tied has two names there


@pytest.mark.slow
def test_autocast_activation_checkpointing_and_a_schedule(tmp_path: Path) -> None:
    """Around and inside of what is sharded; and clipping by value."""
    path = tmp_path / "run"

    def cast(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    def checkpointed(block: nn.Module) -> nn.Module:
        forward = block.forward
        block.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
        return block

    def work(rank: int) -> dict[str, Tensor]:
        model: Any = Sharding().model()
        checkpointed(model[4])
        fully_shard(model[4])
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        with culpa.record(
            path, culpa.Problem(model, cast), optimizer, scheduler=schedule, clip_grad_value=0.02
        ) as recorder:
            for batch in recorder.batches(Case().batches(rank, 0)):
                optimizer.zero_grad()
                cast(model, batch).backward()
                nn.utils.clip_grad_value_(model.parameters(), 0.02)
                optimizer.step()
                schedule.step()
        return whole(model)

    final = run_ranks(3, tmp_path / "stores", work)[0]
    bare: Any = Sharding().model()
    checkpointed(bare[4])
    again = culpa.replay(culpa.open_run(path), culpa.Problem(bare, cast))
    assert again.claim == "bitwise"
    assert_same(again.state, final)


def trained(
    recorder: Any, model: Any, optimizers: list, rank: int, stage: int, micro_batches: int = 1
) -> None:
    """Every micro-batch is reduced by itself."""
    batches = Case(updates=2 * micro_batches).batches(rank, stage)
    for at, batch in enumerate(recorder.batches(batches), 1):
        (by_method(model, batch) / micro_batches).backward()
        if at % micro_batches == 0:
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()


@pytest.mark.parametrize("error", [KeyError, None])
def test_a_loop_that_ends_early_on_one_rank_ends_on_all(
    error: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That rank gathers nothing: the others are elsewhere, and find it gone."""
    monkeypatch.setattr(exchange, "PATIENCE", 1.0)
    job, path = Sharding(updates=4), tmp_path / "run"

    def work(rank: int) -> None:
        plain = job.batches

        def batches(rank: int, stage: int) -> Any:
            yield from plain(rank, stage)[: 1 if (rank, stage) == (0, 1) else None]
            if error and (rank, stage) == (0, 1):
                raise error("the data ended")

        job.batches = batches
        job.train(rank, path, checkpoints=culpa.AtStages())

    first, second = outcomes(2, tmp_path / "stores", work, wait=60)
    assert isinstance(first, error or culpa.RecordError)
    assert error or "as many updates" in str(first)
    assert isinstance(second, RuntimeError)
    run = culpa.open_run(path)
    assert run.manifest.status in ("interrupted", "truncated")
    assert run.num_steps in range(1, 6)
    run.verify(job.problem(job.model()), level="replay")

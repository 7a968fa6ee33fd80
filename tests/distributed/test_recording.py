"""Runs recorded on several ranks: what is in them, and that they replay bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

import culpa
from culpa.trajectory.ranks.reduce import ring_sum
from tests.distributed.processes import run_ranks
from tests.distributed.training import STAGES, Case, loss

CASES = {
    "two": (2, Case(updates=3)),
    "three, dropout, accumulation": (3, Case(dropout=0.3, accumulate=2, updates=3)),
    "four, BatchNorm, clipping": (4, Case(batch_norm=True, accumulate=2, clip=0.5, updates=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_several_ranks_replays_bit_for_bit_on_one_process_and_on_as_many(
    case: str, tmp_path: Path
) -> None:
    """Skip-and-retrain under DDP, by code that shares nothing with culpa, is the oracle."""
    size, job = CASES[case]
    path, removed = tmp_path / "run", range(job.updates, 2 * job.updates)

    def work(rank: int) -> tuple:
        recorded = job.train(rank, path)
        plain = job.train(rank)
        assert all(torch.equal(recorded[n], plain[n]) for n in dict(job.model().named_parameters()))
        run, problem = culpa.open_run(path), job.problem(job.model())
        with culpa.across_ranks():
            whole = culpa.replay(run, problem)
            without = culpa.replay(run, problem, without="second")
            effect = without.effect(job.behaviour())
        skipped = job.train(rank, skip=removed)
        assert whole.claim == without.claim == "bitwise"
        return (
            recorded,
            skipped,
            whole.state | whole.buffers,
            without.state | without.buffers,
            effect,
        )

    found = run_ranks(size, tmp_path / "stores", work)
    assert all(isinstance(one, tuple) for one in found), found
    recorded, skipped = found[0][:2]
    run, problem = culpa.open_run(path), job.problem(job.model())
    assert run.manifest.status == "complete"
    assert [s.name for s in run.stages] == list(STAGES)
    assert len(run.step(0).micro_batches) == size * job.accumulate
    alone = culpa.replay(run, problem)
    assert alone.claim == "bitwise"
    run.verify(problem, level="replay")
    for whole in (alone.state | alone.buffers, *(one[2] for one in found)):
        assert_same(whole, recorded)
    one = culpa.replay(run, problem, without="second")
    for without in (one.state | one.buffers, *(one[3] for one in found)):
        assert_same(without, skipped)
    assert all(torch.equal(one.effect(job.behaviour()), other[4]) for other in found)


def test_the_record_names_ranks_backend_buckets_and_the_order_of_micro_batches(
    tmp_path: Path,
) -> None:
    """Rank by rank; the buckets are those of DDP's first backward pass, then those it rebuilds."""
    job = Case()
    run_ranks(2, tmp_path / "stores", lambda rank: job.train(rank, tmp_path / "run"))
    run = culpa.open_run(tmp_path / "run")
    for k in range(run.num_steps):
        for rank, batch in enumerate(run.batches_of(k)):
            inputs, labels = job.batches(rank, k // job.updates)[k % job.updates]
            assert torch.equal(batch[0], inputs)
            assert torch.equal(batch[1], labels)
    names = {name for name, _ in job.model().named_parameters()}
    first, later = (run.step(k).optimizer.reduction for k in (0, 1))
    assert first is not None
    assert later is not None
    assert (first.ranks, first.backend) == (2, "gloo")
    assert [len(b) for b in first.buckets] == [6]
    assert len(later.buckets) > 1
    assert {n for b in later.buckets for n in b} == {n for b in first.buckets for n in b} == names


def test_micro_batches_of_several_ranks_may_have_weights(tmp_path: Path) -> None:
    """As its loop had them on every rank, in the mean over ranks in the record."""
    job, weights = Case(accumulate=2, updates=3), ((0.25, 0.75), (0.5, 0.5))

    def work(rank: int) -> dict[str, torch.Tensor]:
        model = job.model()
        wrapped, optimizer = DistributedDataParallel(model), job.optimizer(model.parameters())
        batches, path = job.batches(rank, 0), tmp_path / "run"
        with culpa.record(path, job.problem(wrapped), optimizer) as recorder:
            for pair in zip(batches[::2], batches[1::2], strict=True):
                with recorder.step(*pair, weights=weights[rank]):
                    optimizer.zero_grad()
                    with wrapped.no_sync():
                        (loss(wrapped, pair[0]) * weights[rank][0]).backward()
                    (loss(wrapped, pair[1]) * weights[rank][1]).backward()
                    optimizer.step()
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    final, _ = run_ranks(2, tmp_path / "stores", work)
    run = culpa.open_run(tmp_path / "run")
    assert run.step(0).weights == (0.125, 0.375, 0.25, 0.25)
    assert_same(culpa.replay(run, job.problem(job.model())).state, final)


@given(st.data(), st.integers(2, 5))
@settings(max_examples=15)
def test_the_sum_of_a_ring_is_that_of_the_ranks_in_some_order(data: st.DataObject, n: int) -> None:
    """Whatever the size: every element is the sum of its ranks', and none is left out."""
    size = data.draw(st.integers(1, 300))
    parts = [torch.randint(-50, 50, (size,), dtype=torch.float32) for _ in range(n)]
    assert torch.equal(ring_sum(parts), torch.stack(parts).sum(0))


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_one_process_adds_in_the_order_of_gloos_ring(size: int, tmp_path: Path) -> None:
    """Across the sizes at which the ring's pieces change, in every dtype that it sums."""
    lengths = (1, 2, 5, 7, 64, 1001, 2**18 + 1, 2**21 + 5)

    def work(rank: int) -> list[tuple[torch.dtype, int]]:
        generator, wrong = torch.Generator().manual_seed(rank), []
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for n in lengths:
                own = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
                parts = [torch.empty_like(own) for _ in range(size)]
                torch.distributed.all_gather(parts, own)
                torch.distributed.all_reduce(own)
                wrong += [] if torch.equal(own, ring_sum(parts)) else [(dtype, n)]
        return wrong

    assert run_ranks(size, tmp_path, work) == [[]] * size


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every tensor bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)

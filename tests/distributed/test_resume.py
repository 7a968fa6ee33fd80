"""Killed jobs of several ranks go on, and end in the bits of one that nobody disturbed."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
import weakref
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import culpa
from culpa.trajectory import log
from culpa.trajectory.ranks import exchange
from tests.distributed import resuming
from tests.distributed.processes import outcomes, run_ranks
from tests.distributed.resuming import Progress, loss, train, updates


def killing(at: dict[int, int]) -> Progress:
    """Kills a rank by itself, after so many updates."""

    def progress(k: int, rank: int) -> None:
        if at.get(rank) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def undisturbed(ranks: int, folder: Path, **options: Any) -> list[dict[str, Tensor]]:
    """What plain DistributedDataParallel ends with, on every rank."""
    return run_ranks(ranks, folder, lambda rank: train(rank, ranks, None, **options))


def assert_whole(path: Path, ended: list[Any], truth: list[dict[str, Tensor]]) -> culpa.Run:
    """Every rank ended as its undisturbed twin, and so did the run, which replays."""
    for found, expected in zip(ended, truth, strict=True):
        assert isinstance(found, dict), found
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    run = culpa.open_run(path)
    assert run.manifest.status == "complete"
    state = {**run.final_state(), **run.final_buffers()}
    assert all(torch.equal(value, truth[0][name]) for name, value in state.items())
    return run


AGAIN: dict[str, Any] = {"seed": 70, "lr": 0.02}
"""What is else in the second job."""


class Plain:
    """Two jobs in sequence of two ranks each, without culpa: how each rank ends them."""

    def __init__(self, folder: Path) -> None:
        def both(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            first = train(rank, 2, None)
            start = [first]
            torch.distributed.broadcast_object_list(start)
            return first, train(rank, 2, None, start=start[0], **AGAIN)

        found = run_ranks(2, folder, both)
        self.first, self.second = ([one[at] for one in found] for at in (0, 1))


@pytest.fixture(autouse=True)
def exchanging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other update, so that a job this short has several points to go on from."""
    monkeypatch.setattr(exchange, "GATHERED", 2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tmp_path_factory.mktemp("plain"))


def test_killed_ranks_go_on_in_the_same_bits(plain: Plain, tmp_path: Path) -> None:
    """One rank dies in the first stage, later both do, in the augmented one; dropout throughout."""
    path, stores = tmp_path / "run", tmp_path / "stores"
    for died in ({1: 7}, {0: 11, 1: 11}, {1: 15}):
        gone = outcomes(2, stores, lambda r, d=died: train(r, 2, path, killing(d), resume=True))
        assert None in gone
        run = culpa.open_run(path)
        assert 0 < run.num_steps <= max(died.values())
        run.verify()
        del run  # a connection is not to be open in two processes
    refused_elsewhere(path, stores)

    def last(rank: int) -> tuple[dict[str, Tensor], list[int]]:
        made: list[int] = []
        return train(rank, 2, path, lambda k, _: made.append(k), resume=True), made

    ended = outcomes(2, stores, last)
    run = assert_whole(path, [one[0] for one in ended], plain.first)
    assert run.num_steps == updates(2)
    assert all(12 < made[0] <= 15 for _, made in ended)  # what went before was passed over
    assert run.verify(culpa.Problem(resuming.build(), loss), level="replay").finished


def refused_elsewhere(path: Path, stores: Path) -> None:
    """Other ranks, or a folder that some do not see: by name, everywhere; nothing is written."""
    made = culpa.open_run(path).num_steps
    for error in outcomes(3, stores, lambda rank: train(rank, 3, path, resume=True)):
        assert isinstance(error, culpa.CulpaError)
        assert "began on 2 processes and is resumed on 3 processes" in str(error)
    elsewhere = stores / "elsewhere"
    for error in outcomes(2, stores, lambda r: train(r, 2, elsewhere if r else path, resume=True)):
        assert isinstance(error, culpa.StoreError)
        assert "elsewhere" in str(error)
    model = resuming.build()
    optimizer = torch.optim.AdamW(model.parameters())
    with (
        pytest.raises(culpa.UnsupportedError, match="began on 2 processes and is resumed on one"),
        culpa.record(path, culpa.Problem(model, loss), optimizer, resume=True),
    ):
        pass
    assert culpa.open_run(path).num_steps == made


def test_a_killed_job_that_was_appended_goes_on(plain: Plain, tmp_path: Path) -> None:
    """The second of two jobs dies, and goes on as if it had not."""
    path, stores = tmp_path / "run", tmp_path / "stores"
    run_ranks(2, stores, lambda rank: train(rank, 2, path, append=True))
    digest = culpa.open_run(path).root_digest

    def second(rank: int, died: dict[int, int], **options: Any) -> Any:
        options |= {"start": plain.first[0], "append": True, **AGAIN}
        return train(rank, 2, path, killing(died), **options)

    outcomes(2, stores, lambda rank: second(rank, {1: 13}))
    assert updates(2) < culpa.open_run(path).num_steps <= updates(2) + 13
    ended = outcomes(2, stores, lambda rank: second(rank, {}, resume=True))
    run = assert_whole(path, ended, plain.second)
    assert [job.root_digest for job in run.manifest.earlier] == [digest]
    assert run.num_steps == 2 * updates(2)
    assert run.verify().finished


def test_an_optimizer_that_goes_on_from_elsewhere_on_a_rank_is_refused(tmp_path: Path) -> None:
    """On all of them, and the run stays as it was."""
    path = tmp_path / "run"

    def work(rank: int) -> str:
        model = resuming.build()
        wrapped, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters())
        batch = torch.randn(4, 6), torch.arange(4) % 2
        for name in ("first", "second"):
            if name == "second" and rank == 1:
                optimizer.state[model[0].weight]["exp_avg"] += 1
            problem = culpa.Problem(wrapped, loss)
            try:
                with (
                    culpa.record(path, problem, optimizer, append=True) as recorder,
                    recorder.stage(name),
                ):
                    for drawn in recorder.batches([batch]):
                        loss(wrapped, drawn).backward()
                        optimizer.step()
            except culpa.RecordError as error:
                return str(error)
        return ""

    for said in run_ranks(2, tmp_path / "stores", work):
        assert "has another state on one rank than on rank 0" in said
    assert culpa.open_run(path).num_steps == 1


def test_a_run_that_nobody_refers_to_is_closed_at_once(tmp_path: Path) -> None:
    """Its log would else be read while the resumed job ends, which keeps it from being folded."""
    model = resuming.build()
    problem, optimizer = culpa.Problem(model, loss), torch.optim.AdamW(model.parameters())
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for batch in recorder.batches([(torch.randn(4, 6), torch.arange(4) % 2)]):
            loss(model, batch).backward()
            optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    run.verify(problem, level="replay")
    known = weakref.ref(run)
    gc.disable()
    try:
        del run
        assert known() is None
    finally:
        gc.enable()


def test_what_a_rank_says_has_rows_of_its_own() -> None:
    """No row of one rank is that of another, and what has none is told."""
    keys = [log.POINT, log.draw_id(0, 0), log.draw_id(2**19, 2**31), log.loop_id(2**19)]
    assert len({log.of_rank(r, k) for r in (0, 1, 2047) for k in keys}) == 12
    assert all(0 <= log.of_rank(r, k) < 2**63 for r in (0, 2047) for k in keys)
    for rank, key in ((2048, 0), (0, log.draw_id(2**20, 0))):
        with pytest.raises(culpa.RecordError, match="2048 ranks and a million loops"):
            log.of_rank(rank, key)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "ranks"), [(1, 2), (2, 1), (3, 2)])
def test_a_job_goes_on_with_what_other_numbers_of_ranks_recorded(
    before: int, ranks: int, tmp_path: Path
) -> None:
    """The appended one dies and is resumed, on as many as it began with; each is replayed so."""
    path, stores = tmp_path / "run", tmp_path / "stores"
    start = undisturbed(before, stores)[0]
    again = {"start": start, **AGAIN}
    truth = undisturbed(ranks, stores, **again)
    run_ranks(before, stores, lambda rank: train(rank, before, path, append=True))
    again["append"] = True
    died = killing({ranks - 1: updates(ranks) - 2})
    outcomes(ranks, stores, lambda rank: train(rank, ranks, path, died, **again))
    assert culpa.open_run(path).num_steps > updates(before)
    ended = outcomes(ranks, stores, lambda rank: train(rank, ranks, path, resume=True, **again))
    run = assert_whole(path, ended, truth)
    assert run.num_steps == updates(before) + updates(ranks)
    problem = culpa.Problem(resuming.build(), loss)
    by_stage = culpa.Problem.by_stage({stage.name: problem for stage in run.stages})
    assert run.verify(by_stage, level="replay").finished


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_at_random_moments(ranks: int, tmp_path: Path) -> None:
    """One rank or all of them, again and again, until the job is done; some lives over."""
    chance, stores, kills = random.Random(ranks), tmp_path / "stores", 0
    truth = undisturbed(ranks, stores)
    for number in count():
        path = tmp_path / f"run-{number}"
        if kills >= 12:
            break
        while True:
            began = time.monotonic()
            dying = [r for r in range(ranks) if chance.random() < 0.5] or [chance.randrange(ranks)]
            moment = chance.uniform(0.1, 1.5)

            def work(rank: int, path=path, dying=dying, moment=moment) -> dict[str, Tensor]:
                if rank in dying:
                    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                    signal.setitimer(signal.ITIMER_REAL, moment)
                found = train(rank, ranks, path, slowly, resume=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
                return found

            ended = outcomes(ranks, stores, work)
            assert time.monotonic() - began < 120
            if all(isinstance(one, dict) for one in ended):
                assert_whole(path, ended, truth)
                break
            kills += 1
            odd = [one for one in ended if isinstance(one, culpa.IntegrityError)]
            assert not odd, odd
            assert not any("made again" in str(one) for one in ended), ended
            if (path / "culpa.json").exists():
                run = culpa.open_run(path)
                if run.manifest.status == "complete":  # killed in its last breath
                    assert_whole(path, truth, truth)
                    break
                run.verify()
                del run  # a connection is not to be open in two processes
    assert number > 1


def slowly(k: int, rank: int) -> None:
    time.sleep(0.05)

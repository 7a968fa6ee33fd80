"""A job that was appended to a run dies: the jobs before it are whole, and it goes on or anew."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import culpa
from crash import harness
from crash.harness import Noisy, Shared, fingerprint, fork, loss
from hostile.forge import everything

FIRST, SECOND = 3 * 2 * 5, 2 * 3 * 5


class Stop(Exception):  # noqa: N818
    pass


def nothing(k: int) -> None:
    pass


def stop_at(k: int) -> Callable[[int], None]:
    def progress(done: int) -> None:
        if done == k:
            raise Stop

    return progress


def second(
    path: Path, weights: Path, progress: Callable[[int], None] = nothing, **options: Any
) -> bytes:
    """The script of the second job: weights from a file, shuffling, augmentation, a scheduler."""
    torch.manual_seed(11)
    random.seed(11)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 2)
    )
    model.load_state_dict(torch.load(weights))
    optimizer = AdamW(model.parameters(), lr=0.02)
    scheduler = CosineAnnealingLR(optimizer, T_max=7)
    durability = culpa.Durability(seconds=60.0, updates=4)
    options = {"scheduler": scheduler, "durability": durability, "append": True, **options}
    with culpa.record(path, culpa.Problem(model, loss), optimizer, **options) as recorder:
        for name, noise in (("noisy", 0.1), ("clean", 0.0)):
            loader = DataLoader(Noisy(40, noise), batch_size=8, shuffle=True)
            with recorder.stage(name):
                for _ in range(3):
                    for batch in recorder.batches(loader):
                        model.train()
                        optimizer.zero_grad()
                        loss(model, batch).backward()
                        optimizer.step()
                        progress(recorder.num_steps)
                        scheduler.step()
    return fingerprint(dict(model.state_dict()))


class Jobs:
    """The run of a first job, and what the second must end with."""

    def __init__(self, folder: Path) -> None:
        self.run, self.weights = folder / "first", folder / "weights.pt"
        torch.save(harness.train(self.run, epochs=2), self.weights)
        self.truth = second(self.copy(folder / "truth"), self.weights)
        assert culpa.open_run(folder / "truth").num_steps == FIRST + SECOND
        self.digest = culpa.open_run(self.run).root_digest

    def copy(self, path: Path) -> Path:
        shutil.copytree(self.run, path)
        return path

    def is_whole(self, path: Path) -> None:
        run = culpa.open_run(path)
        assert [job.root_digest for job in run.manifest.earlier] == [self.digest]
        assert run.verify().finished
        assert fingerprint({**run.final_state(), **run.final_buffers()}) == self.truth


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize("k", [1, 5, 14, 15, 16, 29])
def test_an_interrupted_job_goes_on(k: int, jobs: Jobs, tmp_path: Path) -> None:
    path = jobs.copy(tmp_path / "run")
    with pytest.raises(Stop):
        second(path, jobs.weights, stop_at(k))
    assert culpa.open_run(path).num_steps == FIRST + k
    assert culpa.open_run(path).verify().finished
    assert second(path, jobs.weights, resume=True) == jobs.truth
    jobs.is_whole(path)


def test_an_interrupted_job_begins_anew_or_is_taken_back(jobs: Jobs, tmp_path: Path) -> None:
    path = jobs.copy(tmp_path / "run")
    with pytest.raises(Stop):
        second(path, jobs.weights, stop_at(9))
    before = everything(path)
    with pytest.raises(culpa.StoreError, match="9 updates of an appended job"):
        second(path, jobs.weights)
    with pytest.raises(culpa.OptionError, match="append=True"):
        second(path, jobs.weights, append=False, resume=True)
    other = {name: 2 * value for name, value in torch.load(jobs.weights).items()}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(culpa.RecordError, match="final state"):
        second(path, tmp_path / "other.pt", overwrite=True)
    assert everything(path) == before
    with pytest.raises(Stop):  # nothing recorded this time: the run of the first job is there
        second(path, jobs.weights, stop_at(1), checkpoints=Refusing(), overwrite=True)
    assert everything(path) == everything(jobs.run)
    with pytest.raises(Stop):
        second(path, jobs.weights, stop_at(9))
    assert second(path, jobs.weights, overwrite=True) == jobs.truth
    jobs.is_whole(path)


class Refusing(culpa.Thinned):
    """Stops the loop before its first update is recorded."""

    def keep(self, index: int) -> bool:
        raise Stop


def test_the_first_job_is_resumed_by_itself(jobs: Jobs, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Stop):
        harness.train(path, stop_at(12), epochs=2, append=True)
    with pytest.raises(culpa.StoreError, match="unfinished run of one job"):
        second(path, jobs.weights)
    harness.train(path, epochs=2, append=True, resume=True)
    assert culpa.open_run(path).manifest.parameters == culpa.open_run(jobs.run).manifest.parameters
    assert second(path, jobs.weights) == jobs.truth


def test_killed_jobs_go_on(jobs: Jobs, tmp_path: Path) -> None:
    chance, resumed = random.Random(5), 0
    began = time.monotonic()
    child, _ = fork(lambda shared: shared.leave(second(jobs.copy(tmp_path / "a"), jobs.weights)))
    assert harness.finish(child) == 0
    seconds = time.monotonic() - began
    for number in range(8):
        path = jobs.copy(tmp_path / str(number))

        def work(shared: Shared, path: Path = path) -> None:
            second(path, jobs.weights, shared.count, resume=True)

        child, shared = fork(work)
        time.sleep(seconds * chance.uniform(0.3, 0.9))
        os.kill(child, signal.SIGKILL)
        done = harness.finish(child) == 0
        run = culpa.open_run(path)
        run.verify()
        assert run.num_steps >= FIRST + max(0, shared.counted - 4)
        if done or (run.manifest.status == "complete" and run.num_steps > FIRST):
            jobs.is_whole(path)
            continue
        resumed += run.num_steps > FIRST
        anew = number % 2 == 1
        try:
            assert second(path, jobs.weights, resume=not anew, overwrite=anew) == jobs.truth
        except culpa.StoreError:  # killed when only the manifest was still to be written
            assert culpa.open_run(path).manifest.status == "complete"
        jobs.is_whole(path)
    assert resumed > 0


@pytest.mark.parametrize("moment", ["manifest", "log"])
def test_killed_as_it_begins(moment: str, jobs: Jobs, tmp_path: Path) -> None:
    path = jobs.copy(tmp_path / "run")

    def work(shared: Shared) -> None:
        from culpa.trajectory.store import Store

        reopen = Store.reopen

        def dying(*args: Any) -> Store:
            if moment == "log":
                reopen(*args)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        Store.reopen = dying  # type: ignore[method-assign]
        second(path, jobs.weights)

    assert harness.finish(fork(work)[0]) == -signal.SIGKILL
    run = culpa.open_run(path)
    assert run.manifest.status == "recording"
    assert not run.verify().finished
    assert second(path, jobs.weights) == jobs.truth
    jobs.is_whole(path)


def test_tensors_stay_as_they_are(jobs: Jobs) -> None:
    """The oracle is sharp: the second job changes every parameter."""
    first: dict[str, Tensor] = torch.load(jobs.weights)
    assert fingerprint(first) != jobs.truth

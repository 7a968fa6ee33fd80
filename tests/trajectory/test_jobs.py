"""Jobs in sequence, each recorded by itself into one run, against the loop that never stopped.

The truth is a loop of both jobs by ``oracles.skipping``, which knows nothing of the library.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import culpa
from hostile.forge import everything
from oracles.skipping import Skipping

Tensors = dict[str, Tensor]


class Net(nn.Module):
    """A trunk with running statistics and dropout, and two heads: the second trains in job 2."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Tanh())
        self.rebuild, self.classify = nn.Linear(6, 3), nn.Linear(6, 2)


def rebuilding(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model.rebuild(model.trunk(batch[0])), batch[0])


def classifying(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model.classify(model.trunk(batch[0])), batch[1])


def built() -> Net:
    torch.manual_seed(7)
    return Net()


def data(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 4, 3, generator=generator)
    return [(row, (row.sum(1) > 0).long()) for row in x]


def pretrained(model: Net) -> SGD:
    return SGD([*model.trunk.parameters(), *model.rebuild.parameters()], lr=0.1, momentum=0.9)


def tuned(model: Net) -> AdamW:
    return AdamW([*model.trunk.parameters(), *model.classify.parameters()], lr=0.02)


def loop(driver: Any, model: Net, loss: Any, optimizer: Any, seed: int, name: str) -> None:
    """One stage; it draws dropout masks from a seed of its own, as a process of its own would."""
    torch.manual_seed(seed)
    with driver.stage(name, optimizer=optimizer):
        for batch in driver.batches(data(seed)):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()


def truth(without: range = range(0)) -> Tensors:
    """Both jobs in one loop without a pause, updates in ``without`` undone."""
    model = built()
    first = pretrained(model)
    driver = Skipping(model, [first], without)
    loop(driver, model, rebuilding, first, 1, "pretrain")
    first.zero_grad()
    loop(driver, model, classifying, tuned(model), 2, "tune")
    return model.state_dict()


def pretrain(path: Path, **options: Any) -> Net:
    model = built()
    optimizer = pretrained(model)
    with culpa.record(path, culpa.Problem(model, rebuilding), optimizer, **options) as recorder:
        loop(recorder, model, rebuilding, optimizer, 1, "pretrain")
    optimizer.zero_grad()
    return model


def tune(path: Path, model: Net, name: str = "tune", **options: Any) -> None:
    optimizer, problem = tuned(model), culpa.Problem(model, classifying)
    with culpa.record(path, problem, optimizer, append=True, **options) as recorder:
        loop(recorder, model, classifying, optimizer, 2, name)


def loaded(path: Path) -> Net:
    """A model in the final state of a run, as another process makes it."""
    run, model = culpa.open_run(path), Net()
    model.load_state_dict(run.final_state() | run.final_buffers())
    return model


def both(model: Net) -> culpa.Problem:
    named = {"pretrain": rebuilding, "tune": classifying}
    return culpa.Problem.by_stage({n: culpa.Problem(model, f) for n, f in named.items()})


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def in_a_process_of_its_own(work: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs in two processes."""
    path = tmp_path_factory.mktemp("jobs") / "run"
    in_a_process_of_its_own(lambda: pretrain(path, append=True))  # nothing there: it begins
    in_a_process_of_its_own(lambda: tune(path, loaded(path)))
    return path


def test_two_processes_make_what_one_loop_makes(path: Path) -> None:
    run = culpa.open_run(path)
    assert [(s.name, s.start, s.stop) for s in run.stages] == [("pretrain", 0, 7), ("tune", 7, 14)]
    assert same(run.final_state() | run.final_buffers(), truth())
    assert run.verify(both(built()), level="replay").executed == 14


@pytest.mark.parametrize("stage", ["pretrain", "tune"])
def test_without_a_job_against_a_loop_that_skips_it(stage: str, path: Path) -> None:
    run = culpa.open_run(path)
    replay = culpa.replay(run, both(built()), without=stage)
    expected = truth(range(7) if stage == "pretrain" else range(7, 14))
    for name, value in (replay.state | replay.buffers).items():
        assert torch.equal(value, expected[name]), name


def test_one_process_and_a_third_job(tmp_path: Path) -> None:
    model = pretrain(tmp_path / "run")
    digests = [culpa.open_run(tmp_path / "run").root_digest]
    tune(tmp_path / "run", model)
    assert same(dict(model.state_dict()), truth())
    digests.append(culpa.open_run(tmp_path / "run").root_digest)
    tune(tmp_path / "run", model, "again")
    run = culpa.open_run(tmp_path / "run")
    assert [(job.stop, job.root_digest) for job in run.manifest.earlier] == [
        (7, digests[0]),
        (14, digests[1]),
    ]
    assert run.root_digest not in digests
    assert run.verify().finished
    with pytest.raises(culpa.IntegrityError, match="that of its first 7 updates"):
        run.verify(root_digest=digests[0])


def test_the_same_optimizer_goes_on(tmp_path: Path) -> None:
    model = built()
    optimizer = pretrained(model)
    problem = culpa.Problem(model, rebuilding)
    for name in ("one", "two"):
        with culpa.record(tmp_path / "run", problem, optimizer, append=True) as recorder:
            loop(recorder, model, rebuilding, optimizer, 1, name)
    assert not culpa.open_run(tmp_path / "run").step(7).reset
    plain = built()
    optimizer = pretrained(plain)
    driver = Skipping(plain, [optimizer])
    for name in ("one", "two"):
        loop(driver, plain, rebuilding, optimizer, 1, name)
    run = culpa.open_run(tmp_path / "run")
    assert same(run.final_state() | run.final_buffers(), dict(plain.state_dict()))
    named = {n: culpa.Problem(model, rebuilding) for n in ("one", "two")}
    assert run.verify(culpa.Problem.by_stage(named), level="replay").executed == 14


def refused(path: Path, model: Net, error: type[Exception], said: str, **options: Any) -> None:
    before = everything(path)
    with pytest.raises(error, match=said):
        tune(path, model, **options)
    assert everything(path) == before


def test_another_state_is_refused(path: Path) -> None:
    model = loaded(path)
    with torch.no_grad():
        model.rebuild.weight[0, 0] += 1e-3
        model.trunk[0].weight[0, 0] += 1e-6
    refused(path, model, culpa.RecordError, r"params/rebuild\.weight \(by up to 0\.001\)")
    model = loaded(path)
    model.trunk[1].running_mean[0] += 1e-6
    refused(path, model, culpa.RecordError, "running_mean")
    model = loaded(path)
    with torch.no_grad():
        model.classify.bias[0] = -0.0
        model.classify.bias[1] = 0.0
    refused(path, model, culpa.RecordError, "classify.bias")


def test_an_optimizer_with_another_state_is_refused(path: Path) -> None:
    model = loaded(path)
    optimizer = pretrained(model)
    rebuilding(model.eval(), data(3)[0]).backward()
    with torch.no_grad():
        kept = {n: p.clone() for n, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            p.copy_(kept[name])
    problem = culpa.Problem(model, rebuilding)
    with (
        pytest.raises(culpa.RecordError, match="Pass a new optimizer"),
        culpa.record(path, problem, optimizer, append=True),
    ):
        raise AssertionError


def test_a_name_twice_and_another_model_are_refused(path: Path, tmp_path: Path) -> None:
    refused(path, loaded(path), culpa.StageError, "used twice", name="pretrain")
    larger = Net()
    larger.classify = nn.Linear(6, 3)
    refused(path, larger, culpa.ProblemError, "classify.weight")
    refused(path, loaded(path), culpa.OptionError, "stored", name="x", examples="reference")
    assert culpa.open_run(path).verify().finished


def test_a_job_without_updates_leaves_the_run_as_it_was(path: Path) -> None:
    before, model = everything(path), loaded(path)
    with culpa.record(path, culpa.Problem(model, classifying), tuned(model), append=True) as r:
        assert r.num_steps == 0
    assert everything(path) == before
    assert culpa.open_run(path).verify().finished


def test_one_problem_for_two_jobs_is_refused(path: Path) -> None:
    with pytest.raises(culpa.ProblemError, match="by_stage"):
        culpa.replay(culpa.open_run(path), culpa.Problem(built(), rebuilding))


def test_all_states_of_a_complete_job_stay(tmp_path: Path) -> None:
    model = pretrain(tmp_path / "run", checkpoints=culpa.Every(1))
    tune(tmp_path / "run", model)  # Thinned would drop most
    assert {*range(8)} <= {*culpa.open_run(tmp_path / "run").kept_states}


class Stop(Exception):  # noqa: N818
    pass


def by_steps(path: Path, start: Path, stop: int = -1, **options: Any) -> Tensors:
    """A second job that counts its own updates, and trains what was frozen before."""
    model = loaded(start)
    optimizer, batches = tuned(model), data(4)
    torch.manual_seed(3)
    problem = culpa.Problem(model, classifying)
    with culpa.record(path, problem, optimizer, append=True, **options) as recorder:
        for k in range(recorder.num_steps, len(batches)):
            with recorder.step(batches[k]):
                optimizer.zero_grad()
                classifying(model, batches[k]).backward()
                optimizer.step()
            if k == stop:
                raise Stop
    return dict(model.state_dict())


@pytest.mark.parametrize("examples", ["stored", "reference"])
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_job_of_steps_goes_on(stop: int, examples: str, tmp_path: Path) -> None:
    start, path, whole = (tmp_path / name for name in ("start", "run", "whole"))
    pretrain(start, examples=examples)
    shutil.copytree(start, path)
    shutil.copytree(start, whole)
    truth = by_steps(whole, start, examples=examples)
    assert culpa.open_run(whole).verify().updates == 14
    assert [s.name for s in culpa.open_run(whole).stages] == ["pretrain", "training"]
    with pytest.raises(Stop):
        by_steps(path, start, stop, examples=examples)
    if examples == "reference":
        with pytest.raises(culpa.UnsupportedError, match="Record anew"):
            by_steps(path, start, resume=True, examples=examples)
        assert same(by_steps(path, start, overwrite=True, examples=examples), truth)
    else:
        assert same(by_steps(path, start, resume=True), truth)
    run = culpa.open_run(path)
    assert run.verify().updates == 14
    assert same(run.final_state() | run.final_buffers(), truth)

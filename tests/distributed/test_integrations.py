"""Frameworks on several processes: recorded, replayed bit for bit, counterfactuals by hand."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import culpa
from tests.distributed.processes import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Lightning and accelerate
]
Trained = dict[str, Tensor]


def launched(ranks: int, folder: Path, work: Callable[[int], Any]) -> Any:
    """``work`` on every rank, which finds what ``torchrun`` tells its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def as_launched(rank: int) -> Any:
        size = str(ranks)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
        os.environ |= {"LOCAL_WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return work(rank)

    return run_ranks(ranks, folder / "stores", as_launched)


def weights(model: torch.nn.Module) -> Trained:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: Trained, expected: Trained) -> None:
    """What trained, bit for bit; ``found`` may have what did not."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def assert_recorded(
    path: Path, problem: culpa.Problem, plain: list[Any], watched: list[Any], updates: int
) -> culpa.Run:
    """Ranks trained as without culpa; one process and several replay their run."""
    for (bare, replayed), expected in zip(watched, plain, strict=True):
        assert_same(bare, expected)
        assert_same(replayed, expected)
    run = culpa.open_run(path)
    assert run.num_steps == updates
    whole = culpa.replay(run, problem)
    assert whole.claim == "bitwise"
    assert_same(whole.state, plain[0])
    return run


def assert_scored(run: culpa.Run, problem: culpa.Problem, behaviour: culpa.Behaviour) -> None:
    """Scores of the updates are what leaving out each of them does, on one process."""
    scores = culpa.attribute(run, problem, [behaviour]).steps[:, 0]
    without = (culpa.replay(run, problem, without=[k]) for k in range(run.num_steps))
    truths = torch.tensor([float(one.effect(behaviour).mean()) for one in without])
    torch.testing.assert_close(
        scores.float(), truths, rtol=0.3, atol=0.1 * float(truths.abs().max())
    )


def replayed(path: Path, problem: culpa.Problem) -> Trained:
    """By as many ranks as recorded."""
    with culpa.across_ranks():
        whole = culpa.replay(culpa.open_run(path), problem)
    assert whole.claim == "bitwise"
    return whole.state


@pytest.fixture
def no_accelerator_yet() -> Any:
    """Accelerate keeps one state a process, the number of processes in it."""
    state = pytest.importorskip("accelerate").state.AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


RANKS = [2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.usefixtures("no_accelerator_yet")
@pytest.mark.parametrize("ranks", RANKS)
def test_a_trainer_of_transformers(ranks: int, tmp_path: Path) -> None:
    """A loss weighted by the tokens of all ranks, a shorter last update; on three also dropout."""
    pytest.importorskip("transformers")
    from culpa.integrations.transformers import problem_of, record_trainer
    from integrations.by_hand import Spied, retrained, spied
    from integrations.llama import collate, llama, sentences, trainer

    dropout = 0.0 if ranks == 2 else 0.1
    options = {"num_train_epochs": 1, "ddp_find_unused_parameters": False}

    def job(name: str) -> Any:
        return trainer(tmp_path / name, llama(dropout), **options)

    def plain(rank: int) -> tuple[Trained, Spied]:
        trained = job(f"plain-{rank}")
        seen = spied(trained)
        return weights(trained.model), seen

    def watched(rank: int) -> tuple[Trained, Trained]:
        trained = job(f"job-{rank}")
        with record_trainer(trained, tmp_path / "run", stage="sft"):
            trained.train()
        return weights(trained.model), replayed(tmp_path / "run", problem_of(trained))

    truth, found = (launched(ranks, tmp_path, work) for work in (plain, watched))
    fresh, updates = problem_of(job("fresh")), 2 if ranks == 2 else 1
    run = assert_recorded(tmp_path / "run", fresh, [one[0] for one in truth], found, updates)
    assert len(run.step(0).micro_batches) == 2 * ranks
    if dropout:
        return
    seen = [one[1] for one in truth]
    of_all = [[*chain(*micro)] for micro in zip(*(one.updates for one in seen), strict=True)]
    for k in range(updates):
        without = culpa.replay(run, fresh, without=[k])
        by_hand = retrained(llama(), Spied(of_all, seen[0].rates, seen[0].scales), [k])
        for name, value in by_hand.items():
            torch.testing.assert_close(without.state[name], value, rtol=0, atol=2e-5)
    batch = collate(sentences(3, seed=9))
    assert_scored(run, fresh, culpa.behaviours.sequence_log_likelihood("likelihood", batch))


@pytest.mark.parametrize("ranks", RANKS)
def test_a_trainer_of_lightning(ranks: int, tmp_path: Path) -> None:
    """step(closure), accumulation with a shorter last update, clipping, a schedule, dropout."""
    pytest.importorskip("lightning")
    from culpa.integrations.lightning import RecorderCallback, problem_of
    from integrations.test_lightning import INPUTS, TARGETS, Head, fitted

    options = {"strategy": "ddp", "devices": ranks, "gradient_clip_val": 0.2}
    options |= {"accumulate_grad_batches": 3 if ranks == 2 else 2}

    def plain(rank: int) -> Trained:
        return weights(fitted(tmp_path / f"plain-{rank}", Head("step"), [], **options))

    def watched(rank: int) -> tuple[Trained, Trained]:
        callback = RecorderCallback(tmp_path / "run", stage="head")
        module = fitted(tmp_path / f"job-{rank}", Head("step"), [callback], **options)
        return weights(module), replayed(tmp_path / "run", problem_of(Head("step")))

    truth, found = (launched(ranks, tmp_path, work) for work in (plain, watched))
    run = assert_recorded(tmp_path / "run", problem_of(Head("step")), truth, found, 4)
    judged = culpa.log_likelihood("likelihood", (INPUTS[:9], TARGETS[:9]))
    assert_scored(run, problem_of(Head("step")), judged)


@pytest.mark.usefixtures("no_accelerator_yet")
@pytest.mark.parametrize("ranks", [2])
def test_the_recipe_for_accelerate(ranks: int, tmp_path: Path) -> None:
    """The very lines of the page, with DistributedDataParallel made by ``prepare``."""
    from integrations import test_accelerate as one_process

    def plain(rank: int) -> Trained:
        return weights(one_process.train(one_process.net(0.1)))

    def watched(rank: int) -> tuple[Trained, Trained]:
        module = one_process.recorded(one_process.net(0.1), tmp_path / "run")
        problem = culpa.Problem(one_process.net(0.1), one_process.loss_of)
        return weights(module), replayed(tmp_path / "run", problem)

    truth, found = (launched(ranks, tmp_path, work) for work in (plain, watched))
    fresh = one_process.fresh("no", 0.1)
    run = assert_recorded(tmp_path / "run", fresh, truth, found, 4)
    assert_scored(run, fresh, one_process.LIKELIHOOD)


@pytest.mark.usefixtures("no_accelerator_yet")
@pytest.mark.parametrize("kind", ["fsdp", "MEGATRON_LM", "2 devices of one process"])
def test_trainers_that_split_the_model_are_refused_before_training(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with what to do instead."""
    pytest.importorskip("transformers")
    from accelerate import DistributedType

    from culpa.integrations.transformers import record_trainer
    from integrations.llama import trainer

    job = trainer(tmp_path / "job")
    if kind == "fsdp":
        monkeypatch.setattr(job, "is_fsdp_enabled", True)
    elif kind == "MEGATRON_LM":
        state = vars(job.accelerator.state)
        monkeypatch.setitem(state, "distributed_type", DistributedType.MEGATRON_LM)
    else:
        monkeypatch.setattr(job.args, "_n_gpu", 2)
    with (
        pytest.raises(culpa.UnsupportedError, match=kind) as refused,
        record_trainer(job, tmp_path / "run", stage="sft"),
    ):
        pass
    assert "DistributedDataParallel" in str(refused.value) or "torchrun" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_strategies_of_lightning_that_split_the_model_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with the one that is recorded."""
    lightning = pytest.importorskip("lightning")
    from culpa.integrations.lightning import RecorderCallback
    from integrations.test_lightning import Head, fitted

    monkeypatch.setattr(lightning.Trainer, "world_size", 2)
    callback = RecorderCallback(tmp_path / "run", stage="head")
    with pytest.raises(culpa.UnsupportedError, match=r"2 processes with SingleDevice.*'ddp'"):
        fitted(tmp_path / "job", Head(), [callback])
    assert not (tmp_path / "run").exists()

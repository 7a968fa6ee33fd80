"""Two trainers in sequence append their stages to one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
# transformers, peft and their dependencies deprecate each other's functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

import culpa
from culpa.integrations.transformers import problem_of, record_trainer
from integrations.llama import llama, trainer

SECOND: dict[str, Any] = {
    "seed": 2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "label_smoothing_factor": 0.1,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 1,
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def trained(folder: Path, *jobs: dict[str, Any]) -> dict[str, Tensor]:
    """The truth: the same trainers one after another, nothing recorded."""
    model = llama()
    for number, options in enumerate(jobs):
        trainer(folder / str(number), model, **options).train()
    return weights(model)


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder, model = tmp_path_factory.mktemp("sequence"), llama()
    for stage, options in (("sft", {}), ("aligned", SECOND)):
        job = trainer(folder / stage, model, **options)
        with record_trainer(job, folder / "run", stage=stage, append=True) as recording:
            job.train()
        assert recording.num_steps == (6 if stage == "sft" else 2)
    return folder / "run", model


def problems(folder: Path) -> culpa.Problem:
    """As another process builds them: both trainers, of one model."""
    model = llama()
    jobs = {"sft": trainer(folder / "a", model), "aligned": trainer(folder / "b", model, **SECOND)}
    return culpa.Problem.by_stage({stage: problem_of(job) for stage, job in jobs.items()})


def test_two_trainers_make_one_run(sequence: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = sequence
    run = culpa.open_run(path)
    assert [(s.name, s.start, s.stop) for s in run.stages] == [("sft", 0, 6), ("aligned", 6, 8)]
    truth = trained(tmp_path, {}, SECOND)
    assert same(weights(model), truth)
    problem = problems(tmp_path)
    assert same(culpa.replay(run, problem).state, truth)
    assert run.verify(problem, level="replay").executed == 8


def test_without_a_stage_is_the_other_trainer_alone(
    sequence: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    run, problem = culpa.open_run(sequence[0]), problems(tmp_path)
    for stage, left in (("aligned", {}), ("sft", SECOND)):
        replay = culpa.replay(run, problem, without=stage)
        assert same(replay.state, trained(tmp_path / stage, left)), stage


def test_a_trainer_of_other_weights_is_refused(
    sequence: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    root = culpa.open_run(sequence[0]).root_digest
    job = trainer(tmp_path / "job")
    with (
        pytest.raises(culpa.RecordError, match="final state"),
        record_trainer(job, sequence[0], stage="third", append=True),
    ):
        job.train()
    assert culpa.open_run(sequence[0]).root_digest == root

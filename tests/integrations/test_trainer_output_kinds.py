"""Kinds of training that are over: resumed, of adapters, saved by epoch, weights alone, ..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("transformers")
# transformers, peft and their dependencies deprecate each other's functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

import culpa
from culpa.errors import (
    NotReproducibleError,
    RecordError,
    UnsupportedError,
)
from culpa.integrations.trainer_checks import checks_of
from culpa.integrations.trainer_output import from_trainer_output
from culpa.integrations.transformers import problem_of, record_trainer
from integrations.llama import collate, llama
from integrations.over import SAVING, Masking, contents, job, same, weights


def masked(folder: Path, **options: Any) -> Any:
    made = job(folder, save_steps=2, **options)
    made.data_collator = Masking()
    return made


def test_a_training_that_was_resumed(tmp_path: Path) -> None:
    output = tmp_path / "output"
    masked(output).train()
    second = masked(output)
    second.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    final = weights(second.model)
    with pytest.raises(NotReproducibleError, match=r"checkpoint-4.*resumed="):
        from_trainer_output(output, masked(output), path=tmp_path / "a")
    run = from_trainer_output(output, masked(output), path=tmp_path / "b", resumed=[2])
    assert [s.name for s in run.stages] == ["train 0-2", "train 2-4", "train 4-6"]
    assert all(c.bitwise for c in checks_of(run))
    problem = problem_of(masked(tmp_path / "x"))
    by_stage = culpa.Problem.by_stage({stage.name: problem for stage in run.stages})
    assert same(final, culpa.replay(run, by_stage).state)


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
        return peft.get_peft_model(llama(), lora)

    output = tmp_path / "output"
    first = job(output, adapted())
    first.train()
    for start in (0, 2):
        again = job(output, adapted())
        run = from_trainer_output(output, again, path=tmp_path / f"run{start}", start=start)
        checks = checks_of(run)
        assert all(c.bitwise for c in checks)
        assert checks[0].compared == ("adapters", "optimizer", "scheduler")
        problem = problem_of(job(tmp_path / "x", adapted()))
        assert same(weights(first.model), culpa.replay(run, problem).state)


def test_saved_by_epoch_after_evaluation_and_the_best_at_the_end(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "save_total_limit": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    options |= {"learning_rate": 0.2, "report_to": ["none"]}
    output = tmp_path / "output"
    job(output, **options).train()
    before = contents(output)
    assert {name.split("/")[0] for name in before} < {"checkpoint-3", "checkpoint-6"}
    run = from_trainer_output(output, job(output, **options), path=tmp_path / "run")
    assert contents(output) == before
    assert all(c.bitwise and c.generators for c in checks_of(run))


def test_a_model_that_the_trainer_makes_when_it_trains(tmp_path: Path) -> None:
    from transformers import Trainer

    def made() -> Any:
        like = job(tmp_path / "output", **SAVING)
        given = {"train_dataset": like.train_dataset, "data_collator": collate}
        return Trainer(model_init=lambda: llama(0.2), args=like.args, **given)

    first = made()
    first.train()
    run = from_trainer_output(tmp_path / "output", made(), path=tmp_path / "run")
    assert all(c.bitwise and c.generators for c in checks_of(run))
    problem = problem_of(made())
    assert same(weights(first.model), culpa.replay(run, problem).state)


def test_weights_alone_are_enough_from_the_beginning(tmp_path: Path) -> None:
    output = tmp_path / "output"
    job(output, save_only_model=True).train()
    run = from_trainer_output(output, job(output), path=tmp_path / "run")
    assert [c.compared for c in checks_of(run)] == [("model",)] * 3
    assert all(c.bitwise and c.generators is None for c in checks_of(run))
    with pytest.raises(UnsupportedError, match=r"save_only_model.*start=0"):
        from_trainer_output(output, job(output), path=tmp_path / "late", start=2)


def test_stages_within_one_call_of_train(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    live = job(tmp_path / "live")

    class Halves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                recording.begin_stage("second")

    live.add_callback(Halves())
    with record_trainer(live, tmp_path / "run", stage="first") as recording:
        with pytest.raises(RecordError, match="has not begun"):
            recording.begin_stage("early")
        live.train()
    run = culpa.open_run(tmp_path / "run")
    assert [(s.name, len(s)) for s in run.stages] == [("first", 3), ("second", 3)]
    problem = problem_of(job(tmp_path / "x"))
    assert same(weights(live.model), culpa.replay(run, problem).state)

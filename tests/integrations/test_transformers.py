"""An unmodified ``transformers.Trainer``: recorded, replayed bit for bit, and counterfactuals
against a training loop written by hand."""

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
from culpa.errors import OptionError, RecordError
from culpa.integrations.transformers import problem_of, record_trainer
from integrations.by_hand import retrained, spied
from integrations.llama import collate, llama, sentences, trainer


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() <= other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def judged(count: int = 3) -> culpa.Behaviour:
    batch = collate(sentences(count, seed=9))
    return culpa.behaviours.sequence_log_likelihood("likelihood", batch, per="token")


def test_the_trainer_trains_as_before_and_every_update_replays(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain")
    plain.train()
    job = trainer(tmp_path / "job")
    with record_trainer(job, tmp_path / "run", stage="sft") as recording:
        job.train()
    assert recording.num_steps == 6
    assert same(trained(plain.model), trained(job.model))
    run = culpa.open_run(tmp_path / "run")
    assert [(s.name, len(s)) for s in run.stages] == [("sft", 6)]
    fresh = problem_of(trainer(tmp_path / "fresh"))  # as another process would build it
    assert same(trained(plain.model), culpa.replay(run, fresh).state)


def test_without_an_update_against_a_loop_by_hand(tmp_path: Path) -> None:
    seen = spied(trainer(tmp_path / "spied"))
    job = trainer(tmp_path / "job")
    with record_trainer(job, tmp_path / "run", stage="sft"):
        job.train()
    run, problem = culpa.open_run(tmp_path / "run"), problem_of(job)
    behaviour = judged()
    scores = culpa.attribute(run, problem, [behaviour]).steps[:, 0]
    final = behaviour.values(job.model).mean()
    truths: list[float] = []
    for k in range(6):
        without = culpa.replay(run, problem, without=[k])
        truth = retrained(llama(), seen, [k])
        for name, value in truth.items():
            assert torch.allclose(without.state[name], value, atol=2e-5), (k, name)
        other = llama()
        other.load_state_dict(truth, strict=False)
        truths.append(float(final - behaviour.values(other).mean()))
    assert culpa.agreement(scores, torch.tensor(truths, dtype=torch.float64)).pearson > 0.9
    additive = culpa.embed(run, problem, form="additive").score(behaviour).mean()
    assert float(additive) == pytest.approx(float(scores.sum()), rel=1e-3)
    assert float(additive) == pytest.approx(sum(truths), rel=0.25)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.05},
        {"lr_scheduler_type": "linear", "gradient_accumulation_steps": 4},  # a partial last update
    ],
    ids=["bf16", "smoothing", "sgd", "partial"],
)
def test_settings_of_the_trainer_replay(tmp_path: Path, options: dict[str, Any]) -> None:
    job = trainer(tmp_path / "job", **options)
    with record_trainer(job, tmp_path / "run", stage="sft"):
        job.train()
    run = culpa.open_run(tmp_path / "run")
    problem = problem_of(trainer(tmp_path / "fresh", **options))
    assert same(trained(job.model), culpa.replay(run, problem).state)
    behaviour = judged()
    k = run.num_steps // 2
    score = culpa.attribute(run, problem, [behaviour]).steps[k, 0].item()
    truth = culpa.replay(run, problem, without=[k]).effect(behaviour).mean().item()
    assert score == pytest.approx(truth, rel=0.25)


def test_adapters_with_dropout(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
        return peft.get_peft_model(llama(), lora)

    job = trainer(tmp_path / "job", adapted())
    with record_trainer(job, tmp_path / "run", stage="sft"):
        job.train()
    run, problem = culpa.open_run(tmp_path / "run"), problem_of(trainer(tmp_path / "x", adapted()))
    assert {n for n in run.final_state() if "lora" in n} == trained(job.model).keys()
    assert same(trained(job.model), culpa.replay(run, problem).state)


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 1},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["evaluating", "checkpointing", "reentrant"],
)
def test_dropout_beside_what_else_draws_or_computes_twice(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    plain = trainer(tmp_path / "plain", llama(0.2), **options)
    plain.train()
    job = trainer(tmp_path / "job", llama(0.2), **options)
    with record_trainer(job, tmp_path / "run", stage="sft"):
        job.train()
    assert same(trained(plain.model), trained(job.model))
    run = culpa.open_run(tmp_path / "run")
    fresh = problem_of(trainer(tmp_path / "fresh", llama(0.2), **options))
    assert same(trained(plain.model), culpa.replay(run, fresh).state)
    behaviour = judged()
    for problem in (fresh, problem_of(job)):  # checkpointing is switched on by training only
        score = culpa.attribute(run, problem, [behaviour]).steps[5, 0].item()
        truth = culpa.replay(run, problem, without=[5]).effect(behaviour).mean().item()
        assert score == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("stop", [2, 3])  # in the middle of an epoch, and between two
def test_a_trainer_that_resumes_is_recorded_from_its_checkpoint_on(
    tmp_path: Path, stop: int
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": stop}
    whole = trainer(tmp_path / "job", llama(0.2), **options)
    whole.train()
    checkpoint = tmp_path / "job" / f"checkpoint-{stop}"
    job = trainer(tmp_path / "job", llama(0.2), **options)
    with record_trainer(job, tmp_path / "run", stage="resumed") as recording:
        job.train(resume_from_checkpoint=str(checkpoint))
    assert recording.num_steps == 6 - stop
    assert same(trained(whole.model), trained(job.model))
    run = culpa.open_run(tmp_path / "run")
    fresh = problem_of(trainer(tmp_path / "fresh", llama(0.2), **options))
    assert same(trained(whole.model), culpa.replay(run, fresh).state)


SECOND: dict[str, Any] = {"seed": 2, "learning_rate": 2e-3, "label_smoothing_factor": 0.1}


def test_stages_of_trainers_in_sequence_are_attributed(tmp_path: Path) -> None:
    model = llama()  # that they record and replay: test_sequence.py
    for stage, options in (("one", {}), ("two", SECOND)):
        job = trainer(tmp_path / stage, model, **options)
        with record_trainer(job, tmp_path / "run", stage=stage, append=True):
            job.train()
    run = culpa.open_run(tmp_path / "run")
    fresh = llama()
    jobs = {
        "one": trainer(tmp_path / "c", fresh),
        "two": trainer(tmp_path / "d", fresh, **SECOND),
    }
    problem = culpa.Problem.by_stage({name: problem_of(job) for name, job in jobs.items()})
    alone = llama()
    trainer(tmp_path / "e", alone, **SECOND).train()
    assert same(trained(alone), culpa.replay(run, problem, without="one").state)
    behaviour = judged()
    truth = behaviour.values(model) - behaviour.values(alone)
    embedded = culpa.embed(run, problem, propagator=culpa.Secant(1)).effect(behaviour)[0]
    assert torch.allclose(embedded, truth, rtol=0.05, atol=1e-4)
    scores = culpa.attribute(run, problem, [behaviour]).stages[:, 0]
    assert float(scores[0]) == pytest.approx(float(truth.mean()), rel=0.3)


def test_misuse_is_named(tmp_path: Path) -> None:
    job = trainer(tmp_path / "job")
    taken = record_trainer(job, tmp_path / "run", stage="sft", clip_grad_norm=1.0)
    with pytest.raises(OptionError, match="clip_grad_norm"):
        taken.__enter__()
    nothing = record_trainer(job, tmp_path / "run", stage="sft")
    with pytest.raises(RecordError, match="was not called"), nothing:
        pass
    with record_trainer(job, tmp_path / "run", stage="sft"):
        job.train()
        with pytest.raises(RecordError, match="as one stage"):
            job.train()
    assert not [c for c in job.callback_handler.callbacks if "Watcher" in type(c).__name__]
    assert "get_batch_samples" not in vars(job)

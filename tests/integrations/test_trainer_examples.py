"""The training examples of a recorded ``transformers.Trainer`` are its sentences, kept once."""

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
from culpa.integrations.transformers import count_of, problem_of, record_trainer
from integrations.llama import VOCABULARY, collate, llama, sentences, trainer

SETTINGS: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 0}
SETTINGS |= {"weight_decay": 0.0, "max_grad_norm": 0.0, "learning_rate": 1e-3}


def packed() -> list[dict[str, list[int]]]:
    """12 sentences of the same length, as packing makes them."""
    draw = torch.Generator().manual_seed(3)
    drawn = torch.randint(1, VOCABULARY, (12, 8), generator=draw).tolist()
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in drawn]


def job(folder: Path, **options: Any) -> Any:
    made = trainer(folder, **{**SETTINGS, **options})
    made.train_dataset = packed()
    return made


def losses(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The summed loss of each sentence."""
    found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = inputs["labels"][:, 1:]
    each = nn.functional.cross_entropy(
        found[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    return each.sum(1)


def shares(model: nn.Module, batch: Any) -> Tensor:
    """Of the micro-batch's loss, which is divided by the tokens of the whole update."""
    found = losses(model, batch["inputs"])
    return len(found) * found / count_of(batch)


def judged() -> culpa.Behaviour:
    batch = collate(sentences(3, seed=9))
    return culpa.behaviours.sequence_log_likelihood("likelihood", batch, per="token")


def by_hand(order: list[list[int]], reweighed: int, weight: float) -> nn.Module:
    """Both epochs with AdamW, one sentence weighed differently."""
    model = llama().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rows = packed()
    for update in order:
        weights = torch.tensor([weight if i == reweighed else 1.0 for i in update])
        optimizer.zero_grad()
        found = losses(model, collate([rows[i] for i in update]))
        ((weights * found).sum() / (6 * len(update))).backward()
        optimizer.step()
    return model


def test_each_sentence_is_an_example_and_has_a_score(tmp_path: Path) -> None:
    live = job(tmp_path / "job")
    with record_trainer(live, tmp_path / "run", stage="sft"):
        live.train()
    run = culpa.open_run(tmp_path / "run")
    assert run.num_examples == 12  # not one a micro-batch, nor another in the second epoch
    assert len(run.tables.layouts) == 1
    problem = problem_of(job(tmp_path / "x"), example_losses=shares)
    again = culpa.replay(run, problem)
    assert all(torch.equal(p, again.state[n]) for n, p in live.model.named_parameters())

    known = {tuple(row["input_ids"]): at for at, row in enumerate(packed())}
    by_number: dict[int, int] = {}
    order: list[list[int]] = []
    for k in range(run.num_steps):
        order.append([])
        for micro, batch in zip(run.step(k).micro_batches, run.batches_of(k), strict=True):
            inputs = batch["inputs"]
            for number, ids in zip(micro.rows, inputs["input_ids"].tolist(), strict=True):
                by_number[number] = known[tuple(ids)]
                order[-1].append(known[tuple(ids)])
    assert sorted(by_number.values()) == list(range(12))

    behaviour = judged()
    scores = culpa.attribute(
        run, problem, [behaviour], examples=True, propagator=culpa.Exact()
    ).examples
    assert scores is not None
    step = 1e-3
    truth = [
        (
            behaviour.values(by_hand(order, i, 1 + step))
            - behaviour.values(by_hand(order, i, 1 - step))
        )
        .mean()
        .item()
        / (2 * step)
        for i in range(12)
    ]
    found = torch.as_tensor(scores)[:, 0]
    wanted = torch.tensor([truth[by_number[number]] for number in range(12)], dtype=torch.float64)
    agreement = culpa.agreement(found, wanted)
    assert agreement.pearson > 0.97
    assert 0.8 < agreement.slope < 1.25


def test_the_count_comes_back_as_the_trainer_passed_it(tmp_path: Path) -> None:
    passed: list[Any] = []
    live = job(tmp_path / "job")
    step = live.training_step

    def keep(model: nn.Module, inputs: Any, items: Any = None) -> Tensor:
        passed.append(items)
        return step(model, inputs, items)

    live.training_step = keep
    with record_trainer(live, tmp_path / "run", stage="sft"):
        live.train()
    run = culpa.open_run(tmp_path / "run")
    counts = [count_of(batch) for k in range(run.num_steps) for batch in run.batches_of(k)]
    assert len(counts) == 12
    assert all(isinstance(count, Tensor) and count.dtype == passed[0].dtype for count in counts)
    assert {float(count) for count in counts} == {float(p) for p in passed} == {24.0}

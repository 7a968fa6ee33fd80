"""PEFT adapters added after pretraining was recorded, and merged: against a loop by hand."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

import culpa
from culpa.integrations.adapters import merged_weights, merging
from integrations.llama import collate, llama, sentences
from oracles.compare import assert_close

Tensors = dict[str, Tensor]
BATCHES = [collate(sentences(4, seed)) for seed in range(8)]
HELD_OUT = collate(sentences(6, seed=9))


def adapted(model: nn.Module) -> Any:
    torch.manual_seed(3)
    where = ["q_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=where))


def plain(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def pretraining(grown: Any, batch: Any) -> Tensor:
    with grown.adapted.disable_adapter() if hasattr(grown, "adapted") else nullcontext():
        return plain(grown.module, batch)


def tuning(grown: Any, batch: Any) -> Tensor:
    return plain(grown.adapted, batch)


def updates(model: nn.Module, optimizer: Optimizer, loss: Any, at: range, out: Any) -> None:
    """Without culpa, some of them left out."""
    for k in at:
        if k not in out:
            optimizer.zero_grad()
            loss(model, BATCHES[k]).backward()
            optimizer.step()


def by_hand(without: Collection[int] = ()) -> nn.Module:
    """Pretrained, adapted, merged by PEFT itself, trained on."""
    model = llama()
    updates(model, SGD(model.parameters(), lr=0.05, momentum=0.9), plain, range(3), without)
    wrapped = adapted(model)
    adapters = [p for p in wrapped.parameters() if p.requires_grad]
    updates(wrapped, SGD(adapters, lr=0.5, momentum=0.9), plain, range(3, 6), without)
    merged = wrapped.unload() if 6 in without else wrapped.merge_and_unload()
    merged.requires_grad_(True)
    updates(merged, SGD(merged.parameters(), lr=0.05), plain, range(7, 8), without)
    return merged


def recorded(folder: Path) -> Any:
    grown: Any = culpa.Grown(llama())
    problems = {}

    def job(path: Path, optimizer: Optimizer, name: str, loss: Any, batches: list[Any]) -> None:
        problems[name] = culpa.Problem(grown, loss)
        with (
            culpa.record(path, problems[name], optimizer, append=True) as recorder,
            recorder.stage(name),
        ):
            for batch in recorder.batches(batches):
                optimizer.zero_grad()
                loss(grown, batch).backward()
                optimizer.step()

    first = SGD(grown.module.parameters(), lr=0.05, momentum=0.9)
    job(folder / "pretrained", first, "pretrain", pretraining, BATCHES[:3])
    grown.adapted = adapted(grown.module)
    culpa.grow(culpa.open_run(folder / "pretrained"), folder / "run", grown)
    adapters = [p for p in grown.adapted.parameters() if p.requires_grad]
    second = SGD(adapters, lr=0.5, momentum=0.9)
    job(folder / "run", second, "adapt", tuning, BATCHES[3:6])
    merge = SGD(merged_weights(grown), lr=1.0)
    problems["merge"] = culpa.Problem(grown, merging)
    with (
        culpa.record(folder / "run", problems["merge"], merge, append=True) as recorder,
        recorder.stage("merge"),
        recorder.step("merge"),
    ):
        merge.zero_grad()
        merging(grown, "merge").backward()
        merge.step()
    bases = [p for n, p in grown.named_parameters() if "lora_" not in n]
    for p in bases:
        p.requires_grad_(True)
    job(folder / "run", SGD(bases, lr=0.05), "go on", pretraining, BATCHES[7:])
    return culpa.open_run(folder / "run"), culpa.Problem.by_stage(problems), grown


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return recorded(tmp_path_factory.mktemp("adapters"))


def same(found: Tensors, model: nn.Module) -> bool:
    """Whether the base is that of a model without adapters."""
    return all(torch.equal(found[name], p) for name, p in model.named_parameters())


def test_the_merge_is_that_of_peft_bit_for_bit(made: Any) -> None:
    run, problem, _ = made
    assert [(s.name, s.start, s.stop) for s in run.stages] == [
        *(("pretrain", 0, 3), ("adapt", 3, 6), ("merge", 6, 7), ("go on", 7, 8))
    ]
    assert same(run.final_state(), by_hand())
    assert run.verify(problem, level="replay").executed == 8


@pytest.mark.parametrize("stage", ["pretrain", "adapt", "merge", "go on"])
def test_without_a_stage_against_the_loop_by_hand(stage: str, made: Any) -> None:
    run, problem, _ = made
    found = culpa.replay(run, problem, without=stage)
    assert same(found.state, by_hand(run.stage(stage).updates))


def test_scores_and_effects_go_through_wrapping_and_merging(made: Any) -> None:
    run, problem, _ = made

    def judged(model: Any, batch: Any) -> Tensor:
        if not hasattr(model, "adapted"):
            return -plain(model, batch)[None]
        with model.adapted.disable_adapter():
            return -plain(model.module, batch)[None]

    behaviour = culpa.Behaviour("likelihood", judged, HELD_OUT)

    def value(without: Collection[int] = ()) -> Tensor:
        return behaviour.values(by_hand(without).eval()).mean()

    whole = value()
    truth = torch.stack([whole - value([k]) for k in range(8)])
    scores = culpa.attribute(run, problem, [behaviour], propagator=culpa.Exact())
    assert_close(scores.steps[:, 0], truth, 0.3)
    carried = culpa.embed(run, problem, propagator=culpa.Secant(1)).effect(behaviour).mean(1)
    stages = torch.stack([whole - value(stage.updates) for stage in run.stages])
    assert_close(carried, stages, 1e-3)


def test_a_model_without_adapters_has_nothing_to_merge() -> None:
    with pytest.raises(culpa.ProblemError, match="no layer of Linear has adapters"):
        merging(nn.Linear(2, 2), "merge")

"""A loss for every stage: recorded, replayed, attributed, and refused where it is not given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import culpa
from oracles.loops import Loop, Open, assert_modelled, assert_replayed
from oracles.problems import (
    cross_entropies,
    cross_entropy,
    held_out,
    log_likelihoods,
    seeded,
    smooth,
)
from oracles.recipes import DECAYING, sgd

BATCHES = smooth({0: sgd()}, DECAYING).batches


def margins(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that is not the cross-entropy: one minus the soft margin, per example."""
    inputs, targets = batch
    return 1.0 - torch.tanh(model(inputs)).gather(1, targets[:, None])[:, 0]


def margin(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return margins(model, batch).mean()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()


def problems(model: nn.Module) -> Any:
    first = culpa.Problem(model, cross_entropy, example_losses=cross_entropies)
    second = culpa.Problem(model, margin, example_losses=margins)
    return culpa.Problem.by_stage({"pretrain": first, "align": second, "again": first})


STAGES = (
    ("pretrain", cross_entropy, 0, 4),
    ("align", margin, 4, 7),
    ("again", cross_entropy, 7, 9),
)


def train(model: nn.Module, opened: Open, way: str = "given") -> None:
    """By ``recorder.stage(problem=...)``, or with the problems by stage from the beginning."""
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    first, second = culpa.Problem(model, cross_entropy), culpa.Problem(model, margin)
    mine = {cross_entropy: first, margin: second}
    with opened(first if way == "given" else problems(model), optimizer) as driver:
        for name, loss, start, stop in STAGES:
            options = {"problem": mine[loss]} if way == "given" else {}
            with driver.stage(name, **options):
                for batch in driver.batches(BATCHES[start:stop]):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()


def loop(way: str = "given") -> Loop:
    return Loop(
        seeded(0, net),
        lambda model, opened: train(model, opened, way),
        problems,
        log_likelihoods,
        held_out(),
    )


@pytest.mark.parametrize("way", ["given", "by stage"])
def test_a_loss_for_every_stage(way: str, tmp_path: Path) -> None:
    run, problem = assert_replayed(loop(way), tmp_path / "run")
    assert [run.step(stage.start).loss for stage in run.stages] == [0, 1, 0]
    assert_modelled(loop(way), run, problem)


def test_examples_are_scored_by_their_own_loss(tmp_path: Path) -> None:
    def plain(model: nn.Module, opened: Open) -> None:
        first, second = culpa.Problem(model, cross_entropy), culpa.Problem(model, margin)
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        with opened(first, optimizer) as driver:
            for name, loss, start, stop in STAGES:
                with driver.stage(name, problem=second if loss is margin else first):
                    for batch in driver.batches(BATCHES[start:stop]):
                        optimizer.zero_grad()
                        loss(model, batch).backward()
                        optimizer.step()

    run, _ = Loop(seeded(0, net), plain, problems, log_likelihoods, held_out()).record(
        tmp_path / "r"
    )
    behaviour = culpa.log_likelihood("right", held_out())
    scores = culpa.attribute(
        run, problems(net()), [behaviour], examples=True, counterfactual="zero-gradient"
    )
    for k in range(run.num_steps):  # linear in the gradient: its examples add up to the update
        total = scores.examples[list(run.example_ids(k)), 0].sum()
        assert float(total) == pytest.approx(float(scores.steps[k, 0]), rel=1e-6)


def test_the_run_is_resumed_with_problems_by_stage(tmp_path: Path) -> None:
    path = tmp_path / "run"
    whole = loop("by stage").retrain()

    class StopError(Exception):
        pass

    def attempt(model: nn.Module, until: int | None) -> None:
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        with culpa.record(path, problems(model), optimizer, resume=True) as recorder:
            for name, loss, start, stop in STAGES:
                with recorder.stage(name):
                    for k, batch in enumerate(recorder.batches(BATCHES[start:stop]), start):
                        if k == until:
                            raise StopError
                        optimizer.zero_grad()
                        loss(model, batch).backward()
                        optimizer.step()

    with pytest.raises(StopError):
        attempt(loop().model(), 5)
    model = loop().model()
    attempt(model, None)
    for name, value in model.named_parameters():
        assert torch.equal(value, dict(whole.named_parameters())[name])


def test_one_problem_for_a_run_of_several_is_refused_before_any_work(tmp_path: Path) -> None:
    run, _ = loop().record(tmp_path / "run")
    model = net()
    with pytest.raises(culpa.ProblemError, match=r"recorded with 2 problems.*by_stage.*'align'"):
        culpa.replay(run, culpa.Problem(model, cross_entropy), without="pretrain")
    first = culpa.Problem(model, cross_entropy)
    with pytest.raises(culpa.ProblemError, match="no problem for stage 'again'"):
        culpa.replay(run, culpa.Problem.by_stage({"pretrain": first, "align": first}))
    extra = dict.fromkeys(("pretrain", "align", "again", "fine-tune"), first)
    with pytest.raises(culpa.ProblemError, match="the stage 'fine-tune', which the run has not"):
        culpa.replay(run, culpa.Problem.by_stage(extra))


def test_a_wrong_order_of_losses_does_not_reproduce(tmp_path: Path) -> None:
    run, _ = loop().record(tmp_path / "run")
    model = net()
    first, second = culpa.Problem(model, cross_entropy), culpa.Problem(model, margin)
    swapped = culpa.Problem.by_stage({"pretrain": second, "align": first, "again": second})
    with pytest.raises(culpa.IntegrityError, match=r"update 0 .*does not reproduce"):
        culpa.replay(run, swapped)


def test_problems_of_two_modules_are_refused(tmp_path: Path) -> None:
    first, second = culpa.Problem(net(), cross_entropy), culpa.Problem(net(), margin)
    with pytest.raises(culpa.OptionError, match="one and the same module, got 2 modules"):
        culpa.Problem.by_stage({"a": first, "b": second})
    with pytest.raises(culpa.OptionError, match="got 0 modules"):
        culpa.Problem.by_stage({})
    with pytest.raises(culpa.OptionError, match="got a StagedProblem for 'b'"):
        culpa.Problem.by_stage({"a": first, "b": culpa.Problem.by_stage({"c": first})})
    optimizer = SGD(first.model.parameters(), lr=0.1)
    with culpa.record(tmp_path / "run", first, optimizer) as recorder:
        with recorder.stage("a"):
            for batch in recorder.batches(BATCHES[:2]):
                optimizer.zero_grad()
                cross_entropy(first.model, batch).backward()
                optimizer.step()
        with (
            pytest.raises(culpa.UnsupportedError, match=r"another module.*from the beginning"),
            recorder.stage("b", problem=second),
        ):
            pass


def test_a_stage_that_has_no_problem_is_refused_when_it_begins(tmp_path: Path) -> None:
    model = net()
    given = culpa.Problem.by_stage({"pretrain": culpa.Problem(model, cross_entropy)})
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(culpa.ProblemError, match="no problem for stage 'align'"),
        culpa.record(tmp_path / "run", given, optimizer) as recorder,
        recorder.stage("align"),
    ):
        pass

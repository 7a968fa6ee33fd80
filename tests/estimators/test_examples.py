"""Scores of training examples against taking their share out of every update they were in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import culpa
from oracles import unrolled
from oracles.compare import assert_close, pearson
from oracles.problems import (
    cross_entropies,
    cross_entropy,
    digits,
    gelu_mlp,
    held_out,
    log_likelihoods,
    smooth,
    unseen_digits,
)
from oracles.recipes import DECAYING, TWINS, sgd
from oracles.recording import Recorded, record
from oracles.retrain import Plan, behaviour_values, retrain

EXAMPLES, BATCH, EPOCHS = 160, 16, 6


@dataclass(frozen=True)
class Case:
    plan: Plan
    recorded: Recorded
    rows: list[list[int]]
    """Which training digits were in update k's batch, in order."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    images, targets = digits()
    generator = torch.Generator().manual_seed(3)
    rows: list[list[int]] = []
    for _ in range(EPOCHS):
        order = torch.randperm(EXAMPLES, generator=generator).tolist()
        rows += [order[i : i + BATCH] for i in range(0, EXAMPLES, BATCH)]
    steps = len(rows)
    plan = Plan(
        model=gelu_mlp(32),
        loss=cross_entropy,
        optimizers={0: lambda model: SGD(model.parameters(), lr=1e-3, momentum=0.9)},
        batches=[(images[r].flatten(1), targets[r]) for r in rows],
        rates=[(1e-3,)] * steps,
        stages=[("all", 0, steps)],
        example_losses=cross_entropies,
    )
    return Case(plan, record(plan, tmp_path_factory.mktemp("examples") / "run"), rows)


def test_example_ids_are_one_to_one_with_training_examples(case: Case) -> None:
    seen: dict[int, int] = {}
    for k, rows in enumerate(case.rows):
        ids = case.recorded.run.example_ids(k)
        assert isinstance(ids, tuple)
        assert len(ids) == len(rows)
        for row, number in zip(rows, ids, strict=True):
            assert seen.setdefault(row, number) == number
    assert sorted(seen.values()) == list(range(EXAMPLES))


def test_examples_against_retraining_without_them(case: Case) -> None:
    inputs, targets = unseen_digits(200)
    scores = culpa.attribute(
        case.recorded.run,
        case.recorded.problem,
        [culpa.log_likelihood("all", (inputs, targets))],
        examples=True,
    )
    assert scores.examples is not None
    assert scores.examples.shape == (EXAMPLES, 1)
    assert scores.examples.dtype == torch.float64
    whole = behaviour_values(retrain(case.plan).model, log_likelihoods, (inputs, targets))
    truth, found = [], []
    for example in range(0, EXAMPLES, 4):
        drop = {k: [rows.index(example)] for k, rows in enumerate(case.rows) if example in rows}
        assert len(drop) == EPOCHS
        model = retrain(case.plan, drop=drop).model
        truth.append(
            float((whole - behaviour_values(model, log_likelihoods, (inputs, targets))).mean())
        )
        k, (row,) = next(iter(drop.items()))
        found.append(float(scores.examples[case.recorded.run.example_ids(k)[row], 0]))
    estimate, answer = torch.tensor(found).double(), torch.tensor(truth).double()
    assert pearson(estimate, answer) >= 0.95
    # Epochs are added up and shares are of the mean: the size is that of the true effect.
    assert float(estimate @ answer / (estimate @ estimate)) == pytest.approx(1.0, abs=0.1)


def test_without_asking_there_are_none(case: Case) -> None:
    asked = [culpa.log_likelihood("all", unseen_digits(20))]
    assert culpa.attribute(case.recorded.run, case.recorded.problem, asked).examples is None


def test_under_sgd_examples_add_up_to_the_zero_gradient_effects(tmp_path: Path) -> None:
    # SGD is linear in the gradient, and the gradient is the sum of its examples' shares.
    plan = smooth({0: sgd(momentum=0.9, weight_decay=0.1)}, DECAYING)
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    scores = culpa.attribute(
        recorded.run,
        recorded.problem,
        asked,
        counterfactual="zero-gradient",
        examples=True,
    )
    assert scores.examples is not None
    assert scores.examples.shape == (12 * 8, 1)
    by_update = torch.stack(
        [scores.examples[list(recorded.run.example_ids(k)), 0].sum() for k in range(12)]
    )
    assert_close(by_update, scores.steps[:, 0], 1e-6)


@pytest.mark.parametrize("clip", [None, 0.3], ids=["free", "clipped"])
@pytest.mark.parametrize("name", ["momentum-decay", "nesterov-decay", "adamw", "adam-decay"])
def test_an_examples_score_is_the_derivative_by_its_weight(
    name: str, clip: float | None, tmp_path: Path
) -> None:
    # One weight per example and update, inserted into the unrolled run: d gamma / d weight at 1.
    build, rule = TWINS[name]
    plan = replace(smooth({0: build}, DECAYING), clip_grad_norm=clip)
    # The second half repeats the first: the same examples in two updates each.
    plan = replace(plan, batches=[*plan.batches[:6], *plan.batches[:6]])
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    scores = culpa.attribute(recorded.run, recorded.problem, asked, examples=True)
    weights = [torch.ones(8, dtype=torch.float64, requires_grad=True) for _ in range(12)]

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        (inputs, targets), weight = batch
        return (weight * cross_entropies(model, (inputs, targets))).mean()

    trace = unrolled.unroll(
        plan.model(),
        weighted,
        list(zip(plan.batches, weights, strict=True)),
        [rates[0] for rates in plan.rates],
        {0: rule},
        clip_grad_norm=clip,
    )
    gamma = unrolled.behaviour_value(trace, log_likelihoods, held_out())
    derivatives = torch.autograd.grad(gamma, weights)
    expected = torch.zeros(6 * 8, dtype=torch.float64)
    for k, derivative in enumerate(derivatives):
        expected.index_add_(0, torch.tensor(recorded.run.example_ids(k)), derivative)
    assert scores.examples is not None
    assert scores.examples.shape == (6 * 8, 1)
    assert_close(scores.examples[:, 0], expected, 1e-8)


def test_products_with_and_without_shared_derivatives(tmp_path: Path) -> None:
    # Second derivatives have the examples' slopes in them; finite differences get them forward.
    plan = smooth({0: sgd(momentum=0.9)}, DECAYING)
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out(seed)) for seed in range(2)]

    def found(strategy: str) -> Tensor:
        exact = culpa.Exact(hvp=strategy)
        run, problem = recorded.run, recorded.problem
        scores = culpa.attribute(run, problem, asked, propagator=exact, examples=True)
        assert scores.examples is not None
        without = culpa.attribute(run, problem, asked, propagator=exact)
        # Asking for examples changes nothing else.
        assert_close(scores.steps, without.steps, 1e-12)
        return scores.examples

    reference = found("reverse-over-reverse")
    assert_close(found("forward-over-reverse"), reference, 1e-12)
    assert_close(found("finite-difference"), reference, 1e-4)


def test_without_propagation_it_is_a_path_sum(tmp_path: Path) -> None:
    # By hand, for plain SGD: the gradient of the behaviour at the end times -rate times the
    # example's gradient at the update that used it, over B.
    plan = smooth({0: sgd()}, DECAYING)
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    scores = culpa.attribute(
        recorded.run, recorded.problem, asked, propagator=culpa.Identity(), examples=True
    )
    path = retrain(plan, keep_path=True).path
    model = plan.model()
    model.load_state_dict(path[-1])
    inputs = list(model.parameters())
    slope = torch.autograd.grad(log_likelihoods(model, held_out()).mean(), inputs)
    expected = torch.zeros(12 * 8, dtype=torch.float64)
    for k, batch in enumerate(plan.batches):
        model.load_state_dict(path[k])
        losses = cross_entropies(model, batch)
        for number, loss in zip(recorded.run.example_ids(k), losses, strict=True):
            own = torch.autograd.grad(loss, inputs, retain_graph=True)
            pull = sum(float((s * g).sum()) for s, g in zip(slope, own, strict=True))
            expected[number] -= plan.rates[k][0] * pull / 8
    assert scores.examples is not None
    assert_close(scores.examples[:, 0], expected, 1e-10)
    assert "does not predict" in scores.meaning
    exact = culpa.attribute(recorded.run, recorded.problem, asked)
    assert "counterfactual" in exact.meaning


def test_losses_whose_mean_is_another_are_refused(tmp_path: Path) -> None:
    plan = smooth({0: sgd()}, DECAYING)
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    doubled = culpa.Problem(plan.model(), plan.loss, lambda m, b: 2 * cross_entropies(m, b))
    with pytest.raises(culpa.ProblemError, match=r"update 11 is .* mean"):
        culpa.attribute(recorded.run, doubled, asked, examples=True)
    fewer = culpa.Problem(plan.model(), plan.loss, lambda m, b: cross_entropies(m, b)[:-1])
    with pytest.raises(culpa.ProblemError, match=r"7 losses for update 11.* 8 training"):
        culpa.attribute(recorded.run, fewer, asked, examples=True)
    # Who does not ask for examples needs no such losses.
    culpa.attribute(recorded.run, doubled, asked)


def test_examples_need_their_losses(case: Case) -> None:
    problem = culpa.Problem(case.plan.model(), case.plan.loss)
    asked = [culpa.log_likelihood("all", unseen_digits(20))]
    with pytest.raises(culpa.CulpaError, match="example_losses"):
        culpa.attribute(case.recorded.run, problem, asked, examples=True)

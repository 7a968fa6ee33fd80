"""A small GELU network on digits: estimates against really skipping and retraining."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

import culpa
from oracles.compare import assert_close, assert_tree_close, difference, pearson
from oracles.problems import log_likelihoods, turned_digits, unseen_digits
from oracles.recipes import Factory
from oracles.recording import Recorded, record
from oracles.retrain import Plan, retrain, true_effects

OPTIMIZERS: dict[str, tuple[Factory, float]] = {
    "sgd": (lambda model: SGD(model.parameters(), lr=1e-3, momentum=0.9), 1e-3),
    "adamw": (lambda model: AdamW(model.parameters(), lr=3e-4, weight_decay=0.01), 3e-4),
}


@dataclass(frozen=True)
class Case:
    plan: Plan
    recorded: Recorded
    singles: Tensor
    """True effect of every update on every unseen digit, ``[K, n]``."""


@pytest.fixture(scope="module", params=OPTIMIZERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    build, rate = OPTIMIZERS[request.param]
    plan = turned_digits(build, rate)
    recorded = record(plan, tmp_path_factory.mktemp(request.param) / "run")
    singles = true_effects(
        plan, [[k] for k in range(plan.num_steps)], log_likelihoods, unseen_digits()
    )
    return Case(plan, recorded, singles)


def test_the_recorded_run_learnt_something(case: Case) -> None:
    # Otherwise good correlations would be those of a model at its initialisation.
    inputs, targets = unseen_digits()
    before, after = case.plan.model(), case.recorded.trained
    with torch.no_grad():
        gain = log_likelihoods(after, (inputs, targets)) - log_likelihoods(
            before, (inputs, targets)
        )
    assert float(gain.abs().mean()) > 0.02


def test_single_updates(case: Case) -> None:
    inputs, targets = unseen_digits()
    # Digit by digit: over all ten classes at once the effects largely cancel.
    asked = [culpa.log_likelihood("all", (inputs, targets))] + [
        culpa.log_likelihood(f"digit {d}", (inputs[targets == d], targets[targets == d]))
        for d in range(10)
    ]
    scores = culpa.attribute(case.recorded.run, case.recorded.problem, asked)
    bound = 0.98 if case.plan.rates[0][0] == 1e-3 else 0.97
    correlations = [pearson(scores.steps[:, 0], case.singles.mean(1))] + [
        pearson(scores.steps[:, d + 1], case.singles[:, targets == d].mean(1)) for d in range(10)
    ]
    assert min(correlations) >= bound, correlations
    # Not only in shape: the size is right too.
    slope = float(scores.steps[:, 0] @ case.singles.mean(1)) / float(
        scores.steps[:, 0] @ scores.steps[:, 0]
    )
    assert slope == pytest.approx(1.0, abs=0.1)


def test_whole_stages(case: Case) -> None:
    found = culpa.embed(case.recorded.run, case.recorded.problem)
    for turns in range(3):
        batch = unseen_digits(turns=turns)
        truth = true_effects(
            case.plan,
            [range(start, stop) for _, start, stop in case.plan.stages],
            log_likelihoods,
            batch,
        )
        effect = found.effect(culpa.log_likelihood("right", batch))
        assert effect.shape == truth.shape
        for position in range(3):
            correlation = pearson(effect[position], truth[position])
            assert correlation >= 0.995, (turns, position, correlation)


@pytest.mark.parametrize("counterfactual", ["skip", "restart"])
def test_the_last_stage_is_exact(case: Case, counterfactual: str) -> None:
    found = culpa.embed(case.recorded.run, case.recorded.problem, counterfactual=counterfactual)
    name, start, stop = case.plan.stages[-1]
    without = retrain(case.plan, range(start, stop), counterfactual)  # type: ignore[arg-type]
    end = retrain(case.plan)
    assert_tree_close(found[name], difference(end.parameters, without.parameters), 1e-5)
    batch = unseen_digits()
    (truth,) = true_effects(case.plan, [range(start, stop)], log_likelihoods, batch)
    assert_close(found.effect(culpa.log_likelihood("right", batch))[-1], truth, 1e-5)


def test_another_cut_into_stages_leaves_single_updates_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    build, rate = OPTIMIZERS["adamw"]
    cuts = [(24,), (8, 8, 8)]
    inputs, targets = unseen_digits()
    asked = [culpa.log_likelihood("all", (inputs, targets))]
    found = []
    for cut in cuts:
        plan = turned_digits(build, rate, lengths=cut, hidden=16, turns=(0, 0, 0))
        recorded = record(plan, tmp_path_factory.mktemp("cut") / "run")
        found.append(culpa.attribute(recorded.run, recorded.problem, asked))
    torch.testing.assert_close(found[0].steps, found[1].steps, rtol=1e-6, atol=1e-9)
    assert found[0].stages.shape == (1, 1)
    assert found[1].stages.shape == (3, 1)
    assert float(found[0].stages.sum()) == pytest.approx(float(found[1].stages.sum()), rel=1e-6)

"""Two ways to run the same estimator: the adjoint sweep and the tangent sweeps agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import culpa
from oracles.compare import assert_close, flat
from oracles.problems import held_out, log_likelihoods, parameter_sums, smooth
from oracles.recipes import DECAYING, adam, adamw, rates_for, sgd, two_adamw_groups, two_groups
from oracles.recording import record
from oracles.retrain import Plan

BOUND = 1e-5

PLANS: dict[str, Plan] = {
    "sgd": smooth({0: sgd(momentum=0.9, weight_decay=0.1)}, DECAYING),
    "nesterov": smooth({0: sgd(momentum=0.8, nesterov=True, weight_decay=0.05)}, DECAYING),
    "adamw": smooth({0: adamw(weight_decay=0.1)}, DECAYING),
    "adam": smooth({0: adam(weight_decay=0.1)}, DECAYING),
    "sgd-groups": smooth({0: two_groups}, rates_for("two-groups")),
    "adamw-groups": smooth({0: two_adamw_groups}, rates_for("two-adamw-groups")),
    "adamw-then-adamw": smooth({0: adamw(weight_decay=0.1), 5: adamw()}, DECAYING),
    "sgd-then-adamw": smooth({0: sgd(momentum=0.9), 9: adamw()}, DECAYING),
    "adamw-then-sgd": smooth(
        {0: adamw(), 5: sgd(momentum=0.9, nesterov=True, weight_decay=0.1)}, DECAYING
    ),
}


@pytest.mark.parametrize("counterfactual", ["skip", "zero-gradient"])
@pytest.mark.parametrize("name", PLANS)
def test_sums_of_the_adjoints_steps_are_the_tangents_additive_scores(
    name: str, counterfactual: str, tmp_path: Path
) -> None:
    plan = PLANS[name]
    recorded = record(plan, tmp_path / "run")
    asked = [
        culpa.log_likelihood("right", held_out()),
        culpa.Behaviour("sums", parameter_sums, None, unit="1"),
    ]
    scores = culpa.attribute(recorded.run, recorded.problem, asked, counterfactual=counterfactual)
    found = culpa.embed(
        recorded.run, recorded.problem, form="additive", counterfactual=counterfactual
    )
    sums = torch.stack([scores.steps[start:stop].sum(0) for _, start, stop in plan.stages])
    torch.testing.assert_close(scores.stages, sums, rtol=1e-12, atol=1e-15)
    for q, behaviour in enumerate(asked):
        assert_close(sums[:, q], found.score(behaviour).mean(1), BOUND)


def test_a_score_is_the_gradient_of_each_test_point_times_the_embedding(tmp_path: Path) -> None:
    plan = PLANS["adamw"]
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem)
    inputs, targets = held_out()
    end = recorded.run.final_state()
    model = plan.model()
    for position, (stage, _, _) in enumerate(plan.stages):
        way = flat(found[stage])
        by_hand = []
        for i in range(len(targets)):
            theta = {n: p.clone().requires_grad_() for n, p in sorted(end.items())}
            logits = functional_call(model, theta, (inputs[i : i + 1],))
            value = torch.log_softmax(logits, 1)[0, targets[i]]
            grads = torch.autograd.grad(value, list(theta.values()))
            by_hand.append(torch.cat([g.reshape(-1) for g in grads]) @ way)
        score = found.score(culpa.log_likelihood("right", (inputs, targets)))
        assert score.shape == (3, len(targets))
        assert_close(score[position], torch.stack(by_hand), 1e-10)


def test_an_effect_is_the_difference_of_two_models(tmp_path: Path) -> None:
    plan = PLANS["nesterov"]
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem)
    model, other = plan.model(), plan.model()
    model.load_state_dict(recorded.run.final_state())
    effect = found.effect(culpa.log_likelihood("right", held_out()))
    for position, (stage, _, _) in enumerate(plan.stages):
        other.load_state_dict(found.counterfactual(stage))
        with torch.no_grad():
            gap = log_likelihoods(model, held_out()) - log_likelihoods(other, held_out())
        assert_close(effect[position], gap, 1e-10)


def test_embeddings_survive_being_saved(tmp_path: Path) -> None:
    plan = PLANS["adamw"]
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem)
    found.save(tmp_path / "embeddings")
    loaded = culpa.StageEmbeddings.load(tmp_path / "embeddings")
    for stage, _, _ in plan.stages:
        torch.testing.assert_close(dict(loaded[stage]), dict(found[stage]), rtol=0, atol=0)
        torch.testing.assert_close(
            dict(loaded.counterfactual(stage)), dict(found.counterfactual(stage)), rtol=0, atol=0
        )

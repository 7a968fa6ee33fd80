"""Least squares: where every update is an affine map, first order is exact and leaves no excuse.

Exact there: the effect of a single update in every form, and of any stage in ``block`` form. A
stage of several updates in ``additive`` form is the sum of its single effects and no more; that sum
is not the effect of removing them together, because the second update of a removed stage would have
been another one without the first.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import culpa
from oracles.compare import (
    assert_bitwise,
    assert_close,
    assert_tree_close,
    difference,
    relative_gap,
)
from oracles.compare import flat as flatten
from oracles.problems import affine, first_output, parameter_sums
from oracles.recipes import SGDS, rates_for, sgd
from oracles.recording import record
from oracles.retrain import Counterfactual, Plan, retrain, true_effects

COUNTERFACTUALS: list[Counterfactual] = ["skip", "restart", "zero-gradient"]
BOUND = 1e-5


def plan_of(name: str) -> Plan:
    return affine({0: SGDS[name]}, rates_for(name))


def behaviours(plan: Plan) -> list[culpa.Behaviour]:
    return [
        culpa.Behaviour("sums", parameter_sums, None, unit="1"),
        culpa.Behaviour("prediction", first_output, plan.batches[0], unit="1"),
    ]


@pytest.mark.parametrize("counterfactual", COUNTERFACTUALS)
@pytest.mark.parametrize("name", SGDS)
def test_every_single_update(name: str, counterfactual: Counterfactual, tmp_path: Path) -> None:
    plan = plan_of(name)
    recorded = record(plan, tmp_path / "run")
    asked = behaviours(plan)
    scores = culpa.attribute(recorded.run, recorded.problem, asked, counterfactual=counterfactual)
    assert scores.steps.shape == (12, 2)
    assert scores.steps.dtype == torch.float64
    exact = range(12)
    if name == "dampening" and counterfactual != "zero-gradient":
        # Dampening spares the first momentum step, which makes that step another affine map: first
        # order is exact only where the counterfactual starts its momentum when the run did.
        exact = range(1 if counterfactual == "skip" else 11, 12)
    for q, behaviour in enumerate(asked):
        truth = true_effects(
            plan, [[k] for k in exact], behaviour.function, behaviour.batch, counterfactual
        ).mean(1)
        assert_close(scores.steps[list(exact), q], truth, BOUND)


@pytest.mark.parametrize("counterfactual", COUNTERFACTUALS)
@pytest.mark.parametrize("name", SGDS)
def test_every_stage_in_block_form(
    name: str, counterfactual: Counterfactual, tmp_path: Path
) -> None:
    plan = plan_of(name)
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem, form="block", counterfactual=counterfactual)
    end = retrain(plan).parameters
    asked = behaviours(plan)
    for position, (stage, start, stop) in enumerate(plan.stages):
        without = retrain(plan, range(start, stop), counterfactual).parameters
        assert_tree_close(found[stage], difference(end, without), BOUND)
        assert_tree_close(found.counterfactual(stage), without, BOUND)
        for behaviour in asked:
            (truth,) = true_effects(
                plan,
                [range(start, stop)],
                behaviour.function,
                behaviour.batch,
                counterfactual,
            )
            assert found.score(behaviour).shape == (3, len(truth))
            # The behaviours are linear: score and effect are both the truth.
            assert_close(found.score(behaviour)[position], truth, BOUND)
            assert_close(found.effect(behaviour)[position], truth, BOUND)


@pytest.mark.parametrize("name", ["momentum-decay", "nesterov-decay", "two-groups"])
def test_additive_form_is_the_sum_of_single_effects_and_not_the_stage(
    name: str, tmp_path: Path
) -> None:
    plan = plan_of(name)
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem, form="additive")
    end = flatten(retrain(plan).parameters)
    for stage, start, stop in plan.stages:
        singles = sum(end - flatten(retrain(plan, [k]).parameters) for k in range(start, stop))
        assert isinstance(singles, torch.Tensor)
        assert_close(flatten(found[stage]), singles, BOUND)
        together = end - flatten(retrain(plan, range(start, stop)).parameters)
        # At this learning rate the two differ visibly, so the test above could have failed.
        assert relative_gap(singles, together) > 1e-2


def test_stages_of_one_update_are_exact_in_both_forms(tmp_path: Path) -> None:
    stages = [("a", 0, 4), ("b", 4, 5), ("c", 5, 11), ("d", 11, 12)]
    plan = affine({0: sgd(momentum=0.9, weight_decay=0.1)}, [(0.05,)] * 12, stages)
    recorded = record(plan, tmp_path / "run")
    end = retrain(plan).parameters
    for form in ("block", "additive"):
        found = culpa.embed(recorded.run, recorded.problem, form=form)
        for stage in ("b", "d"):
            truth = difference(end, retrain(plan, plan.updates(stage)).parameters)
            assert_tree_close(found[stage], truth, BOUND)


def test_a_new_optimizer_at_the_boundary_makes_skip_and_restart_agree(tmp_path: Path) -> None:
    build = sgd(momentum=0.9, weight_decay=0.1)
    plan = affine({0: build, 5: build, 9: build}, [(0.05,)] * 12)
    recorded = record(plan, tmp_path / "run")
    skip, restart = (
        culpa.embed(recorded.run, recorded.problem, counterfactual=c) for c in ("skip", "restart")
    )
    end = retrain(plan).parameters
    for stage, start, stop in plan.stages:
        without = retrain(plan, range(start, stop), "skip").parameters
        assert_bitwise(retrain(plan, range(start, stop), "restart").parameters, without)
        assert_tree_close(skip[stage], difference(end, without), BOUND)
        assert_tree_close(restart[stage], difference(end, without), BOUND)


def test_the_whole_run_is_the_way_from_the_start(tmp_path: Path) -> None:
    plan = affine({0: sgd(momentum=0.9)}, [(0.05,)] * 12, [("all", 0, 12)])
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem, propagator=culpa.Exact(at="gauss"))
    start, end = plan.model(), retrain(plan).parameters
    way = difference(end, {n: p.detach() for n, p in start.named_parameters()})
    assert_tree_close(found["all"], way, 1e-12)

"""One or two stages are replayed where no propagator is named: exact, and said so."""

from __future__ import annotations

from pathlib import Path

import culpa
from oracles.compare import assert_close, assert_tree_close, difference
from oracles.problems import held_out, log_likelihoods, smooth
from oracles.recipes import DECAYING, adamw, sgd
from oracles.recording import record
from oracles.retrain import retrain, true_effects


def test_one_or_two_stages_are_replayed(tmp_path: Path) -> None:
    plan = smooth({0: adamw()}, DECAYING)
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem, stages=["second", "first"])
    assert list(found) == ["first", "second"]
    assert "replayed exactly" in found.facts["strategy"]
    assert found.facts["claim"] == "bitwise"
    asked = culpa.log_likelihood("right", held_out())
    removals = [plan.updates(name) for name in found]
    truth = true_effects(plan, removals, log_likelihoods, held_out())
    assert_close(found.effect(asked), truth, 1e-10)
    end = retrain(plan).parameters
    for name, updates in zip(found, removals, strict=True):
        assert_tree_close(found[name], difference(end, retrain(plan, updates).parameters), 1e-10)
        assert found.trust[name].grade == "trusted"
    (one,) = culpa.embed(recorded.run, recorded.problem, updates=[3]).effect(asked)
    assert_close(one, true_effects(plan, [[3]], log_likelihoods, held_out())[0], 1e-10)


def test_a_run_of_two_stages_is_replayed(tmp_path: Path) -> None:
    # A rate at which every linear estimate is far off.
    plan = smooth({0: sgd(momentum=0.9)}, [(0.5,)] * 12, [("first", 0, 7), ("second", 7, 12)])
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem)
    assert list(found) == ["first", "second"]
    assert "replayed exactly" in found.facts["strategy"]
    end = retrain(plan).parameters
    for stage, start, stop in plan.stages:
        without = retrain(plan, range(start, stop)).parameters
        assert_tree_close(found[stage], difference(end, without), 1e-10)
    summed = culpa.embed(recorded.run, recorded.problem, form="additive")
    assert "Exact(" in summed.facts["propagator"]  # Estimator 4.3 is no replay


def test_a_named_propagator_and_three_stages_are_estimated(tmp_path: Path) -> None:
    recorded = record(smooth({0: adamw()}, DECAYING), tmp_path / "run")
    whole = culpa.embed(recorded.run, recorded.problem)
    named = culpa.embed(
        recorded.run, recorded.problem, stages=["first"], propagator=culpa.Exact(at="gauss")
    )
    for found in (whole, named):
        assert "Exact(" in found.facts["propagator"]
    assert_tree_close(named["first"], whole["first"], 1e-12)

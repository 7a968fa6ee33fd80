"""``Secant``: at fraction 1 the estimate is the counterfactual itself, at any learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import culpa
from oracles.compare import assert_tree_close, difference, flat, relative_gap
from oracles.problems import held_out, smooth
from oracles.recipes import DECAYING, adamw, sgd, two_adamw_groups
from oracles.recording import record
from oracles.retrain import Counterfactual, Plan, retrain

PLANS: dict[str, Plan] = {
    # Rates at which first order is far off.
    "sgd": smooth({0: sgd(momentum=0.9, weight_decay=0.1)}, [(0.5,)] * 12),
    "dampening": smooth({0: sgd(momentum=0.9, dampening=0.5)}, [(0.5,)] * 12),
    "adamw": smooth({0: adamw(weight_decay=0.1)}, DECAYING),
    "groups": smooth({0: two_adamw_groups}, [(0.05, 0.02)] * 12),
    "clipped": replace(smooth({0: adamw(weight_decay=0.1)}, DECAYING), clip_grad_norm=0.3),
    "replaced": smooth({0: sgd(momentum=0.9), 5: adamw(), 9: sgd(momentum=0.5)}, DECAYING),
}


@pytest.mark.parametrize("counterfactual", ["skip", "restart", "zero-gradient"])
@pytest.mark.parametrize("name", PLANS)
def test_on_whole_batches_it_is_replay(
    name: str, counterfactual: Counterfactual, tmp_path: Path
) -> None:
    plan = PLANS[name]
    recorded = record(plan, tmp_path / "run")
    found = culpa.embed(
        recorded.run,
        recorded.problem,
        propagator=culpa.Secant(1.0),
        counterfactual=counterfactual,
    )
    end = retrain(plan).parameters
    for stage, start, stop in plan.stages:
        without = retrain(plan, range(start, stop), counterfactual).parameters
        assert_tree_close(found[stage], difference(end, without), 1e-9)


def test_half_of_the_rows_beat_the_hessian_at_a_practical_rate(tmp_path: Path) -> None:
    plan = PLANS["sgd"]
    recorded = record(plan, tmp_path / "run")
    half, hessian = (
        culpa.embed(recorded.run, recorded.problem, propagator=propagator)
        for propagator in (culpa.Secant(0.5), culpa.Exact())
    )
    end = retrain(plan).parameters
    truth = flat(difference(end, retrain(plan, range(5)).parameters))
    ours, theirs = (relative_gap(flat(found["first"]), truth) for found in (half, hessian))
    assert ours < theirs, (ours, theirs)


def test_single_updates_have_no_secant(tmp_path: Path) -> None:
    recorded = record(PLANS["adamw"], tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    with pytest.raises(culpa.CulpaError, match="Secant"):
        culpa.attribute(recorded.run, recorded.problem, asked, propagator=culpa.Secant(1.0))


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_fractions_outside_of_0_to_1(fraction: float) -> None:
    with pytest.raises(culpa.CulpaError, match=str(fraction)):
        culpa.Secant(fraction)

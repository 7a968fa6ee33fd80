"""``Secant``: at fraction 1 the estimate is the counterfactual itself, at any learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from torch.optim import SGD

import culpa
from oracles.compare import assert_tree_close, difference, flat, relative_gap
from oracles.problems import held_out, smooth
from oracles.recipes import DECAYING, adamw, sgd, two_adamw_groups
from oracles.recording import record
from oracles.retrain import Counterfactual, Plan, parameters_of, retrain

PLANS: dict[str, Plan] = {
    # Rates at which first order is far off.
    "sgd": smooth({0: sgd(momentum=0.9, weight_decay=0.1)}, [(0.5,)] * 12),
    "dampening": smooth({0: sgd(momentum=0.9, dampening=0.5)}, [(0.5,)] * 12),
    "adamw": smooth({0: adamw(weight_decay=0.1)}, DECAYING),
    "groups": smooth({0: two_adamw_groups}, [(0.05, 0.02)] * 12),
    "nesterov, clipped": replace(
        smooth({0: sgd(momentum=0.9, nesterov=True, weight_decay=0.1)}, [(0.5,)] * 12),
        clip_grad_norm=0.3,
    ),
    "plain": smooth({0: sgd()}, [(0.5,)] * 12),
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


def test_dampening_that_comes_and_goes(tmp_path: Path) -> None:
    # Without it the sweep carries differences of states, with it the counterfactual's own.
    plan = PLANS["sgd"]

    def update(model: nn.Module, optimizer: SGD, k: int, batch: object) -> None:
        optimizer.param_groups[0]["dampening"] = 0.6 if k in (6, 7, 10) else 0.0
        optimizer.zero_grad()
        plan.loss(model, batch).backward()
        optimizer.step()

    def started() -> tuple[nn.Module, SGD]:
        model = plan.model()
        return model, SGD(model.parameters(), lr=0.3, momentum=0.9)

    model, optimizer = started()
    problem = culpa.Problem(model, plan.loss)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for name, start, stop in plan.stages:
            with recorder.stage(name):
                for k, batch in enumerate(recorder.batches(plan.batches[start:stop]), start):
                    update(model, optimizer, k, batch)
    found = culpa.embed(culpa.open_run(tmp_path / "run"), problem, propagator=culpa.Secant(1.0))
    for stage, start, stop in plan.stages:
        other, its = started()
        for k, batch in enumerate(plan.batches):
            if k not in range(start, stop):
                update(other, its, k, batch)
        truth = difference(parameters_of(model), parameters_of(other))
        assert_tree_close(found[stage], truth, 1e-9)


def test_the_residual_of_a_sample_is_the_error_it_makes(tmp_path: Path) -> None:
    # Independent errors add up as their squares do; a sum of norms would be several times this.
    plan = smooth({0: sgd(momentum=0.9)}, [(0.02,)] * 80, [("a", 0, 8), ("b", 8, 80)], 3, 16)
    recorded = record(plan, tmp_path / "run")
    end, ratios = retrain(plan).parameters, list[float]()
    for seed in range(4):
        found = culpa.embed(recorded.run, recorded.problem, propagator=culpa.Secant(0.5, seed))
        truth = flat(difference(end, retrain(plan, range(8)).parameters))
        ratios.append(found.trust["a"].residual / relative_gap(flat(found["a"]), truth))
    assert 0.5 < sum(ratios) / 4 < 2.0, ratios
    whole = culpa.embed(recorded.run, recorded.problem, propagator=culpa.Secant(1.0))
    assert whole.trust["a"].residual < 1e-10

"""``Exact(at="midpoint")``: exact where gradients are quadratic, because their mean slope is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import culpa
from oracles.compare import assert_tree_close, difference, flat, relative_gap
from oracles.problems import affine
from oracles.recipes import DECAYING, sgd
from oracles.recording import record
from oracles.retrain import Counterfactual, Plan, retrain


def cubic(model: nn.Module, batch: Any) -> Tensor:
    """A cubic polynomial of the parameters of a linear model: its gradient is quadratic."""
    inputs, targets = batch
    gap = model(inputs) - targets
    return (0.5 * gap.square() + 0.1 * gap**3).sum(1).mean()


@pytest.fixture
def plan() -> Plan:
    base = affine({0: sgd(momentum=0.5, weight_decay=0.1)}, DECAYING)
    return replace(base, loss=cubic, example_losses=None)


@pytest.mark.parametrize("counterfactual", ["skip", "restart", "zero-gradient"])
def test_the_midpoint_is_exact_for_quadratic_gradients(
    plan: Plan, counterfactual: Counterfactual, tmp_path: Path
) -> None:
    recorded = record(plan, tmp_path / "run")
    found, observed = (
        culpa.embed(
            recorded.run,
            recorded.problem,
            propagator=culpa.Exact(at=at),
            counterfactual=counterfactual,
        )
        for at in ("midpoint", "observed")
    )
    end = retrain(plan).parameters
    for stage, start, stop in plan.stages[:-1]:
        without = retrain(plan, range(start, stop), counterfactual).parameters
        if counterfactual != "zero-gradient":
            assert_tree_close(found[stage], difference(end, without), 1e-9)
        truth = flat(difference(end, without))
        # The curvature at the observed point alone is visibly not enough here.
        assert relative_gap(flat(observed[stage]), truth) > 1e-3
        assert relative_gap(flat(found[stage]), truth) < relative_gap(flat(observed[stage]), truth)

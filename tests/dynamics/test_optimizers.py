"""Every class of torch.optim from the record to the score, against skipping and retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import culpa
from oracles.compare import assert_bitwise, pearson
from oracles.problems import STAGES, held_out, log_likelihoods, smooth
from oracles.recipes import Factory
from oracles.recording import Recorded, record
from oracles.retrain import Plan, retrain, true_effects

# A rate at which twelve updates move the model a little, so that effects are nearly linear.
RATES: dict[str, float] = {
    "SGD": 0.02,
    "Adam": 2e-3,
    "AdamW": 2e-3,
    "RMSprop": 1e-3,
    "Adagrad": 5e-3,
    "NAdam": 2e-3,
    "RAdam": 2e-3,
    "Adamax": 3e-3,
    "Adadelta": 0.3,
    "ASGD": 0.02,
    "Adafactor": 2e-3,
    "Rprop": 1e-3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {"initial_accumulator_value": 0.1, "lr_decay": 0.05},
    "NAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "ASGD": {"t0": 3.0, "lambd": 0.01},
}
SINGLE: dict[str, float] = {
    "SGD": 0.99,
    "Adam": 0.9,
    "AdamW": 0.9,
    "RMSprop": 0.9,
    "Adagrad": 0.99,
    "NAdam": 0.9,
    "RAdam": 0.9,
    "Adamax": 0.9,  # of all but the first, see FIRST
    "Adadelta": 0.9,
    "ASGD": 0.99,
    "Adafactor": 0.9,
}
"""The least correlation of single updates' scores with the truth."""
FIRST = {"Adamax": 1}
"""Adamax divides by a running maximum, from zero: no linear map tells what its first update did."""


def built(name: str) -> Factory:
    options = {"lr": RATES[name], **OPTIONS.get(name, {})}
    return lambda model: getattr(torch.optim, name)(model.parameters(), **options)


def plan_of(build: Factory, rate: float, make: Any = smooth) -> Plan:
    return make({0: build}, [(rate,)] * 12)


def singles(plan: Plan, recorded: Recorded, first: int = 0) -> float:
    """Pearson correlation over updates, from ``first`` on, and test points."""
    inputs, targets = held_out()
    asked = [
        culpa.log_likelihood(f"point {i}", (inputs[i : i + 1], targets[i : i + 1]))
        for i in range(len(targets))
    ]
    scores = culpa.attribute(recorded.run, recorded.problem, asked)
    truth = true_effects(plan, [[k] for k in range(12)], log_likelihoods, (inputs, targets))
    return pearson(scores.steps[first:].reshape(-1), truth[first:].reshape(-1))


def stages(plan: Plan, recorded: Recorded, **options: Any) -> float:
    points = held_out()
    found = culpa.embed(recorded.run, recorded.problem, **options)
    effects = found.effect(culpa.log_likelihood("all", points))
    truth = true_effects(plan, [plan.updates(n) for n, _, _ in STAGES], log_likelihoods, points)
    # The last stage's is exact: its updates' states are in the record.
    torch.testing.assert_close(effects[-1].double(), truth[-1], rtol=1e-6, atol=1e-9)
    return pearson(effects[:-1].reshape(-1), truth[:-1].reshape(-1))


@pytest.mark.parametrize("name", RATES)
def test_recorded_and_replayed_bit_for_bit(name: str, tmp_path: Path) -> None:
    plan = plan_of(built(name), RATES[name])
    recorded = record(plan, tmp_path / "run")
    whole = culpa.replay(recorded.run, recorded.problem)
    assert_bitwise(whole.state, retrain(plan).parameters)
    without = culpa.replay(recorded.run, recorded.problem, without="second")
    assert_bitwise(without.state, retrain(plan, plan.updates("second")).parameters)
    fresh = culpa.replay(recorded.run, recorded.problem, without="first", counterfactual="restart")
    assert_bitwise(fresh.state, retrain(plan, plan.updates("first"), "restart").parameters)


@pytest.mark.parametrize("name", SINGLE)
def test_scores_and_effects_are_those_of_retraining(name: str, tmp_path: Path) -> None:
    plan = plan_of(built(name), RATES[name])
    recorded = record(plan, tmp_path / "run")
    assert singles(plan, recorded, FIRST.get(name, 0)) > SINGLE[name]
    assert stages(plan, recorded) > 0.98
    assert stages(plan, recorded, propagator=culpa.Secant(1.0)) > 0.9999


@pytest.mark.parametrize("name", ["NAdam", "Adagrad", "Adamax"])
@pytest.mark.parametrize("counterfactual", ["restart", "zero-gradient"])
def test_the_other_counterfactuals(name: str, counterfactual: Any, tmp_path: Path) -> None:
    plan = plan_of(built(name), RATES[name])
    recorded = record(plan, tmp_path / "run")
    points = held_out()
    found = culpa.embed(
        recorded.run,
        recorded.problem,
        propagator=culpa.Secant(1.0),
        counterfactual=counterfactual,
    )
    removals = [plan.updates(n) for n, _, _ in STAGES]
    truth = true_effects(plan, removals, log_likelihoods, points, counterfactual)
    effects = found.effect(culpa.log_likelihood("all", points))
    torch.testing.assert_close(effects.double(), truth, rtol=1e-5, atol=1e-9)


def test_rprop_is_replayed_and_embedded_by_differences_and_refused_otherwise(
    tmp_path: Path,
) -> None:
    plan = plan_of(built("Rprop"), RATES["Rprop"])
    recorded = record(plan, tmp_path / "run")
    behaviour = culpa.log_likelihood("all", held_out())
    with pytest.raises(culpa.UnsupportedError, match=r"Rprop.*signs.*replay.*Secant"):
        culpa.attribute(recorded.run, recorded.problem, [behaviour])
    with pytest.raises(culpa.UnsupportedError, match=r"Rprop.*signs.*replay.*Secant"):
        culpa.embed(recorded.run, recorded.problem, propagator=culpa.Exact())
    assert stages(plan, recorded, propagator=culpa.Secant(1.0)) > 0.9999


@pytest.mark.parametrize(
    ("name", "reason"), [("LBFGS", "inside one step"), ("SparseAdam", "dense")]
)
def test_what_cannot_be_recorded_is_refused_by_name(name: str, reason: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    problem = culpa.Problem(model, lambda model, batch: model(batch).mean())
    optimizer = getattr(torch.optim, name)(model.parameters())
    with (
        pytest.raises(culpa.UnsupportedError, match=rf"torch\.optim\.{name}.*{reason}"),
        culpa.record(tmp_path / "run", problem, optimizer),
    ):
        pass


class Matrices(nn.Module):
    """A GELU classifier of matrices only, which is what Muon trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 9, bias=False), nn.Linear(9, 3, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.gelu(self.first(inputs)))


def matrices(optimizers: Any, rates: Any) -> Plan:
    plan = smooth(optimizers, rates, batch_size=64)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Matrices().double()

    return Plan(build, plan.loss, optimizers, plan.batches, rates, plan.stages)


def test_muon(tmp_path: Path) -> None:
    plan = plan_of(lambda model: torch.optim.Muon(model.parameters(), lr=0.02), 0.02, make=matrices)
    recorded = record(plan, tmp_path / "run")
    whole = culpa.replay(recorded.run, recorded.problem)
    assert_bitwise(whole.state, retrain(plan).parameters)
    # Its iteration rounds to bfloat16; the derivative is that of the iteration without rounding.
    assert singles(plan, recorded) > 0.9
    assert stages(plan, recorded) > 0.95
    assert stages(plan, recorded, propagator=culpa.Secant(1.0)) > 0.99

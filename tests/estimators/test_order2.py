"""``embed(order=2)`` against retraining: the second Taylor coefficient, errors that go as D^3."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.dynamics.curvature import third
from culpa.dynamics.local import LocalLoss
from culpa.estimators.embed import _trust
from culpa.estimators.tangent import Block
from culpa.trajectory.schema import Stage
from culpa.trajectory.walk import forward, session
from oracles.awkward import Norm
from oracles.compare import difference, flat
from oracles.problems import (
    affine,
    cross_entropy,
    held_out,
    log_likelihoods,
    seeded,
    smooth,
    turned_digits,
)
from oracles.recipes import adamw, sgd
from oracles.recording import record
from oracles.retrain import Plan, behaviour_values, retrain

STAGES = (("first", 0, 1), ("second", 1, 8))
AFTER = {
    "sgd": sgd(momentum=0.9, weight_decay=0.1),
    "nesterov": sgd(momentum=0.8, nesterov=True),
    "adamw": adamw(weight_decay=0.1, eps=1e-2),
}


def quartic(model: nn.Module, batch: Any) -> Tensor:
    """A polynomial of degree four in the parameters of a linear model."""
    gap = model(batch[0]) - batch[1]
    return (0.5 * gap.square() + 0.2 * gap**3 + 0.1 * gap**4).sum(1).mean()


def plan(name: str, size: float) -> Plan:
    """One update of a size, then others with a fresh optimizer: the displacement goes with it."""
    rates = [(size,), *((0.02,) for _ in range(7))]
    base = affine({0: sgd(), 1: AFTER[name]}, rates, STAGES)
    return replace(base, loss=quartic, example_losses=None)


def found_and_true(made: Plan, order: int, path: Path) -> tuple[Tensor, Tensor]:
    recorded = record(made, path)
    found = culpa.embed(
        recorded.run, recorded.problem, propagator=culpa.Exact(), order=order, stages=["first"]
    )["first"]
    truth = difference(retrain(made).parameters, retrain(made, [0]).parameters)
    return flat(found), flat(truth)


@pytest.mark.parametrize("name", AFTER)
def test_the_second_taylor_coefficient(name: str, tmp_path: Path) -> None:
    step = 1e-3
    bent: dict[int, Tensor] = {}
    for order in (1, 2):
        pairs = [
            found_and_true(plan(name, s * step), order, tmp_path / f"{order}{s}") for s in (1, -1)
        ]
        bent[order] = (pairs[0][0] + pairs[1][0]) / step**2
        bent[0] = (pairs[0][1] + pairs[1][1]) / step**2
    size = float(bent[0].norm())
    assert float((bent[2] - bent[0]).norm()) < 1e-4 * size
    assert float((bent[1] - bent[0]).norm()) > 1e-2 * size


@pytest.mark.parametrize("name", AFTER)
def test_the_error_goes_with_the_cube(name: str, tmp_path: Path) -> None:
    errors: dict[int, list[float]] = {1: [], 2: []}
    for order, found in errors.items():
        for size in (0.004, 0.002):
            mine, truth = found_and_true(plan(name, size), order, tmp_path / f"{order}{size}")
            found.append(float((mine - truth).norm()))
    assert 3.3 < errors[1][0] / errors[1][1] < 4.8, errors
    assert 6.5 < errors[2][0] / errors[2][1] < 10.0, errors


@pytest.mark.parametrize("counterfactual", ["skip", "restart", "zero-gradient"])
def test_single_updates(counterfactual: Any, tmp_path: Path) -> None:
    made = smooth({0: sgd(momentum=0.5)}, [(0.4,)] * 8, (("all", 0, 8),))
    recorded = record(made, tmp_path / "run")
    options = {"updates": [1, 4], "counterfactual": counterfactual}
    one = culpa.embed(recorded.run, recorded.problem, propagator=culpa.Exact(), **options)
    two = culpa.embed(recorded.run, recorded.problem, order=2, **options)
    assert list(two) == ["update 1", "update 4"]
    for k in (1, 4):
        without = retrain(made, [k], counterfactual).parameters
        truth = flat(difference(retrain(made).parameters, without))
        errors = [float((flat(e[f"update {k}"]) - truth).norm()) for e in (one, two)]
        assert errors[1] < 0.5 * errors[0], errors


def test_the_score_is_the_behaviour_to_second_order(tmp_path: Path) -> None:
    made = smooth({0: sgd(momentum=0.9)}, [(0.05,)] * 8, STAGES)
    recorded = record(made, tmp_path / "run")
    found = culpa.embed(recorded.run, recorded.problem, order=2)
    asked = culpa.log_likelihood("right", held_out())
    model = made.model()
    model.load_state_dict(recorded.run.final_state())
    end = {n: p.detach() for n, p in model.named_parameters()}

    def value(t: Tensor, stage: str, row: int) -> Tensor:
        moved = {n: p - t * found[stage][n] for n, p in end.items()}
        inputs, targets = held_out()
        logits = torch.func.functional_call(model, moved, (inputs,))
        return -nn.functional.cross_entropy(logits[row], targets[row])

    zero = torch.zeros((), dtype=torch.float64)
    for i, stage in enumerate(found):
        for row in range(6):
            along = partial(value, stage=stage, row=row)
            # gamma(theta) - gamma(theta - D) = -(d/dt + d^2/dt^2 / 2) gamma(theta - t D)
            slope = torch.autograd.functional.jacobian(along, zero)
            bent = torch.autograd.functional.hessian(along, zero)
            expected = -(slope + bent / 2)
            torch.testing.assert_close(found.score(asked)[i, row], expected, rtol=1e-7, atol=1e-10)
    plain = culpa.embed(recorded.run, recorded.problem, propagator=culpa.Exact())
    whole = behaviour_values(retrain(made).model, log_likelihoods, held_out())
    truth = whole - behaviour_values(retrain(made, [0]).model, log_likelihoods, held_out())
    gaps = [float((e.score(asked)[0] - truth).norm()) for e in (plain, found)]
    assert gaps[1] < 0.2 * gaps[0], gaps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_displacement_that_diverged_is_not_identified(value: float) -> None:
    one = Block(Stage("early", 0, 1), "skip", displacement={"w": torch.tensor([value])})
    one.at_stage_end = 1.0
    assert _trust(one, 1.0).grade == "not identified"


def normed(norm: nn.Module, path: Path) -> tuple[LocalLoss, Any]:
    base = smooth({0: sgd()}, [(0.1,)] * 8, STAGES)
    build = seeded(
        0, lambda: nn.Sequential(nn.Linear(5, 7), norm, nn.Tanh(), nn.Linear(7, 3)).double()
    )
    recorded = record(replace(base, model=build, loss=cross_entropy), path)
    with session(recorded.run, recorded.problem) as engine:
        (transition,) = list(forward(recorded.run, engine, 3, 4))
    return LocalLoss(recorded.problem, transition), recorded


def test_third_derivatives_through_layer_norm_are_right(tmp_path: Path) -> None:
    built_in, recorded = normed(nn.LayerNorm(7, elementwise_affine=False), tmp_path / "built in")
    primitive, _ = normed(Norm(), tmp_path / "primitive")
    (_, truth) = third.taylor(primitive, built_in.grads)
    assert third.settle(primitive, primitive.grads, "reverse-over-reverse")[0].way == "taylor"
    way, _ = third.settle(built_in, built_in.grads, "reverse-over-reverse")
    (_, found) = way.jet(built_in, built_in.grads)
    assert float((flat(found) - flat(truth)).norm()) < 1e-3 * float(flat(truth).norm())
    facts = culpa.embed(recorded.run, recorded.problem, order=2).facts
    assert facts["order"] == "2"
    assert "third derivatives" in facts["strategy"]


def test_both_ways_agree_in_single_precision(tmp_path: Path) -> None:
    recorded = record(turned_digits(sgd(), 0.05, lengths=(2, 1, 1)), tmp_path / "run")
    with session(recorded.run, recorded.problem) as engine:
        (transition,) = list(forward(recorded.run, engine, 1, 2))
    local = LocalLoss(recorded.problem, transition)
    (bent, turned), (one, other) = (
        third.taylor(local, local.grads),
        third.by_difference(local, local.grads, "reverse-over-reverse"),
    )
    assert float((flat(bent) - flat(one)).norm()) < 1e-5 * float(flat(one).norm())
    assert float((flat(turned) - flat(other)).norm()) < 1e-2 * float(flat(other).norm())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"order": 2, "form": "additive"}, "form='additive'"),
        ({"order": 2, "propagator": culpa.Exact(at="gauss")}, "at='gauss'"),
        ({"order": 2, "propagator": culpa.Secant(0.5)}, r"Secant\(fraction=0\.5"),
        ({"updates": [8]}, "no update 8"),
    ],
)
def test_what_makes_no_sense_is_refused(options: Any, said: str, tmp_path: Path) -> None:
    recorded = record(plan("sgd", 0.05), tmp_path / "run")
    with pytest.raises(culpa.CulpaError, match=said):
        culpa.embed(recorded.run, recorded.problem, **options)

"""``scores.steps`` against reverse-mode autograd through the whole run, float64, to 1e-8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import culpa
from oracles import unrolled
from oracles.compare import assert_close
from oracles.problems import held_out, log_likelihoods, parameter_sums, smooth
from oracles.recipes import DECAYING, TWINS
from oracles.recording import record
from oracles.retrain import Plan

BOUND = 1e-8


def propagators() -> dict[str, Any]:
    return {
        "reverse": culpa.Exact(hvp="reverse-over-reverse"),
        "forward": culpa.Exact(hvp="forward-over-reverse"),
    }


def graph(plan: Plan, rules: dict[int, unrolled.Rule]) -> unrolled.Unrolled:
    rates = [rates[0] for rates in plan.rates]
    return unrolled.unroll(plan.model(), plan.loss, plan.batches, rates, rules)


def check(plan: Plan, rules: dict[int, unrolled.Rule], path: Path, **options: Any) -> None:
    recorded = record(plan, path)
    asked = [
        culpa.log_likelihood("right", held_out()),
        culpa.Behaviour("sums", parameter_sums, None, unit="1"),
    ]
    scores = culpa.attribute(recorded.run, recorded.problem, asked, **options)
    trace = graph(plan, rules)
    sense = options.get("counterfactual", "skip")
    for q, (function, batch) in enumerate([(log_likelihoods, held_out()), (parameter_sums, None)]):
        expected = unrolled.step_scores(trace, function, batch, sense)
        assert_close(scores.steps[:, q], expected, BOUND)
        # Not only together: each update's own score, against the largest.
        torch.testing.assert_close(
            scores.steps[:, q], expected, rtol=1e-6, atol=BOUND * float(expected.abs().max())
        )


@pytest.mark.parametrize("way", ["reverse", "forward"])
@pytest.mark.parametrize("name", TWINS)
def test_single_optimizer(name: str, way: str, tmp_path: Path) -> None:
    build, rule = TWINS[name]
    plan = smooth({0: build}, DECAYING)
    check(plan, {0: rule}, tmp_path / "run", propagator=propagators()[way])


@pytest.mark.parametrize("name", ["momentum-decay", "nesterov-decay", "adamw", "adam-decay"])
def test_zero_gradient(name: str, tmp_path: Path) -> None:
    build, rule = TWINS[name]
    plan = smooth({0: build}, DECAYING)
    check(
        plan,
        {0: rule},
        tmp_path / "run",
        propagator=propagators()["reverse"],
        counterfactual="zero-gradient",
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [("adamw", "adamw"), ("nesterov-decay", "adamw"), ("adamw", "momentum-decay")],
)
def test_an_optimizer_replaced_between_stages(before: str, after: str, tmp_path: Path) -> None:
    first, second = TWINS[before], TWINS[after]
    plan = smooth({0: first[0], 5: second[0]}, DECAYING, [("first", 0, 5), ("second", 5, 12)])
    check(
        plan,
        {0: first[1], 5: second[1]},
        tmp_path / "run",
        propagator=propagators()["reverse"],
    )


def test_the_default_propagator_is_the_exact_one(tmp_path: Path) -> None:
    build, rule = TWINS["adamw"]
    check(smooth({0: build}, DECAYING), {0: rule}, tmp_path / "run")

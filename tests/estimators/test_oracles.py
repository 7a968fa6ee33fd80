"""The judges judged: the oracles against torch.optim, plain loops and each other."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, AdamW

from oracles import unrolled
from oracles.compare import assert_bitwise, assert_close, assert_tree_close, pearson
from oracles.problems import affine, held_out, log_likelihoods, smooth, turned_digits
from oracles.problems import parameter_sums as weights
from oracles.problems import unseen_digits as unseen
from oracles.recipes import DECAYING as RATES
from oracles.recipes import TWINS, Factory, adam, sgd
from oracles.retrain import parameters_of, retrain, true_effects


@pytest.mark.parametrize("name", TWINS)
def test_the_unrolled_run_is_the_run_of_torch_optim(name: str) -> None:
    build, rule = TWINS[name]
    plan = smooth({0: build, 9: build}, RATES)
    path = retrain(plan, keep_path=True).path
    trace = unrolled.unroll(
        plan.model(), plan.loss, plan.batches, [r[0] for r in RATES], {0: rule, 9: rule}
    )
    for k in range(plan.num_steps):
        assert_tree_close(trace.before[k][0], path[k], 1e-12)
    assert_tree_close(trace.final, path[-1], 1e-12)


def test_retraining_without_nothing_is_a_plain_loop() -> None:
    plan = smooth({0: sgd(momentum=0.9)}, RATES)
    model = plan.model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch, (rate,) in zip(plan.batches, plan.rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        plan.loss(model, batch).backward()
        optimizer.step()
    assert_bitwise(retrain(plan).parameters, parameters_of(model))


def test_the_three_counterfactuals_differ_and_skip_of_all_is_the_start() -> None:
    plan = smooth({0: lambda m: AdamW(m.parameters(), weight_decay=0.5)}, RATES)
    start = parameters_of(plan.model())
    assert_bitwise(retrain(plan, range(12), "skip").parameters, start)
    ends = [retrain(plan, range(4, 7), c).parameters for c in ("skip", "restart", "zero-gradient")]
    for i, a in enumerate(ends):
        for b in ends[i + 1 :]:
            assert not torch.equal(a["0.weight"], b["0.weight"])
    assert_bitwise(  # a last stage leaves no update to restart
        retrain(plan, range(9, 12), "restart").parameters,
        retrain(plan, range(9, 12), "skip").parameters,
    )


@pytest.mark.parametrize("counterfactual", ["skip", "zero-gradient"])
@pytest.mark.parametrize("name", ["plain", "momentum-decay", "nesterov-decay"])
def test_on_an_affine_problem_the_unrolled_scores_are_the_truth(
    name: str, counterfactual: str
) -> None:
    build, rule = TWINS[name]
    plan = affine({0: build, 9: build}, RATES)
    trace = unrolled.unroll(
        plan.model(), plan.loss, plan.batches, [r[0] for r in RATES], {0: rule, 9: rule}
    )
    found = unrolled.step_scores(trace, weights, None, counterfactual)
    truth = true_effects(plan, [[k] for k in range(12)], weights, None, counterfactual)  # type: ignore[arg-type]
    assert_close(found, truth.mean(1), 1e-10)


def test_adams_counter_term_brings_the_scores_closer_to_the_truth() -> None:
    # A huge eps makes Adam linear in its first moment: what is left is the bias correction.
    plan = affine({0: adam(betas=(0.9, 0.9), eps=10.0)}, [(0.02,)] * 12)
    trace = unrolled.unroll(
        plan.model(),
        plan.loss,
        plan.batches,
        [0.02] * 12,
        {0: unrolled.Adam(betas=(0.9, 0.9), eps=10.0)},
    )
    truth = true_effects(plan, [[k] for k in range(12)], weights, None).mean(1)
    with_counter = unrolled.step_scores(trace, weights, None)
    trace.tick = [None] * 12
    without = unrolled.step_scores(trace, weights, None)
    error, worse = (with_counter - truth).norm(), (without - truth).norm()
    assert error < 0.15 * truth.norm(), (error, worse, truth.norm())
    assert error < 0.35 * worse, (error, worse, truth.norm())


def test_the_last_update_has_no_future() -> None:
    build, rule = TWINS["adamw"]
    plan = smooth({0: build}, RATES)
    trace = unrolled.unroll(plan.model(), plan.loss, plan.batches, [r[0] for r in RATES], {0: rule})
    model = retrain(plan, keep_path=True)
    gamma = log_likelihoods(model.model, held_out()).mean()
    gradient = torch.autograd.grad(gamma, list(model.model.parameters()))
    by_hand = sum(
        float((g * (model.parameters[n] - model.path[-2][n])).sum())
        for n, g in zip(model.parameters, gradient, strict=True)
    )
    found = unrolled.step_scores(trace, log_likelihoods, held_out())
    assert float(found[-1]) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize(
    ("build", "rule", "rate", "bound"),
    [
        (
            lambda m: SGD(m.parameters(), lr=1e-3, momentum=0.9),
            unrolled.SGD(momentum=0.9),
            1e-3,
            0.98,
        ),
        (lambda m: AdamW(m.parameters(), lr=3e-4), unrolled.Adam(weight_decay=0.01), 3e-4, 0.97),
    ],
    ids=["sgd", "adamw"],
)
def test_the_papers_estimator_itself_reaches_the_bounds_asked_of_the_library(
    build: Factory, rule: unrolled.Rule, rate: float, bound: float
) -> None:
    plan = turned_digits(build, rate, lengths=(16, 8, 8), hidden=32)
    inputs, targets = unseen(200)
    truth = true_effects(plan, [[k] for k in range(32)], log_likelihoods, (inputs, targets))
    batches = [(x.double(), y) for x, y in plan.batches]
    trace = unrolled.unroll(plan.model().double(), plan.loss, batches, [rate] * 32, {0: rule})
    found = unrolled.step_scores(trace, log_likelihoods, (inputs.double(), targets))
    assert pearson(found, truth.mean(1)) >= bound

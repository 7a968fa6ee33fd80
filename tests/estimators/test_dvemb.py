"""DVEmb, the baseline: against a dense implementation, and against what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import culpa
from oracles.compare import assert_close, pearson
from oracles.problems import (
    affine,
    cross_entropies,
    cross_entropy,
    held_out,
    log_likelihoods,
    parameter_sums,
    seeded,
    smooth,
)
from oracles.recipes import DECAYING, SGDS, adamw, rates_for, sgd
from oracles.recording import record
from oracles.retrain import Plan, parameters_of, retrain, true_effects

BOUND = 1e-10


def behaviours() -> list[culpa.Behaviour]:
    return [
        culpa.Behaviour("right", log_likelihoods, held_out()),
        culpa.Behaviour("sums", parameter_sums, None, unit="1"),
    ]


def rows_of_gradients(model: nn.Module, values: Tensor) -> Tensor:
    """The gradient of every value with respect to all parameters, flat: ``[values, P]``."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(v, parameters, retain_graph=True) for v in values]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def rates_by_parameter(plan: Plan, k: int) -> Tensor:
    """The learning rate of every entry; recipes of two groups give the second one to biases."""
    parts: list[Tensor] = []
    for parameter in plan.model().parameters():
        group = 0 if parameter.ndim > 1 or len(plan.rates[k]) == 1 else 1
        parts.append(torch.full((parameter.numel(),), plan.rates[k][group], dtype=torch.float64))
    return torch.cat(parts)


def dense(plan: Plan, asked: Sequence[culpa.Behaviour], sign: float = 1.0) -> list[Tensor]:
    """DVEmb as its paper writes it: embeddings, products and matrices, nothing saved.

    Returns the score of every example of every update, ``[B, Q]`` each.
    """
    path = retrain(plan, keep_path=True).path
    model = plan.model()
    model.load_state_dict(path[-1])
    model.eval()
    final = torch.stack(
        [rows_of_gradients(model, b.function(model, b.batch)).mean(0) for b in asked]
    )
    model.train()
    product = torch.eye(final.shape[1], dtype=torch.float64)
    scores: list[Tensor] = []
    assert plan.example_losses is not None
    for k in reversed(range(plan.num_steps)):
        model.load_state_dict(path[k])
        rows = rows_of_gradients(model, plan.example_losses(model, plan.batches[k]))
        steps = sign * rates_by_parameter(plan, k)[:, None] * rows.T / len(rows)
        embeddings = (product @ steps).T
        scores.insert(0, -embeddings @ final.T)
        product = product @ (torch.eye(len(steps), dtype=torch.float64) - steps @ rows)
    return scores


@pytest.mark.parametrize("name", ["plain", "decay", "momentum-decay", "two-groups", "maximize"])
def test_scores_are_those_of_the_dense_definition(name: str, tmp_path: Path) -> None:
    plan = smooth({0: SGDS[name]}, rates_for(name))
    # A second epoch: the last six batches are the first six again.
    plan = replace(plan, batches=[*plan.batches[:6], *plan.batches[:6]])
    recorded = record(plan, tmp_path / "run")
    run = recorded.run
    found = culpa.dvemb(run, recorded.problem, behaviours())
    truth = dense(plan, behaviours(), -1.0 if name == "maximize" else 1.0)
    assert found.steps.shape == (12, 2)
    assert found.behaviours == ("right", "sums")
    assert_close(found.steps, torch.stack([s.sum(0) for s in truth]), BOUND)
    stages = [torch.stack(truth[start:stop]).sum((0, 1)) for _, start, stop in plan.stages]
    assert_close(found.stages, torch.stack(stages), BOUND)
    assert run.num_examples == 6 * 8
    examples = torch.zeros(run.num_examples, 2, dtype=torch.float64)
    for k, rows in enumerate(truth):
        assert run.example_ids(k) == run.example_ids((k + 6) % 12)
        for example, row in zip(run.example_ids(k), rows, strict=True):
            examples[example] += row
    assert_close(found.examples, examples, BOUND)


def test_curvature_matters_in_the_test_above(tmp_path: Path) -> None:
    recorded = record(smooth({0: sgd()}, DECAYING), tmp_path / "run")
    found = culpa.dvemb(recorded.run, recorded.problem, behaviours())
    flat = culpa.attribute(
        recorded.run, recorded.problem, behaviours(), propagator=culpa.Identity()
    )
    gap = (found.steps[0] - flat.steps[0]).norm() / flat.steps[0].norm()
    assert float(gap) > 1e-2


def test_embeddings_reproduce_the_effect_they_claim(tmp_path: Path) -> None:
    # With a vanishing rate the dynamics are the gradients' sum: removing one gradient moves the end
    # by its embedding, whatever the curvature. This fixes sign and scale against retraining.
    plan = smooth({0: sgd()}, [(1e-5,)] * 12)
    recorded = record(plan, tmp_path / "run")
    found = culpa.dvemb(recorded.run, recorded.problem, behaviours())
    right = behaviours()[0]
    truth = true_effects(plan, [[k] for k in range(12)], right.function, right.batch)
    assert_close(found.steps[:, 0], truth.mean(1), 1e-3)
    whole = retrain(plan).model
    ids, effects = [], list[Tensor]()
    for row in range(8):
        model = retrain(plan, drop={4: [row]}).model
        ids.append(recorded.run.example_ids(4)[row])
        values = [log_likelihoods(m, held_out()).mean() for m in (whole, model)]
        effects.append((values[0] - values[1]).detach())
    assert_close(found.examples[ids, 0], torch.stack(effects), 1e-3)


def test_the_last_update_is_plain_sgd_s_own(tmp_path: Path) -> None:
    # Nothing follows it, so nothing is approximated: the baseline and the estimator agree there.
    recorded = record(smooth({0: sgd()}, DECAYING), tmp_path / "run")
    found = culpa.dvemb(recorded.run, recorded.problem, behaviours())
    scores = culpa.attribute(recorded.run, recorded.problem, behaviours(), examples=True)
    assert scores.examples is not None
    assert_close(found.steps[-1], scores.steps[-1], BOUND)
    last = list(recorded.run.example_ids(11))
    assert_close(found.examples[last], scores.examples[last], BOUND)
    # Away from the end it is another estimate.
    assert float((found.steps[0] - scores.steps[0]).norm() / scores.steps[0].norm()) > 1e-3


def test_weighted_micro_batches_count_by_their_weight(tmp_path: Path) -> None:
    plan = smooth({0: sgd()}, DECAYING)
    weights, model = (0.25, 0.75), plan.model()
    problem = culpa.Problem(model, plan.loss, example_losses=plan.example_losses)
    optimizer = sgd()(model)
    rows = torch.tensor([0.25 / 3] * 3 + [0.75 / 5] * 5, dtype=torch.float64)
    gradients: list[Tensor] = []
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder, recorder.stage("all"):
        for inputs, targets in plan.batches:
            micro = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
            gradients.append(rows_of_gradients(model, cross_entropies(model, (inputs, targets))))
            with recorder.step(*micro, weights=weights):
                optimizer.zero_grad()
                for weight, batch in zip(weights, micro, strict=True):
                    (cross_entropy(model, batch) * weight).backward()
                optimizer.step()
    final = rows_of_gradients(model, log_likelihoods(model, held_out())).mean(0)
    product, truth = torch.eye(len(final), dtype=torch.float64), list[Tensor]()
    for here in reversed(gradients):
        steps = 0.1 * rows * here.T
        truth.insert(0, -final @ product @ steps)
        product = product @ (torch.eye(len(final), dtype=torch.float64) - steps @ here)
    found = culpa.dvemb(culpa.open_run(tmp_path / "run"), problem, behaviours()[:1])
    assert_close(found.steps[:, 0], torch.stack([t.sum() for t in truth]), BOUND)
    assert_close(found.examples[:, 0], torch.cat(truth), BOUND)


@pytest.mark.parametrize("rate", [0.002, 0.03])
def test_least_squares_with_a_stage_that_teaches_the_opposite(rate: float, tmp_path: Path) -> None:
    plan = affine({0: sgd()}, [(rate,)] * 12)
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    signs = [-1.0 if k in plan.updates("second") else 1.0 for k in range(12)]
    plan = replace(
        plan,
        batches=[(x, s * (x @ teacher)) for (x, _), s in zip(plan.batches, signs, strict=True)],
    )
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def closeness(model: nn.Module, batch: Tensor) -> Tensor:
        return -0.5 * (model(batch) - batch @ teacher).square().sum(1)

    recorded = record(plan, tmp_path / "run")
    asked = [culpa.Behaviour("close", closeness, inputs, unit="1")]
    found = culpa.dvemb(recorded.run, recorded.problem, asked)
    truth = true_effects(plan, [[k] for k in range(12)], closeness, inputs, "zero-gradient")
    correlation = pearson(found.steps[:, 0], truth.mean(1))
    whole = true_effects(plan, [plan.updates(n) for n, _, _ in plan.stages], closeness, inputs)
    assert whole.mean(1).sign().tolist() == [1.0, -1.0, 1.0]
    if rate < 0.01:
        assert correlation > 0.98
        assert found.stages[:, 0].sign().tolist() == [1.0, -1.0, 1.0]
        return
    # A baseline: squared residuals in the place of curvature, and the blame is lost, where the
    # Hessian has all of it. Should this start to hold, the implementation is no longer DVEmb.
    assert correlation < 0.5
    for propagator, least in ((culpa.Identity(), 0.98), (culpa.Exact(), 0.999)):
        scores = culpa.attribute(recorded.run, recorded.problem, asked, propagator=propagator)
        assert pearson(scores.steps[:, 0], truth.mean(1)) > least


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    recorded = record(smooth({0: sgd()}, DECAYING), tmp_path / "run")
    before, state = parameters_of(recorded.problem.model), torch.get_rng_state()
    culpa.dvemb(recorded.run, recorded.problem, behaviours())
    assert torch.equal(torch.get_rng_state(), state)
    after = parameters_of(recorded.problem.model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_other_optimizers_are_refused_by_name(tmp_path: Path) -> None:
    plan = smooth({0: sgd(), 5: adamw()}, DECAYING)
    recorded = record(plan, tmp_path / "run")
    with pytest.raises(culpa.UnsupportedError, match=r"trained with AdamW.*culpa.attribute"):
        culpa.dvemb(recorded.run, recorded.problem, behaviours())


def test_running_statistics_are_refused(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()

    plan = replace(smooth({0: sgd()}, DECAYING), model=seeded(0, net))
    recorded = record(plan, tmp_path / "run")
    with pytest.raises(culpa.UnsupportedError, match=r"culpa\.dvemb does not carry running"):
        culpa.dvemb(recorded.run, recorded.problem, behaviours()[:1])


def test_mistakes_are_named(tmp_path: Path) -> None:
    plan = smooth({0: sgd()}, DECAYING)
    recorded = record(plan, tmp_path / "run")
    run, model = recorded.run, recorded.problem.model
    with pytest.raises(culpa.OptionError, match="list of behaviours"):
        culpa.dvemb(run, recorded.problem, [])
    with pytest.raises(culpa.OptionError, match="example_losses"):
        culpa.dvemb(run, culpa.Problem(model, plan.loss), behaviours())

    def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return len(batch[0]) * cross_entropies(model, batch)

    def twice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropies(model, batch).repeat(2)

    with pytest.raises(culpa.ProblemError, match="is the mean of its example losses"):
        culpa.dvemb(run, culpa.Problem(model, plan.loss, example_losses=summed), behaviours())
    with pytest.raises(culpa.ProblemError, match="16 losses for the 8 rows"):
        culpa.dvemb(run, culpa.Problem(model, plan.loss, example_losses=twice), behaviours())
    constant = culpa.Behaviour("constant", lambda m, b: torch.ones(2), None)
    with pytest.raises(culpa.OptionError, match="not differentiable"):
        culpa.dvemb(run, recorded.problem, [constant])

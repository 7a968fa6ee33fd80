"""BatchNorm's running statistics in the sweeps, against the same training written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import culpa
from culpa.estimators.layers import by_layer, effect_by_layer
from oracles import normalised, unrolled
from oracles.compare import assert_close, assert_tree_close
from oracles.normalised import Options
from oracles.problems import cross_entropies, log_likelihoods
from oracles.recipes import DECAYING, adamw, sgd
from oracles.recording import Recorded, record
from oracles.retrain import Plan, buffers_of, parameters_of, retrain, true_effects

BOUND = 1e-8
MOMENTUM = sgd(momentum=0.9, weight_decay=0.1)
TWIN = unrolled.SGD(momentum=0.9, weight_decay=0.1)
CASES = {
    "momentum": Options(),
    "cumulative": Options(momentum=None),
    "twice": Options(twice=True),
    "twice-cumulative": Options(momentum=None, twice=True),
    "one-frozen": Options(evaluating=frozenset({"last"})),
}


def build(options: Options) -> Any:
    return normalised.make(options.momentum, options.twice, bool(options.evaluating))


def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    return normalised.images(6, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_unrolled_run(case: str, tmp_path: Path) -> None:
    options = CASES[case]
    plan = normalised.plan({0: MOMENTUM}, DECAYING, build(options))
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    scores = culpa.attribute(recorded.run, recorded.problem, asked, propagator=culpa.Exact())
    trace = normalised.unroll(plan, TWIN, lambda k: options)
    gamma = normalised.mean_log_likelihood(trace, held_out(), options)
    assert_close(scores.steps[:, 0], normalised.step_scores(trace, gamma), BOUND)


def test_statistics_that_are_frozen_after_a_stage(tmp_path: Path) -> None:
    # From then on the loss depends on them, and on what an earlier stage made of them.
    plan = normalised.plan({0: MOMENTUM}, DECAYING, normalised.make(), frozen_from=5)
    recorded = record(plan, tmp_path / "run")
    assert "last" in recorded.run.step(5).evaluating
    asked = culpa.log_likelihood("right", held_out())
    scores = culpa.attribute(recorded.run, recorded.problem, [asked], propagator=culpa.Exact())
    frozen = Options(evaluating=frozenset({"last"}))
    trace = normalised.unroll(plan, TWIN, lambda k: Options() if k < 5 else frozen)
    gamma = normalised.mean_log_likelihood(trace, held_out(), Options())
    assert_close(scores.steps[:, 0], normalised.step_scores(trace, gamma), BOUND)
    additive = culpa.embed(
        recorded.run, recorded.problem, propagator=culpa.Exact(), form="additive"
    )
    assert_close(additive.score(asked).mean(1), scores.stages[:, 0], BOUND)
    check_stages(plan, recorded, culpa.Secant(1))


def test_micro_batches_move_the_statistics_in_turn(tmp_path: Path) -> None:
    plan = normalised.plan({0: MOMENTUM}, DECAYING, normalised.make(None))
    model = plan.model()
    problem = culpa.Problem(model, plan.loss, cross_entropies)
    optimizer = plan.optimizers[0](model)
    weights = (0.25, 0.75)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for (inputs, targets), (rate,) in zip(plan.batches, plan.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            parts = list(zip(inputs.chunk(2), targets.chunk(2), strict=True))
            with recorder.step(*parts, weights=weights):
                optimizer.zero_grad()
                for weight, part in zip(weights, parts, strict=True):
                    (weight * plan.loss(model, part)).backward()
                optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    scores = culpa.attribute(run, problem, asked, propagator=culpa.Exact(), examples=True)
    ones = torch.ones(12, 8, dtype=torch.float64, requires_grad=True)
    trace = normalised.unroll(plan, TWIN, lambda k: Options(None), weights=weights, by_example=ones)
    gamma = normalised.mean_log_likelihood(trace, held_out(), Options(None))
    (expected,) = torch.autograd.grad(gamma, ones, retain_graph=True)
    ids = torch.tensor([run.example_ids(k) for k in range(12)])
    assert scores.examples is not None
    assert_close(scores.examples[ids, 0], expected, BOUND)
    assert_close(scores.steps[:, 0], normalised.step_scores(trace, gamma), BOUND)


def test_example_scores_are_derivatives_by_the_weight_of_the_examples_loss(tmp_path: Path) -> None:
    # The example stays in the batch that normalises: its own loss is taken out, and no more.
    plan = normalised.plan({0: MOMENTUM}, DECAYING, normalised.make())
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    scores = culpa.attribute(
        recorded.run, recorded.problem, asked, propagator=culpa.Exact(), examples=True
    )
    ones = torch.ones(12, 8, dtype=torch.float64, requires_grad=True)
    trace = normalised.unroll(plan, TWIN, lambda k: Options(), by_example=ones)
    gamma = normalised.mean_log_likelihood(trace, held_out(), Options())
    (expected,) = torch.autograd.grad(gamma, ones)
    ids = torch.tensor([recorded.run.example_ids(k) for k in range(12)])
    assert scores.examples is not None
    assert_close(scores.examples[ids, 0], expected, BOUND)


def check_stages(plan: Plan, recorded: Recorded, propagator: Any, **options: Any) -> None:
    """Effects, parameters and buffers of every stage against retraining, to rounding."""
    emb = culpa.embed(recorded.run, recorded.problem, propagator=propagator, **options)
    sense = options.get("counterfactual", "skip")
    asked = culpa.log_likelihood("right", held_out())
    removals = [plan.updates(name) for name, _, _ in plan.stages]
    truth = true_effects(plan, removals, log_likelihoods, held_out(), sense)
    assert_close(emb.effect(asked), truth, BOUND)
    for name in emb:
        without = retrain(plan, plan.updates(name), sense)
        model = plan.model()
        model.load_state_dict(emb.counterfactual(name))
        assert_tree_close(buffers_of(model), without.buffers, BOUND)
        assert_tree_close(parameters_of(model), without.parameters, BOUND)


@pytest.mark.parametrize("case", CASES)
def test_stages_against_retraining(case: str, tmp_path: Path) -> None:
    plan = normalised.plan({0: MOMENTUM}, DECAYING, build(CASES[case]))
    check_stages(plan, record(plan, tmp_path / "run"), culpa.Secant(1))


def test_stages_under_restart_and_with_adamw(tmp_path: Path) -> None:
    plan = normalised.plan({0: adamw(eps=1e-6)}, DECAYING, normalised.make(None, twice=True))
    recorded = record(plan, tmp_path / "run")
    check_stages(plan, recorded, culpa.Secant(1), counterfactual="restart")


@pytest.mark.parametrize(
    ("case", "propagator"),
    [
        ("twice-cumulative", culpa.Exact()),
        ("momentum", culpa.GaussNewton()),
        ("momentum", culpa.LayerWise()),
        ("one-frozen", culpa.Identity()),
    ],
    ids=["exact", "gauss-newton", "layer-wise", "identity"],
)
def test_the_additive_form_is_the_adjoint(case: str, propagator: Any, tmp_path: Path) -> None:
    plan = normalised.plan({0: MOMENTUM}, DECAYING, build(CASES[case]))
    recorded = record(plan, tmp_path / "run")
    asked = culpa.log_likelihood("right", held_out())
    scores = culpa.attribute(recorded.run, recorded.problem, [asked], propagator=propagator)
    additive = culpa.embed(recorded.run, recorded.problem, propagator=propagator, form="additive")
    assert_close(additive.score(asked).mean(1), scores.stages[:, 0], BOUND)


@pytest.mark.parametrize(
    ("propagator", "bound"),
    [(culpa.Exact(at="gauss"), 2e-3), (culpa.Exact(), 0.1), (culpa.GaussNewton(), 0.1)],
    ids=["two-points", "observed", "gauss-newton"],
)
def test_estimates_are_near_the_truth_and_the_last_stage_exact(
    propagator: Any, bound: float, tmp_path: Path
) -> None:
    rates = [(0.005,)] * 12
    plan = normalised.plan({0: sgd(momentum=0.9)}, rates, normalised.make())
    recorded = record(plan, tmp_path / "run")
    emb = culpa.embed(recorded.run, recorded.problem, propagator=propagator)
    asked = culpa.log_likelihood("right", held_out())
    removals = [plan.updates(name) for name, _, _ in plan.stages]
    truth = true_effects(plan, removals, log_likelihoods, held_out())
    assert_close(emb.effect(asked)[-1], truth[-1], BOUND)
    assert_close(emb.effect(asked), truth, bound)


def test_embeddings_with_statistics_are_saved_scored_and_split_by_layer(tmp_path: Path) -> None:
    plan = normalised.plan({0: MOMENTUM}, DECAYING, normalised.make())
    recorded = record(plan, tmp_path / "run")
    emb = culpa.embed(recorded.run, recorded.problem, propagator=culpa.Secant(1))
    asked = culpa.log_likelihood("right", held_out())
    emb.save(tmp_path / "stages.safetensors")
    again = culpa.StageEmbeddings.load(tmp_path / "stages.safetensors", recorded.problem)
    assert torch.equal(again.effect(asked), emb.effect(asked))
    split = by_layer(emb, asked)
    assert_close(torch.stack(list(split.values())).sum(0), emb.score(asked).mean(1), 1e-10)
    whole = effect_by_layer(emb, asked, points=24)
    assert float(whole.residual.abs().max()) < 1e-4 * float(whole.effect.abs().max())


def test_a_fraction_of_a_batch_that_normalises_is_refused(tmp_path: Path) -> None:
    plan = normalised.plan({0: MOMENTUM}, DECAYING, normalised.make())
    recorded = record(plan, tmp_path / "run")
    with pytest.raises(culpa.UnsupportedError, match=r"Secant\(0.25\).*BatchNorm.*Secant\(1\)"):
        culpa.embed(recorded.run, recorded.problem, propagator=culpa.Secant(0.25))

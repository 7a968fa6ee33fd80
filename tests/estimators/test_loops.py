"""Loops of many kinds, each attributed as its unrolled twin or its retraining says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import culpa
from oracles import unrolled
from oracles.compare import (
    assert_bitwise,
    assert_close,
    assert_tree_close,
    difference,
)
from oracles.problems import (
    affine,
    cross_entropies,
    cross_entropy,
    half_square,
    held_out,
    log_likelihoods,
    parameter_sums,
    seeded,
    smooth,
)
from oracles.recipes import DECAYING, TWINS, adamw, sgd
from oracles.recording import record
from oracles.retrain import Plan, parameters_of, retrain, set_groups, true_effects

BOUND = 1e-8
RATES = [rates[0] for rates in DECAYING]


def right() -> culpa.Behaviour:
    return culpa.log_likelihood("right", held_out())


@pytest.mark.parametrize("name", ["momentum-decay", "adamw"])
@pytest.mark.parametrize("clip", [0.1, 0.6, 100.0])
def test_clipping(clip: float, name: str, tmp_path: Path) -> None:
    build, rule = TWINS[name]
    plan = replace(smooth({0: build}, DECAYING), clip_grad_norm=clip)
    recorded = record(plan, tmp_path / "run")
    scores = culpa.attribute(recorded.run, recorded.problem, [right()])
    trace = unrolled.unroll(
        plan.model(), plan.loss, plan.batches, RATES, {0: rule}, clip_grad_norm=clip
    )
    assert_close(
        scores.steps[:, 0], unrolled.step_scores(trace, log_likelihoods, held_out()), BOUND
    )
    found = culpa.embed(recorded.run, recorded.problem, form="additive")
    assert_close(scores.stages[:, 0], found.score(right()).mean(1), 1e-5)


def micro_batched(path: Path, plan: Plan, weights: list[float] | None, explicit: bool) -> Any:
    """Record updates of two micro-batches each, the loop weighting their losses."""
    model = plan.model()
    problem = culpa.Problem(model, cross_entropy, example_losses=cross_entropies)
    optimizer = plan.optimizers[0](model)
    shares = weights or [0.5, 0.5]
    with culpa.record(path, problem, optimizer) as recorder:
        for name, start, stop in plan.stages:
            with recorder.stage(name):
                if explicit:
                    for k in range(start, stop):
                        set_groups(plan, k, optimizer)
                        optimizer.zero_grad()
                        with recorder.step(*plan.batches[k], weights=weights):
                            for share, micro in zip(shares, plan.batches[k], strict=True):
                                (share * cross_entropy(model, micro)).backward()
                            optimizer.step()
                else:
                    pieces = [micro for pair in plan.batches[start:stop] for micro in pair]
                    for at, micro in enumerate(recorder.batches(pieces)):
                        (cross_entropy(model, micro) / 2).backward()
                        if at % 2:
                            set_groups(plan, start + at // 2, optimizer)
                            optimizer.step()
                            optimizer.zero_grad()
    return culpa.open_run(path), problem, model


@pytest.mark.parametrize("name", ["nesterov-decay", "adamw"])
@pytest.mark.parametrize("way", ["loader", "step", "weighted"])
def test_accumulated_gradients(way: str, name: str, tmp_path: Path) -> None:
    build, rule = TWINS[name]
    base = smooth({0: build}, DECAYING)
    pairs = [  # of 3 and of 5
        ((x[:3].clone(), y[:3].clone()), (x[3:].clone(), y[3:].clone())) for x, y in base.batches
    ]
    weights = [0.3, 0.9] if way == "weighted" else None
    shares = weights or [0.5, 0.5]

    def together(model: nn.Module, batch: Any) -> Tensor:
        first, second = batch
        return shares[0] * cross_entropy(model, first) + shares[1] * cross_entropy(model, second)

    plan = replace(base, batches=pairs, loss=together, example_losses=None)
    run, problem, trained = micro_batched(tmp_path / "run", plan, weights, way != "loader")
    assert run.num_steps == 12
    assert_tree_close(retrain(plan).parameters, parameters_of(trained), 1e-12)
    assert_bitwise(culpa.replay(run, problem).state, parameters_of(trained))
    scores = culpa.attribute(run, problem, [right()], examples=True)
    trace = unrolled.unroll(plan.model(), plan.loss, plan.batches, RATES, {0: rule})
    expected = unrolled.step_scores(trace, log_likelihoods, held_out())
    assert_close(scores.steps[:, 0], expected, BOUND)
    assert all(len(run.example_ids(k)) == 8 for k in range(12))
    if name != "adamw":
        # Linear in the gradient: the examples of both micro-batches add up to the update.
        zero = culpa.attribute(run, problem, [right()], counterfactual="zero-gradient").steps[:, 0]
        sums = [scores.examples[list(run.example_ids(k)), 0].sum() for k in range(12)]
        assert_close(torch.stack(sums), zero, 1e-6)


@pytest.mark.parametrize("name", ["momentum-decay", "adamw"])
def test_dropout_is_attributed_with_the_masks_that_were_drawn(name: str, tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 12), nn.GELU(), nn.Dropout(0.4), nn.Linear(12, 3)
        ).double()

    build, rule = TWINS[name]
    plan = replace(smooth({0: build}, DECAYING), model=seeded(1, net))
    torch.manual_seed(21)
    recorded = record(plan, tmp_path / "run")
    torch.manual_seed(99)
    scores = culpa.attribute(recorded.run, recorded.problem, [right()])
    # The same generator, drawn from once an update in the same order, gives the same masks.
    torch.manual_seed(21)
    trace = unrolled.unroll(plan.model(), plan.loss, plan.batches, RATES, {0: rule})
    assert_tree_close(trace.final, parameters_of(recorded.trained), 1e-12)
    assert_close(
        scores.steps[:, 0], unrolled.step_scores(trace, log_likelihoods, held_out()), BOUND
    )


@pytest.mark.parametrize("wanted", [False, True], ids=["no gradient", "gradient unused"])
def test_a_frozen_layer(wanted: bool, tmp_path: Path) -> None:
    def net() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()
        model[0].requires_grad_(wanted)
        return model

    def build(model: nn.Module) -> AdamW:
        return AdamW(model[2].parameters(), lr=0.1, weight_decay=0.1, eps=1e-6)  # type: ignore[index]

    plan = replace(smooth({0: build}, DECAYING), model=seeded(0, net))
    recorded = record(plan, tmp_path / "run")
    assert_bitwise(recorded.run.final_state(), parameters_of(recorded.trained))
    assert_bitwise(
        culpa.replay(recorded.run, recorded.problem, without="second").state,
        retrain(plan, range(5, 9)).parameters,
    )
    scores = culpa.attribute(recorded.run, recorded.problem, [right()])
    trace = unrolled.unroll(
        plan.model(),
        plan.loss,
        plan.batches,
        RATES,
        {0: TWINS["adamw"][1]},
        trained={"2.weight", "2.bias"},
    )
    assert_close(
        scores.steps[:, 0], unrolled.step_scores(trace, log_likelihoods, held_out()), BOUND
    )
    # The estimated model without a stage is a whole model.
    found = culpa.embed(recorded.run, recorded.problem)
    model = plan.model()
    model.load_state_dict(found.counterfactual("third"))
    assert_tree_close(parameters_of(model), retrain(plan, range(9, 12)).parameters, 1e-12)


class Tied(nn.Module):
    """The last matrix is the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 5, bias=False)
        self.decoder = nn.Linear(5, 5)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(inputs)))


@pytest.mark.parametrize("name", ["momentum-decay", "adamw"])
def test_tied_weights_are_one_parameter(name: str, tmp_path: Path) -> None:
    build, rule = TWINS[name]
    plan = replace(smooth({0: build}, DECAYING), model=seeded(0, lambda: Tied().double()))
    recorded = record(plan, tmp_path / "run")
    assert set(recorded.run.final_state()) == {"encoder.weight", "decoder.bias"}
    scores = culpa.attribute(recorded.run, recorded.problem, [right()])
    trace = unrolled.unroll(plan.model(), plan.loss, plan.batches, RATES, {0: rule})
    assert_tree_close(trace.final, parameters_of(recorded.trained), 1e-12)
    assert_close(
        scores.steps[:, 0], unrolled.step_scores(trace, log_likelihoods, held_out()), BOUND
    )
    found = culpa.embed(recorded.run, recorded.problem)
    assert_tree_close(found.counterfactual("third"), retrain(plan, range(9, 12)).parameters, 1e-12)


class TwoHeads(nn.Module):
    """Every batch trains one head only: the other has no gradient at all."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        return self.heads[head](inputs)


def one_head(model: nn.Module, batch: tuple[Tensor, Tensor, int]) -> Tensor:
    inputs, targets, head = batch
    return half_square(lambda x: model(x, head), (inputs, targets))  # type: ignore[arg-type]


def two_headed(build: Callable[[nn.Module], torch.optim.Optimizer]) -> Plan:
    base = affine({0: build}, DECAYING)
    heads = [0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0]
    batches = [(x, y, head) for (x, y), head in zip(base.batches, heads, strict=True)]
    return replace(
        base,
        model=seeded(0, lambda: TwoHeads().double()),
        loss=one_head,
        batches=batches,
        example_losses=None,
    )


@pytest.mark.parametrize(
    "build", [sgd(momentum=0.9, weight_decay=0.1), adamw()], ids=["sgd", "adamw"]
)
def test_parameters_without_a_gradient_stand_still(
    build: Callable[[nn.Module], torch.optim.Optimizer], tmp_path: Path
) -> None:
    plan = two_headed(build)
    recorded = record(plan, tmp_path / "run")
    for without in (range(5, 9), [1], [2, 3, 10]):
        for counterfactual in ("skip", "restart"):
            found = culpa.replay(
                recorded.run, recorded.problem, without=without, counterfactual=counterfactual
            )
            assert_bitwise(found.state, retrain(plan, without, counterfactual).parameters)
    sums = culpa.Behaviour("sums", parameter_sums, None, unit="1")
    scores = culpa.attribute(recorded.run, recorded.problem, [sums])
    additive = culpa.embed(recorded.run, recorded.problem, form="additive")
    assert_close(scores.stages[:, 0], additive.score(sums).mean(1), 1e-9)
    if isinstance(build(plan.model()), SGD):
        truth = true_effects(plan, [[k] for k in range(12)], parameter_sums, None).mean(1)
        assert_close(scores.steps[:, 0], truth, 1e-9)
        block = culpa.embed(recorded.run, recorded.problem)
        end = retrain(plan).parameters
        for stage, start, stop in plan.stages:
            expected = difference(end, retrain(plan, range(start, stop)).parameters)
            assert_tree_close(block[stage], expected, 1e-9)


def test_a_run_of_one_update(tmp_path: Path) -> None:
    plan = smooth({0: adamw()}, [(0.1,)], [("only", 0, 1)])
    recorded = record(plan, tmp_path / "run")
    scores = culpa.attribute(recorded.run, recorded.problem, [right()])
    for propagator in (None, culpa.Exact(at="gauss")):  # replayed, and swept
        found = culpa.embed(recorded.run, recorded.problem, propagator=propagator)
        start = parameters_of(plan.model())
        assert_tree_close(found["only"], difference(retrain(plan).parameters, start), 1e-12)
        assert_close(scores.steps[0], found.score(right()).mean(1), 1e-10)
    assert scores.steps.shape == (1, 1)


def test_a_loop_without_stages_is_one(tmp_path: Path) -> None:
    plan = smooth({0: adamw()}, DECAYING)
    model = plan.model()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with culpa.record(tmp_path / "run", culpa.Problem(model, plan.loss), optimizer) as recorder:
        for batch in recorder.batches(plan.batches):
            optimizer.zero_grad()
            plan.loss(model, batch).backward()
            optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    assert [(s.start, s.stop) for s in run.stages] == [(0, 12)]
    scores = culpa.attribute(run, culpa.Problem(model, plan.loss), [right()])
    assert float(scores.stages[0, 0]) == pytest.approx(float(scores.steps.sum()), rel=1e-12)


def test_momentum_and_decay_changed_by_the_loop(tmp_path: Path) -> None:
    # The paper's figure 3 (h, i): the second stage has another momentum and weight decay.
    plan = replace(
        affine({0: sgd(momentum=0.9, weight_decay=0.01)}, DECAYING),
        options={5: {"momentum": 0.3}, 9: {"weight_decay": 0.5, "nesterov": True}},
    )
    recorded = record(plan, tmp_path / "run")
    end = retrain(plan).parameters
    assert_bitwise(recorded.run.final_state(), end)
    block = culpa.embed(recorded.run, recorded.problem)
    for stage, start, stop in plan.stages:
        without = retrain(plan, range(start, stop)).parameters
        found = culpa.replay(recorded.run, recorded.problem, without=stage)
        assert_bitwise(found.state, without)
        assert_tree_close(block[stage], difference(end, without), 1e-9)
    sums = culpa.Behaviour("sums", parameter_sums, None, unit="1")
    scores = culpa.attribute(recorded.run, recorded.problem, [sums])
    truth = true_effects(plan, [[k] for k in range(12)], parameter_sums, None).mean(1)
    assert_close(scores.steps[:, 0], truth, 1e-9)


def test_which_states_are_kept_changes_no_score(tmp_path: Path) -> None:
    plan = smooth({0: adamw(weight_decay=0.1), 5: sgd(momentum=0.9)}, DECAYING)
    found = []
    for policy in (None, culpa.Every(1), culpa.Every(5), culpa.Every(100)):
        recorded = record(plan, tmp_path / str(len(found)), checkpoints=policy)
        scores = culpa.attribute(recorded.run, recorded.problem, [right()], examples=True)
        block = culpa.embed(recorded.run, recorded.problem)
        replayed = culpa.replay(recorded.run, recorded.problem, without=[6]).state
        found.append((scores.steps, scores.examples, dict(block["first"]), replayed))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_a_surrounding_no_grad_changes_nothing(tmp_path: Path) -> None:
    plan = smooth({0: adamw(weight_decay=0.1)}, DECAYING)
    recorded = record(plan, tmp_path / "run")

    def everything() -> tuple[Tensor, Tensor, Tensor]:
        steps = culpa.attribute(recorded.run, recorded.problem, [right()]).steps
        effect = culpa.embed(recorded.run, recorded.problem).effect(right())
        truth = culpa.replay(recorded.run, recorded.problem, without="first").effect(right())
        return steps, effect, truth

    with torch.no_grad():
        inside = everything()
    torch.testing.assert_close(inside, everything(), rtol=0, atol=0)


def test_trust_measures_the_growth_of_the_adjoint(tmp_path: Path) -> None:
    build, rule = TWINS["momentum-decay"]
    plan = smooth({0: build}, [(3.0,)] * 12)  # a rate at which training amplifies
    recorded = record(plan, tmp_path / "run")
    exact = culpa.Exact()  # named, since the default falls back where the sweep explodes
    scores = culpa.attribute(recorded.run, recorded.problem, [right()], propagator=exact)
    trace = unrolled.unroll(plan.model(), plan.loss, plan.batches, [3.0] * 12, {0: rule})
    growth = torch.tensor([trust.growth for trust in scores.trust], dtype=torch.float64)
    expected = unrolled.growths(trace, log_likelihoods, held_out())
    torch.testing.assert_close(growth, expected, rtol=1e-6, atol=1e-9)
    assert scores.trust[-1].growth == pytest.approx(1.0)
    grades = [trust.grade for trust in scores.trust]
    assert set(grades) <= {"trusted", "doubtful", "not identified"}
    assert grades[-1] == "trusted"
    worst = max(range(12), key=lambda k: float(expected[k]))
    assert float(expected[worst]) > 20
    assert grades[worst] == "not identified"
    sizes = [
        float(
            torch.cat([(a[0][n] - b[0][n]).detach().reshape(-1) for n in a[0]]).norm()
            / torch.cat([p.detach().reshape(-1) for p in b[0].values()]).norm()
        )
        for b, a in zip(trace.before, trace.after, strict=True)
    ]
    assert [trust.displacement for trust in scores.trust] == pytest.approx(sizes, rel=1e-9)

"""``attribute(order=2)``: the curvature of the behaviour, against dense Hessians and retraining."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.estimators import adjoint, curved
from oracles.compare import flat
from oracles.problems import held_out, log_likelihoods, smooth
from oracles.recipes import adamw, sgd
from oracles.recording import record
from oracles.retrain import Plan, behaviour_values, retrain

PLANS: dict[str, Plan] = {
    "sgd": smooth({0: sgd(momentum=0.9)}, [(0.05,)] * 8, (("a", 0, 3), ("b", 3, 8))),
    "adamw": smooth({0: adamw()}, [(0.003,)] * 8, (("a", 0, 3), ("b", 3, 8))),
}


def mean_at(model: nn.Module, vector: Tensor) -> Tensor:
    """The mean log-likelihood of the held-out points at parameters that ``flat`` made a vector."""
    parts, at = dict[str, Tensor](), 0
    for name, p in sorted(model.named_parameters()):
        parts[name] = vector[at : at + p.numel()].reshape(p.shape)
        at += p.numel()
    inputs, targets = held_out()
    logits = torch.func.functional_call(model, parts, (inputs,))
    return -nn.functional.cross_entropy(logits, targets)


def end_of(plan: Plan) -> tuple[nn.Module, Tensor, Tensor]:
    """The trained model, its parameters as one vector, and the dense Hessian of the behaviour."""
    model = retrain(plan).model
    end = flat({n: p.detach() for n, p in model.named_parameters()})
    hessian = torch.autograd.functional.hessian(lambda v: mean_at(model, v), end)
    assert isinstance(hessian, Tensor)
    return model, end, hessian


def found_curvature(plan: Plan, rank: int) -> curved.Curvature:
    model = retrain(plan).model
    problem = culpa.Problem(model, plan.loss)
    params = {n: p.detach() for n, p in model.named_parameters()}
    asked = culpa.log_likelihood("right", held_out())
    return curved.curvature(problem, asked, params, {}, list(params), rank)


def test_the_largest_eigenvalues_and_their_vectors() -> None:
    _, _, hessian = end_of(PLANS["sgd"])
    values = torch.linalg.eigvalsh(hessian)
    largest = values[values.abs().argsort(descending=True)[:3]]
    found = found_curvature(PLANS["sgd"], 3)
    torch.testing.assert_close(found.values, largest, rtol=1e-6, atol=1e-9)
    for value, vector in zip(found.values, found.directions, strict=True):
        u = flat(vector)
        assert float((hessian @ u - value * u).norm()) < 1e-3 * float(value.abs())


@pytest.mark.parametrize("name", PLANS)
def test_scores_of_all_directions_are_the_dense_taylor_expansion(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS[name]
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    model, end, hessian = end_of(plan)
    slope = torch.autograd.functional.jacobian(lambda v: mean_at(model, v), end)
    assert isinstance(slope, Tensor)
    exact = adjoint.curvature
    monkeypatch.setattr(
        adjoint, "curvature", lambda *given: exact(*given, rank=len(end)), raising=True
    )
    found = culpa.attribute(
        recorded.run, recorded.problem, asked, propagator=culpa.Exact(), order=2
    )
    embedded = culpa.embed(
        recorded.run,
        recorded.problem,
        stages=["a", "b"],
        updates=range(8),
        propagator=culpa.Exact(),
        form="additive",
    )

    def expected(name: str) -> Tensor:
        d = flat(embedded[name])
        return slope @ d - 0.5 * d @ hessian @ d

    for k in range(8):
        wanted = expected(f"update {k}")
        torch.testing.assert_close(found.steps[k, 0], wanted, rtol=1e-7, atol=1e-12)
    for i, stage in enumerate(("a", "b")):
        torch.testing.assert_close(found.stages[i, 0], expected(stage), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_it_is_nearer_to_retraining(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    recorded = record(plan, tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    whole = behaviour_values(retrain(plan).model, log_likelihoods, held_out()).mean()
    without = behaviour_values(retrain(plan, [7]).model, log_likelihoods, held_out()).mean()
    # The last update's displacement is exact, so that the behaviour's curvature is all its error.
    errors = [
        abs(
            float(
                culpa.attribute(recorded.run, recorded.problem, asked, order=order).steps[7, 0]
                - (whole - without)
            )
        )
        for order in (1, 2)
    ]
    assert errors[1] < 0.5 * errors[0], errors


def test_two_behaviours_keep_their_own_curvature(tmp_path: Path) -> None:
    recorded = record(PLANS["sgd"], tmp_path / "run")
    inputs, targets = held_out()
    asked = [
        culpa.log_likelihood("first", (inputs[:3], targets[:3])),
        culpa.Behaviour("linear", lambda m, b: sum(p.sum() for p in m.parameters())[None], None),
        culpa.log_likelihood("rest", (inputs[3:], targets[3:])),
    ]

    def scored(which: list[culpa.Behaviour], order: int = 2) -> culpa.Scores:
        return culpa.attribute(
            recorded.run, recorded.problem, which, propagator=culpa.Exact(), order=order
        )

    together = scored(asked)
    for q, one in enumerate(asked):
        alone = scored([one])
        torch.testing.assert_close(together.steps[:, q], alone.steps[:, 0])
        torch.testing.assert_close(together.stages[:, q], alone.stages[:, 0])
    first = scored(asked, 1)
    assert torch.equal(first.steps[:, 1], together.steps[:, 1])
    assert [t.grade for t in first.trust] == [t.grade for t in together.trust]
    assert [t.growth for t in first.trust] == [t.growth for t in together.trust]


def test_no_other_order(tmp_path: Path) -> None:
    recorded = record(PLANS["sgd"], tmp_path / "run")
    asked = [culpa.log_likelihood("right", held_out())]
    with pytest.raises(culpa.CulpaError, match="order must be 1 or 2"):
        culpa.attribute(recorded.run, recorded.problem, asked, order=3)

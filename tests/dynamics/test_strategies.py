"""Hessian products by every strategy, what a model supports of them, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.dynamics import choice
from culpa.dynamics.curvature import hessian
from culpa.dynamics.local import LocalLoss
from culpa.trajectory.walk import forward, session
from oracles.awkward import Batch, Norm, asked, data, net, recorded


def local_of(folder: Path, model: nn.Module) -> LocalLoss:
    run, problem = recorded(folder, model, data(4))
    with session(run, problem) as engine:
        (transition,) = list(forward(run, engine, 2, 3))
    return LocalLoss(problem, transition)


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.detach().reshape(-1) for v in values.values()])


def dense(model: nn.Module, at: dict[str, Tensor], batch: Batch) -> Tensor:
    shapes = [p.shape for p in at.values()]

    def value(vector: Tensor) -> Tensor:
        parts = vector.split([s.numel() for s in shapes])
        params = {n: p.reshape(s) for n, p, s in zip(at, parts, shapes, strict=True)}
        return cross_entropy(torch.func.functional_call(model, params, (batch[0],)), batch[1])

    return torch.autograd.functional.hessian(value, flat(at))  # type: ignore[no-any-return]


def vectors(at: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    drawn = [
        {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in at.items()}
        for _ in range(2)
    ]
    return [*drawn, {n: torch.zeros_like(p) for n, p in at.items()}]


TOLERANCE = {"finite-difference": 1e-4, "one-sided-difference": 1e-2}


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("strategy", hessian.STRATEGIES)
def test_every_strategy_is_the_hessian(
    strategy: str, activation: Callable[[], nn.Module], tmp_path: Path
) -> None:
    local = local_of(tmp_path / "run", net(activation()))
    matrix = dense(local.problem.model, local.params, data(4)[2])
    asked = vectors(local.params)
    for v, found in zip(asked, hessian.products(local, local.params, asked, strategy), strict=True):
        truth = matrix @ flat(v)
        assert float((flat(found) - truth).norm()) <= TOLERANCE.get(strategy, 1e-12) * float(
            truth.norm()
        )


def test_a_one_sided_difference_away_from_the_observed_point(tmp_path: Path) -> None:
    local = local_of(tmp_path / "run", net(nn.GELU()))
    there = {n: p + 0.3 for n, p in local.params.items()}
    (v, *_) = vectors(there)
    truth = dense(local.problem.model, there, data(4)[2]) @ flat(v)
    moved = local.around(there)
    for at, where in ((local, there), (moved, moved.params)):
        (found,) = hessian.products(at, where, [v], "one-sided-difference")
        assert float((flat(found) - truth).norm()) < 1e-2 * float(truth.norm())


@pytest.mark.parametrize("strategy", ["reverse-over-reverse", "forward-over-reverse"])
def test_layer_norm(strategy: str, tmp_path: Path) -> None:
    affine = nn.LayerNorm(6, elementwise_affine=False)
    local = local_of(tmp_path / "run", net(affine, nn.Tanh()))
    matrix = dense(net(Norm(), nn.Tanh()), local.params, data(4)[2])
    (v, *_) = vectors(local.params)
    (found,) = hessian.products(local, local.params, [v], strategy)
    torch.testing.assert_close(flat(found), matrix @ flat(v), rtol=1e-9, atol=1e-12)


@pytest.fixture
def by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still but for the strategies, which cost what they do on a quiet machine."""
    costs = {
        "reverse-over-reverse": 2.5,
        "forward-over-reverse": 5.0,
        "reverse-over-forward": 5.0,
        "finite-difference": 2.0,
        "one-sided-difference": 1.0,
    }
    clock, multiply = [0.0], hessian.products

    def products(local: Any, at: Any, some: Any, strategy: str) -> Any:
        clock[0] += costs[strategy]
        return multiply(local, at, some, strategy)

    monkeypatch.setattr(hessian, "products", products)
    monkeypatch.setattr(choice, "_now", lambda _: clock[0])
    monkeypatch.setattr(choice, "MEASURED_FROM", 40)


def test_a_smooth_model_gets_one_sided_differences(by_the_clock: None, tmp_path: Path) -> None:
    run, problem = recorded(tmp_path / "run", net(nn.GELU()), data(48))
    scores = culpa.attribute(run, problem, asked())
    assert scores.propagator == culpa.Exact(hvp="one-sided-difference"), scores.strategy
    assert "0.40 of the time" in scores.strategy
    exact = culpa.attribute(run, problem, asked(), propagator=culpa.Exact("reverse-over-reverse"))
    assert culpa.agreement(scores.steps[:, 0], exact.steps[:, 0]).relative_error < 1e-2
    # A stage's displacement is carried by exact products all the same.
    carried = culpa.embed(run, problem, propagator=culpa.Exact(at="gauss"))
    assert "reverse-over-reverse" in carried.facts["strategy"]


def test_a_model_with_kinks_gets_the_exact_product(by_the_clock: None, tmp_path: Path) -> None:
    model = net(nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU())
    run, problem = recorded(tmp_path / "run", model, data(48))
    scores = culpa.attribute(run, problem, asked())
    assert scores.propagator == culpa.Exact(hvp="reverse-over-reverse"), scores.strategy


def test_differences_that_stop_agreeing_are_given_up(by_the_clock: None, tmp_path: Path) -> None:
    model, batches = net(nn.Identity()), data(48)

    def curved(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        hidden = module[0](batch[0])  # type: ignore[operator]
        bent = torch.where(batch[2].bool(), (hidden * 300).sin() / 300, hidden.tanh())
        return cross_entropy(module[2](bent), batch[1])  # type: ignore[operator]

    # Smooth at the states that a run of this length keeps, which are surveyed.
    surveyed = recorded(tmp_path / "plain", net(nn.Tanh()), batches)[0].kept_states
    marked = [
        (x, y, torch.zeros(1) if k in surveyed else torch.ones(1))
        for k, (x, y) in enumerate(batches)
    ]
    run, problem = recorded(tmp_path / "run", model, marked, curved)
    inputs, targets = data(1, 5)[0]
    behaviour = culpa.Behaviour(
        "right", lambda m, b: -curved(m, b)[None], (inputs, targets, torch.zeros(1))
    )
    scores = culpa.attribute(run, problem, [behaviour])
    assert "one-sided-difference: measured" in scores.strategy
    assert "given up for reverse-over-reverse at update" in scores.strategy

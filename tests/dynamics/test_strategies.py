"""Hessian products by every strategy, what a model supports of them, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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


LENGTH = choice.CHECKED_FROM + 10


CHECKED = culpa.Exact(hvp="checked-difference")


def against_exact(run: culpa.Run, problem: culpa.Problem, scores: culpa.Scores) -> float:
    exact = culpa.attribute(run, problem, asked(), propagator=culpa.Exact("reverse-over-reverse"))
    return culpa.agreement(scores.steps[:, 0], exact.steps[:, 0]).relative_error


def test_a_smooth_model_gets_one_sided_differences(tmp_path: Path) -> None:
    run, problem = recorded(tmp_path / "run", net(nn.GELU()), data(LENGTH))
    scores = culpa.attribute(run, problem, asked(), propagator=CHECKED)
    assert scores.propagator == culpa.Exact(hvp="one-sided-difference"), scores.strategy
    checked = [LENGTH - 1 - int(part * LENGTH) for part in choice.CHECKED]
    assert f"of reverse-over-reverse at updates {', '.join(map(str, checked))}" in scores.strategy
    assert 0.0 < against_exact(run, problem, scores) < 1e-5
    # A stage's displacement is carried by exact products all the same.
    carried = culpa.embed(run, problem, propagator=culpa.Exact(at="gauss"))
    assert "reverse-over-reverse" in carried.facts["strategy"]


def test_examples_are_as_exact_as_the_updates_that_they_are_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 48), nn.GELU(), nn.Linear(48, 3))
    batches = [(x.float(), y) for x, y in data(LENGTH, 16)]

    def losses(module: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(module(batch[0]), batch[1], reduction="none")

    problem = culpa.Problem(model, lambda m, b: losses(m, b).mean(), losses)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for batch in recorder.batches(batches):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    run, (inputs, targets) = culpa.open_run(tmp_path / "run"), data(1, 5)[0]
    behaviours = [culpa.log_likelihood("right", (inputs.float(), targets))]
    found, exact = (
        culpa.attribute(run, problem, behaviours, propagator=by, examples=True).examples
        for by in (CHECKED, culpa.Exact("reverse-over-reverse"))
    )
    assert found is not None
    assert exact is not None
    assert 0.0 < float((found - exact).abs().max()) < 5e-4 * float(exact.abs().max())


def test_a_short_run_gets_the_exact_product(tmp_path: Path) -> None:
    length = choice.CHECKED_FROM - 1
    run, problem = recorded(tmp_path / "run", net(nn.GELU()), data(length))
    scores = culpa.attribute(run, problem, asked(), propagator=CHECKED)
    assert scores.propagator == culpa.Exact(hvp="reverse-over-reverse"), scores.strategy


class Kink(nn.Module):
    """ReLU, as nobody knows it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.0)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(48, track_running_stats=False), nn.Identity()])
@pytest.mark.parametrize("kink", [nn.ReLU(), Kink()])
def test_a_model_with_kinks_gets_the_exact_product(
    norm: nn.Module, kink: nn.Module, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 48), norm, kink, nn.Linear(48, 3))
    batches = [(x.float(), y) for x, y in data(LENGTH, 64)]
    run, problem = recorded(tmp_path / "run", model, batches)
    inputs, targets = data(1, 5)[0]
    behaviour = culpa.log_likelihood("right", (inputs.float(), targets))
    scores = culpa.attribute(run, problem, [behaviour], propagator=CHECKED)
    judge = culpa.Exact(hvp="reverse-over-reverse")
    exact = culpa.attribute(run, problem, [behaviour], propagator=judge)
    gap = culpa.agreement(scores.steps[:, 0], exact.steps[:, 0]).relative_error
    assert gap < 3e-2, scores.strategy
    if isinstance(kink, nn.ReLU):
        assert scores.propagator == culpa.Exact(hvp="reverse-over-reverse")
        assert "not tried with Relu" in scores.strategy
    elif isinstance(norm, nn.BatchNorm1d):
        assert scores.propagator == culpa.Exact(hvp="reverse-over-reverse")
        assert "given up for reverse-over-reverse at update" in scores.strategy


def test_differences_that_stop_agreeing_are_given_up_at_once(tmp_path: Path) -> None:
    batches, turn = data(LENGTH), LENGTH - 7

    def curved(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        hidden = module[0](batch[0])  # type: ignore[operator]
        bent = torch.where(batch[2].bool(), (hidden * 3e5).sin() / 3e5, hidden.tanh())
        return cross_entropy(module[2](bent), batch[1])  # type: ignore[operator]

    # Bent between two checks: nothing but the size of the product tells.
    marked = [(x, y, torch.tensor([float(k == turn)])) for k, (x, y) in enumerate(batches)]
    run, problem = recorded(tmp_path / "run", net(nn.Identity()), marked, curved)
    inputs, targets = data(1, 5)[0]
    behaviour = culpa.Behaviour(
        "right", lambda m, b: -curved(m, b)[None], (inputs, targets, torch.zeros(1))
    )
    assert LENGTH - 1 - turn not in {int(part * LENGTH) for part in choice.CHECKED}
    scores = culpa.attribute(run, problem, [behaviour], propagator=CHECKED)
    assert f"at updates {LENGTH - 1}, " in scores.strategy
    assert f"given up for reverse-over-reverse at update {turn}," in scores.strategy
    # The update where they failed is passed by the exact product already.
    exact = culpa.attribute(run, problem, [behaviour], propagator=culpa.Exact())
    assert culpa.agreement(scores.steps[:, 0], exact.steps[:, 0]).relative_error < 1e-5

"""What a model supports: refused by name before a sweep, or replaced by what works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import culpa
from culpa.dynamics.curvature import hessian, support
from culpa.dynamics.local import LocalLoss
from culpa.trajectory.walk import forward, session
from oracles.awkward import Apply, Last, Once, Silent, asked, data, net, recorded

REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str, str]] = {
    # torch's forward-mode formula of layer_norm is wrong when differentiated again.
    "layer norm": (
        lambda: net(nn.LayerNorm(6), nn.Tanh()),
        culpa.Exact(hvp="reverse-over-forward"),
        r"reverse-over-forward.*% off",
        "reverse-over-reverse",
    ),
    "once": (
        lambda: net(Apply(Once)),
        culpa.Exact(hvp="reverse-over-reverse"),
        "Once cannot be differentiated twice",
        "finite-difference",
    ),
    "forward": (
        lambda: net(Apply(Once)),
        culpa.Exact(hvp="forward-over-reverse"),
        "autograd.Function",
        "finite-difference",
    ),
    "silent": (
        lambda: net(Apply(Silent)),
        culpa.Exact(hvp="reverse-over-reverse"),
        "Silent cannot be differentiated twice",
        "finite-difference",
    ),
    "gauss-newton": (
        lambda: net(Apply(Once)),
        culpa.GaussNewton(),
        r"GaussNewton\(\) cannot be used",
        "Identity",
    ),
    "layer-wise": (lambda: net(Apply(Once)), culpa.LayerWise(), r"LayerWise\(\)", "Identity"),
    "krylov": (lambda: net(nn.Tanh()), culpa.Krylov(), "Krylov", "reverse-over-reverse"),
    "secant": (lambda: net(nn.Tanh()), culpa.Secant(), "Secant", "GaussNewton"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_cannot_support_is_refused_before_the_sweep(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, propagator, said, works = REFUSED[name]
    run, problem = recorded(tmp_path / "run", build(), data(12))

    def sweep(*_: object) -> None:
        raise AssertionError("the sweep began")

    monkeypatch.setattr("culpa.estimators.adjoint.passage", sweep)
    with pytest.raises(culpa.UnsupportedError, match=said) as caught:
        culpa.attribute(run, problem, asked(), propagator=propagator)
    assert works in str(caught.value)
    assert "culpa.replay" in str(caught.value)


def test_embeddings_are_refused_in_the_same_way(tmp_path: Path) -> None:
    run, problem = recorded(tmp_path / "run", net(Apply(Once)), data(12))
    with pytest.raises(culpa.UnsupportedError, match=r"Secant\(fraction=1\.0") as caught:
        culpa.embed(run, problem, propagator=culpa.GaussNewton())
    assert "GaussNewton() cannot be used" in str(caught.value)
    # Nothing is multiplied for the last stage, so nothing is refused.
    assert set(culpa.embed(run, problem, stages=["late"], propagator=culpa.GaussNewton()))


@pytest.mark.parametrize("build", [lambda: net(Apply(Once)), lambda: net(Apply(Silent))])
def test_by_default_such_a_model_gets_finite_differences(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    run, problem = recorded(tmp_path / "run", build(), data(12))
    scores = culpa.attribute(run, problem, asked())
    assert scores.propagator == culpa.Exact(hvp="finite-difference")
    assert "nothing exact is supported" in scores.strategy
    plain, other = recorded(tmp_path / "plain", net(nn.Tanh()), data(12))
    truth = culpa.attribute(plain, other, asked(), propagator=culpa.Exact())
    assert culpa.agreement(scores.steps[:, 0], truth.steps[:, 0]).relative_error < 1e-4


def test_an_lstm_is_attributed_by_what_it_supports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Last(), nn.Linear(5, 3)).double()
    run, problem = recorded(tmp_path / "run", model, data(12))
    scores = culpa.attribute(run, problem, asked())
    truth = [culpa.replay(run, problem, without=[k]).effect(asked()[0]).mean() for k in range(12)]
    assert culpa.agreement(scores.steps[:, 0], torch.stack(truth)).pearson > 0.99
    assert scores.strategy


def test_only_a_custom_function_is_suspected(tmp_path: Path) -> None:
    run, problem = recorded(tmp_path / "run", net(nn.ReLU()), data(4))
    with session(run, problem) as engine:
        (transition,) = list(forward(run, engine, 2, 3))
    local = LocalLoss(problem, transition)
    assert support.custom_functions(local) == []
    assert set(support.examine(local, hessian.EXACT, local.grads).products) == set(hessian.EXACT)


def test_integer_parameters_stand_still(tmp_path: Path) -> None:
    model = net(nn.Tanh())
    model.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    run, problem = recorded(tmp_path / "run", model, data(12))
    plain, other = recorded(tmp_path / "plain", net(nn.Tanh()), data(12))
    found, truth = (culpa.attribute(*pair, asked()) for pair in ((run, problem), (plain, other)))
    torch.testing.assert_close(found.steps, truth.steps)
    moved = culpa.embed(run, problem, propagator=culpa.Exact(at="gauss"))["early"]
    assert all(v.is_floating_point() or not v.any() for v in moved.values())

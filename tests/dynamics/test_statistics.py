"""Derivatives of running statistics against finite differences of torch's own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.dynamics import running, statistics
from culpa.dynamics.local import LocalLoss
from culpa.trajectory.walk import forward, session

LAYERS = {
    "batch norm": lambda: nn.BatchNorm2d(3, momentum=0.3),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "not affine": lambda: nn.BatchNorm2d(3, affine=False),
    "sync": lambda: nn.SyncBatchNorm(3),
    "instance norm": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "evaluating": lambda: nn.BatchNorm2d(3).eval(),
}


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def recorded(path: Path, layer: nn.Module, steps: int = 2) -> tuple[Any, Any, nn.Module]:
    """A convolution, the layer twice over (the second always in training), and a smooth loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 2), layer, nn.Tanh(), nn.BatchNorm2d(3)).double()
    problem = culpa.Problem(model, lambda m, b: (m(b).tanh() ** 2 + m(b)).mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with culpa.record(path, problem, optimizer) as recorder:
        for batch in recorder.batches([normal(k, 5, 1, 4, 4) for k in range(steps)]):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    return culpa.open_run(path), problem, model


def by_torch(
    model: nn.Module, params: Any, buffers: Any, batch: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics after the loss's two forward passes, and its gradient: the module itself."""
    model.load_state_dict(params | buffers)
    model.zero_grad()
    (model(batch).tanh() ** 2 + model(batch)).mean().backward()
    after = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    return after, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LAYERS)
def test_both_derivatives(name: str, tmp_path: Path) -> None:
    run, problem, model = recorded(tmp_path / "run", LAYERS[name]())
    with session(run, problem) as engine:
        (transition,) = forward(run, engine, 1, 2)
        local = LocalLoss(problem, transition)
        before = transition.before
        names = tuple(before.buffers)
        direction = {n: normal(7, *p.shape) for n, p in before.params.items()}
        moving = {n: normal(8, *b.shape) for n, b in before.buffers.items() if b.ndim}
        statistics.check(local, names)
        gained, moved = statistics.pushforward(local, names, direction, moving)
        # Forwards: central differences of torch's own statistics and gradients.
        step, ends = 1e-6, []
        for sign in (1.0, -1.0):
            params = {n: p + sign * step * direction[n] for n, p in before.params.items()}
            shifted = {
                n: b + sign * step * moving[n] if n in moving else b
                for n, b in before.buffers.items()
            }
            ends.append(by_torch(model, params, shifted, transition.batches[0])[0])
        for n in moving:
            expected = (ends[0][n] - ends[1][n]) / (2 * step)
            torch.testing.assert_close(moved[n], expected, rtol=1e-6, atol=1e-7)
        slopes = []
        for sign in (1.0, -1.0):
            shifted = {
                n: b + sign * step * moving[n] if n in moving else b
                for n, b in before.buffers.items()
            }
            slopes.append(by_torch(model, before.params, shifted, transition.batches[0])[1])
        for n, slope in slopes[0].items():
            expected = (slope - slopes[1][n]) / (2 * step)
            torch.testing.assert_close(gained[n], expected, rtol=1e-5, atol=1e-7)
        reads = sum(float(g.abs().sum()) for g in gained.values()) > 1e-6
        assert reads == (name == "evaluating")
        # Backwards: the transpose.
        w = {n: normal(9, *p.shape) for n, p in before.params.items()}
        p = {n: normal(10, *b.shape) for n, b in moving.items()}
        ((theta, r, none),) = statistics.pullback(local, names, [w], [p])
        assert none is None
        inner = sum(float((theta[n] * direction[n]).sum()) for n in direction)
        inner += sum(float((r[n] * moving[n]).sum()) for n in moving)
        outer = sum(float((p[n] * moved[n]).sum()) for n in moving)
        outer += sum(float((w[n] * gained[n]).sum()) for n in gained)
        assert inner == pytest.approx(outer, rel=1e-10)
        # With the Hessian product, here by differences of torch's gradients, in it or beside it.
        slopes = []
        for sign in (1.0, -1.0):
            params = {n: v + sign * step * w[n] for n, v in before.params.items()}
            slopes.append(by_torch(model, params, before.buffers, transition.batches[0])[1])
        ((both, same, none),) = statistics.pullback(local, names, [w], [p], "added")
        ((gains, again, product),) = statistics.pullback(local, names, [w], [p], "apart")
        assert none is None
        assert product is not None
        for n in theta:
            bent = (slopes[0][n] - slopes[1][n]) / (2 * step)
            torch.testing.assert_close(product[n], bent, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(gains[n], theta[n], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(both[n], theta[n] + product[n], rtol=1e-9, atol=1e-12)
        for n, value in r.items():
            torch.testing.assert_close(same[n], value, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(again[n], value, rtol=1e-9, atol=1e-12)


def test_no_variance_below_zero() -> None:
    buffers = {"a.running_mean": torch.ones(1), "a.running_var": torch.tensor([1.0, 1.0])}
    moved = {"a.running_mean": torch.full((1,), 3.0), "a.running_var": torch.tensor([0.5, 1.5])}
    found = running.shifted(buffers, moved)
    assert found["a.running_mean"].tolist() == [-2.0]
    assert found["a.running_var"].tolist() == [0.5, 0.0]


class Own(nn.BatchNorm2d):
    """Keeps statistics in a way of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean.mul_(0.5).add_(inputs.detach().amax((0, 2, 3)))
        return nn.functional.batch_norm(inputs, None, None, self.weight, self.bias, training=True)


class Averaging(nn.Module):
    """Keeps an average of its inputs, as codebooks and teachers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(3))
        self.average: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * inputs.mean((0, 2, 3)))
        return inputs


@pytest.mark.parametrize(
    ("make", "buffer"), [(lambda: Own(3), "1.running_mean"), (Averaging, "1.average")]
)
def test_other_buffers_are_refused_by_name(make: Any, buffer: str, tmp_path: Path) -> None:
    run, problem, _ = recorded(tmp_path / "run", make(), steps=3)
    asked = [culpa.Behaviour("mean", lambda m, b: m(b).flatten(), normal(3, 2, 1, 4, 4), unit="1")]
    with pytest.raises(culpa.UnsupportedError, match=f"'{buffer}'.*culpa.replay"):
        culpa.attribute(run, problem, asked)
    with pytest.raises(culpa.UnsupportedError, match=f"'{buffer}'.*culpa.replay"):
        culpa.embed(run, problem, updates=[0], propagator=culpa.Secant(1))

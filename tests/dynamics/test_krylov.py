"""Many updates at once, against torch.optim.SGD on quadratic losses and dense eigenvectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import culpa
from culpa.dynamics.krylov import Updates, krylov_space, leap, transfer
from oracles.compare import assert_close, relative_gap

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "momentum": {"momentum": 0.9},
    "momentum-decay": {"momentum": 0.7, "weight_decay": 0.2},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov-decay": {"momentum": 0.6, "nesterov": True, "weight_decay": 0.4},
}
SIZE = 12


def quadratic(size: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An indefinite symmetric H and a linear term, float64."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    h = (root + root.T) / size**0.5
    return h + 1.5 * torch.eye(size), torch.randn(size, generator=generator, dtype=torch.float64)


def split_in_two(vector: Tensor) -> dict[str, Tensor]:
    """As a model holds it: under two names and in two shapes."""
    return {"a": vector[:4].reshape(2, 2), "b": vector[4:]}


def joined(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([tree["a"].reshape(-1), tree["b"]])


def trained(
    h: Tensor, slope: Tensor, start: Tensor, rates: list[float], warm: int, **rule: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.optim.SGD on x.H x / 2 + slope.x: where ``warm`` updates of rate .01 led, the momentum
    there, and where the updates of ``rates`` led from there.
    """
    x = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.01, **rule)
    velocity, middle = torch.zeros_like(start), start.clone()
    for k, rate in enumerate([0.01] * warm + rates):
        if k == warm:
            middle = x.detach().clone()
            buffer = optimizer.state[x].get("momentum_buffer")
            velocity = torch.zeros_like(start) if buffer is None else buffer.clone()
        optimizer.param_groups[0]["lr"] = rate
        x.grad = h @ x.detach() + slope
        optimizer.step()
    return middle, velocity, x.detach()


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", RULES)
def test_a_full_krylov_space_is_sgd_itself(name: str, warm: int) -> None:
    h, slope = quadratic()
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    rates = [0.05 / (1 + 0.1 * k) for k in range(40)]
    middle, velocity, end = trained(h, slope, start, rates, warm, **RULES[name])
    updates = Updates(tuple(rates), **RULES[name])
    gradient = h @ middle + slope + updates.weight_decay * middle
    made = leap(
        lambda v: split_in_two(h @ joined(v)),
        split_in_two(gradient),
        split_in_two(velocity),
        updates,
        SIZE,
    )
    assert_close(joined(made.way), end - middle, 1e-10)
    met = h @ end + slope + updates.weight_decay * end
    assert_close(joined(made.gradient), met, 1e-10)


def test_as_many_products_as_updates_are_exact_in_any_dimension() -> None:
    # n updates from rest are a polynomial of degree n - 1 of H, which n products determine.
    h, slope = quadratic(60, seed=1)
    start = torch.ones(60, dtype=torch.float64)
    rates = [0.1] * 5
    middle, velocity, end = trained(h, slope, start, rates, 0, momentum=0.9)
    gaps = []
    for rank in (2, 3, 4, 5):
        made = leap(
            lambda v: {"x": h @ v["x"]},
            {"x": h @ middle + slope},
            {"x": velocity},
            Updates(tuple(rates), momentum=0.9),
            rank,
        )
        gaps.append(relative_gap(made.way["x"], end - middle))
    assert gaps[-1] < 1e-12
    assert gaps[0] > gaps[1] > gaps[2] > 1e-6


def test_it_is_the_matrix_function_of_the_dense_eigenvectors() -> None:
    h, gradient = quadratic(30, seed=2)
    updates = Updates((0.02,) * 200, momentum=0.9, weight_decay=0.1)
    values, vectors = torch.linalg.eigh(h)
    way, velocity = transfer(values, vectors.T @ gradient, torch.zeros_like(values), updates)
    made = leap(lambda v: {"x": h @ v["x"]}, {"x": gradient}, {}, updates, 30)
    assert_close(made.way["x"], vectors @ way, 1e-9)
    assert_close(made.velocity["x"], vectors @ velocity, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_basis_is_orthonormal_and_t_is_the_projection(dtype: torch.dtype) -> None:
    h, slope = (value.to(dtype) for value in quadratic(50, seed=3))
    starts = [{"x": slope}, {"x": torch.ones(50, dtype=dtype)}]
    basis, small = krylov_space(lambda v: {"x": h @ v["x"]}, starts, 10)
    q = torch.stack([one["x"] for one in basis], 1).double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        q.T @ q, torch.eye(10, dtype=torch.float64), atol=tolerance, rtol=0.0
    )
    torch.testing.assert_close(small, q.T @ h.double() @ q, atol=10 * tolerance, rtol=0.0)
    # Both starts lie in it.
    for start in starts:
        vector = start["x"].double()
        assert_close(q @ (q.T @ vector), vector, 10 * tolerance)


def test_an_invariant_subspace_ends_it_early() -> None:
    h = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    start = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    basis, small = krylov_space(lambda v: {"x": h @ v["x"]}, [{"x": start}], 4)
    assert len(basis) == 2
    expected = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(small), expected)


def test_at_rest_where_the_gradient_is_zero_nothing_moves() -> None:
    nothing = {"x": torch.zeros(3)}
    made = leap(lambda v: v, nothing, {}, Updates((0.1,) * 4, momentum=0.9), 4)
    assert torch.equal(made.way["x"], torch.zeros(3))


def test_curvature_that_is_not_finite_is_refused() -> None:
    with pytest.raises(culpa.ProblemError, match="diverged"):
        leap(
            lambda v: {"x": v["x"] * float("inf")},
            {"x": torch.ones(3)},
            {},
            Updates((0.1,) * 4),
            4,
        )


@pytest.mark.parametrize(
    "options", [{"rank": 1}, {"rank": 0}, {"segments": 0}, {"examples": 0}, {"rank": True}]
)
def test_options_outside_of_what_they_mean(options: dict[str, Any]) -> None:
    with pytest.raises(culpa.OptionError, match=next(iter(options))):
        culpa.Krylov(**options)


def test_it_does_not_carry_itself() -> None:
    with pytest.raises(culpa.OptionError, match="Exact"):
        culpa.Krylov(curvature=culpa.Krylov())

"""The curvature of a behaviour in the scores of single updates: ``culpa.attribute(order=2)``.

With D_t the displacement of theta_K that update t made, what it did to a behaviour is

    gamma(theta_K) - gamma(theta_K - D_t) = grad gamma . D_t - 1/2 D_t^T H D_t + O(|D_t|^3),

H the Hessian of gamma at theta_K. A reverse sweep gives grad gamma . D_t of every update without
making any D_t; and so it gives u . D_t for any other vector u. H of a trained model has a few large
eigenvalues, so H ~ sum_i h_i u_i u_i^T, and the second-order term of every update is
-1/2 sum_i h_i (u_i . D_t)^2 for one more adjoint a direction in the same sweep.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from culpa import tree
from culpa.behaviour import Behaviour, evaluation_mode
from culpa.dynamics import statistics
from culpa.dynamics.krylov import krylov_space
from culpa.dynamics.local import differentiable_twice
from culpa.dynamics.running import floating
from culpa.errors import OptionError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory.state import on_model
from culpa.tree import Tree

RANK = 8
"""Directions for each behaviour."""
PRODUCTS = 24
"""Products with H that its largest eigenvalues are found by (Lanczos, from the gradient)."""


@dataclass(frozen=True)
class Curvature:
    """H ~ sum_i values[i] u_i u_i^T; ``values`` float64 ``[r]``, the u_i orthonormal."""

    values: Tensor
    directions: list[Tree]

    def term(self, along: Tensor) -> Tensor:
        """-1/2 D^T H D of displacements given by their u_i . D, float64 ``[n, r]`` -> ``[n]``."""
        return -0.5 * along.square() @ self.values


def mean_at(
    problem: Problem, behaviour: Behaviour, params: Tree, buffers: Tree, leaves: Tree, moving: Tree
) -> Tensor:
    """The behaviour's value with ``leaves`` and ``moving`` in place of theirs, with its graph.

    Raises:
        OptionError: if it does not depend on them.
        BehaviourError: if it is not one finite number per test point.
    """
    with evaluation_mode(problem.model), torch.enable_grad(), differentiable_twice():
        everything = params | leaves, buffers | moving
        values = behaviour.checked(
            statistics.evaluate(problem, behaviour.function, *everything, behaviour.batch)
        )
        mean = values.mean()
    if not mean.requires_grad:
        raise OptionError(
            f"behaviour {behaviour.name!r} is not differentiable in the parameters, so it has"
            " no first-order scores. Use StageEmbeddings.effect or culpa.replay, which only"
            " evaluate it."
        )
    return mean


def curvature(
    problem: Problem,
    behaviour: Behaviour,
    params: Tree,
    buffers: Tree,
    names: Collection[str],
    rank: int = RANK,
) -> Curvature:
    """The ``rank`` largest eigenvalues, by size, of the behaviour's Hessian, and their vectors.

    In the parameters of these names only: running statistics count to first order. Cost:
    ``PRODUCTS`` products with the Hessian, each two gradients of the behaviour.

    Raises:
        UnsupportedError: for a model whose derivative has none.
    """
    params, buffers = on_model(problem.model, params), on_model(problem.model, buffers)
    trained = floating({name: params[name] for name in names})
    leaves = {name: value.detach().requires_grad_() for name, value in trained.items()}
    value = mean_at(problem, behaviour, params, buffers, leaves, {})
    try:
        slopes = _gradient(value, leaves)
        start = {name: slope.detach() for name, slope in slopes.items()}
        bent = [slope for slope in slopes.values() if slope.requires_grad]
        if not bent:  # linear in the parameters
            return Curvature(torch.zeros(0, dtype=torch.float64), [])

        def product(vector: Tree) -> Tree:
            cotangents = [vector[n] for n, slope in slopes.items() if slope.requires_grad]
            found = torch.autograd.grad(
                bent,
                list(leaves.values()),
                cotangents,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return dict(zip(leaves, found, strict=True))

        basis, small = krylov_space(product, [start], max(rank, PRODUCTS))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedError(
            f"order=2 needs second derivatives of behaviour {behaviour.name!r}, which this model"
            f" lacks ({error}). Use order=1."
        ) from error
    values, vectors = torch.linalg.eigh(small)
    largest = values.abs().argsort(descending=True)[:rank]
    directions = [_combined(basis, vectors[:, i]) for i in largest.tolist()]
    return Curvature(values[largest], directions)


def _gradient(value: Tensor, leaves: Tree) -> Tree:
    found = torch.autograd.grad(
        value,
        list(leaves.values()),
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))


def _combined(basis: Sequence[Tree], weights: Tensor) -> Tree:
    total = tree.zeros_like(basis[0])
    for one, weight in zip(basis, weights.tolist(), strict=True):
        total = tree.add(total, tree.scale(weight, one))
    return total


def second_order(
    steps: Tensor, stages: Sequence[tuple[int, int]], curvatures: Sequence[Curvature]
) -> tuple[Tensor, Tensor]:
    """The scores of updates and of stages with their second-order terms.

    Args:
        steps: float64 ``[updates, behaviours + directions]``: of every update grad gamma . D_t for
            each behaviour, then u . D_t for the directions of each behaviour in turn.
        stages: start and stop of each.
        curvatures: of each behaviour; none: only sums are made.

    Returns:
        ``[updates, behaviours]`` and ``[stages, behaviours]``. A stage's term is that of its whole
        displacement, the sum of its updates' (Estimator 4.3), so it is not the sum of their terms.
    """
    width = steps.shape[1] - sum(len(one.directions) for one in curvatures)
    whole = torch.stack([steps[a:b].sum(0) for a, b in stages]) if stages else steps[:0]
    single, together = steps[:, :width].clone(), whole[:, :width].clone()
    at = width
    for q, one in enumerate(curvatures):
        along = slice(at, at + len(one.directions))
        single[:, q] += one.term(steps[:, along])
        together[:, q] += one.term(whole[:, along])
        at = along.stop
    return single, together

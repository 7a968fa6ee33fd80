"""Products with the Hessian of one update's loss, H v, by three strategies with one result.

Costs are in gradients of the same loss; ``Q`` is the number of vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from culpa import tree
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.errors import UnsupportedError
from culpa.tree import Tree

RELATIVE_STEP = 1e-3
"""Of the finite difference, in units of ||theta|| / ||v||: between roundoff and curvature."""


def reverse_over_reverse(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """grad of <grad L, v>, all vectors sharing one graph: 1.5 + Q gradients."""
    leaves = {name: p.detach().requires_grad_() for name, p in at.items()}
    inputs = list(leaves.values())
    with torch.enable_grad(), differentiable_twice():
        grads = torch.autograd.grad(
            local.value(leaves),
            inputs,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        attached = [(g, name) for g, name in zip(grads, leaves, strict=True) if g.requires_grad]
        if not attached:  # a loss that is linear in the parameters
            return [tree.zeros_like(at) for _ in vectors]
        products: list[Tree] = []
        for i, v in enumerate(vectors):
            found = torch.autograd.grad(
                [g for g, _ in attached],
                inputs,
                [v[name] for _, name in attached],
                retain_graph=i + 1 < len(vectors),
                allow_unused=True,
                materialize_grads=True,
            )
            products.append(dict(zip(leaves, found, strict=True)))
    return products


def forward_over_reverse(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """jvp of the gradient along v: about 2.5 Q gradients, little memory."""
    gradient = torch.func.grad(local.value)
    with differentiable_twice():
        return [torch.func.jvp(gradient, (at,), (dict(v),))[1] for v in vectors]


def finite_difference(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """(grad L(theta + e v) - grad L(theta - e v)) / 2e: 2 Q gradients, no second derivatives.

    Wrong on models with kinks (ReLU with BatchNorm); accurate on smooth activations.
    """
    products: list[Tree] = []
    for v in vectors:
        size = tree.norm(v)
        if size == 0.0:
            products.append(tree.zeros_like(at))
            continue
        step = RELATIVE_STEP * tree.norm(at) / size
        above = local.gradient(tree.add(at, tree.scale(step, v)))
        below = local.gradient(tree.subtract(at, tree.scale(step, v)))
        products.append(tree.scale(0.5 / step, tree.subtract(above, below)))
    return products


STRATEGIES: dict[str, Callable[[LocalLoss, Tree, Sequence[Tree]], list[Tree]]] = {
    "reverse-over-reverse": reverse_over_reverse,
    "forward-over-reverse": forward_over_reverse,
    "finite-difference": finite_difference,
}


def products(local: LocalLoss, at: Tree, vectors: Sequence[Tree], strategy: str) -> list[Tree]:
    """H v for each vector, with H at the parameters ``at``.

    Raises:
        UnsupportedError: if the model has no derivative of the kind the strategy needs.
    """
    try:
        return STRATEGIES[strategy](local, at, vectors)
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented" not in str(error) and "does not support" not in str(error):
            raise
        raise UnsupportedError(
            f"Hessian products by {strategy} need a derivative that this model lacks ({error}). Use"
            " culpa.Exact(hvp='finite-difference'), which needs first derivatives only."
        ) from error

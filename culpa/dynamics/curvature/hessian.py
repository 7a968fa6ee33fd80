"""Products with the Hessian of one update's loss, H v: four strategies with one result.

Costs are in gradients of the same loss; ``Q`` is the number of vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from culpa import tree
from culpa.dynamics.curvature.apart import Slopes, apart
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.dynamics.shares import over_ranks
from culpa.errors import UnsupportedError
from culpa.tree import Tree

RELATIVE_STEP = 1e-3
"""Of central differences, in units of ||theta|| / ||v||: between roundoff and curvature."""
ONE_SIDED_STEPS = {torch.float32: 5e-5, torch.float64: 1e-6}
"""Of one-sided differences, whose error grows with the step and not with its square.

In float32 on smooth networks products are within 1e-2 of the exact ones from 1e-5 to 3e-4, and
scores within 2e-3 at 5e-5 (docs/results/attribute_costs.md); another dtype takes ``RELATIVE_STEP``.
"""


def reverse_over_reverse(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """grad of <grad L, v>, all vectors sharing one graph: 1.5 + Q gradients.

    Q where the replay left its graph (dynamics/graphs.py).
    """
    last = len(vectors) - 1
    with torch.enable_grad(), differentiable_twice():
        slopes = local.graph.use(at) if local.graph is not None and at is local.params else None
        if slopes is None:
            leaves = {name: p.detach().requires_grad_() for name, p in at.items()}
            value, mode = apart(lambda: local.value(leaves), leaves)
            slopes = Slopes(value, leaves, mode)
        return [slopes.pull(v, retain=i < last) for i, v in enumerate(vectors)]


def forward_over_reverse(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """jvp of the gradient along v: about 5 Q gradients, little memory."""
    gradient = torch.func.grad(local.value)
    with differentiable_twice():
        return [torch.func.jvp(gradient, (at,), (dict(v),))[1] for v in vectors]


def reverse_over_forward(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """Gradient of the directional derivative <grad L, v>, itself by jvp: about 5 Q gradients.

    For models whose backward cannot be differentiated and whose forward-mode derivative can. torch
    2.13's of ``layer_norm`` and of ``batch_norm`` in training cannot: it takes mean and variance
    for constants, so the product is some 20 % off, in silence (pytorch issues 196699, 196700).
    ``support.examine`` finds that out.
    """

    def slope(params: Tree, v: Tree) -> Tensor:
        return torch.func.jvp(local.value, (params,), (v,))[1]

    with differentiable_twice():
        return [torch.func.grad(slope)(dict(at), dict(v)) for v in vectors]


def finite_difference(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """(grad L(theta + e v) - grad L(theta - e v)) / 2e: 2 Q gradients, no second derivatives.

    Error: e^2 / 6 times a fourth derivative, and roundoff of the gradient over e. Wrong on models
    with kinks (ReLU with BatchNorm), whatever the step; accurate on smooth activations.
    """
    return central_differences(local, at, vectors, RELATIVE_STEP)


def one_sided_difference(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """(grad L(theta + e v) - grad L(theta)) / e: Q gradients where the replay has the second one.

    Otherwise Q + 1. Error: e / 2 times a third derivative, and twice the central one's roundoff.
    """
    at_hand = local.observed and at is local.params and at.keys() == local.grads.keys()
    here = local.grads if at_hand else local.gradient(at)
    products: list[Tree] = []
    for v in vectors:
        step = one_sided_step(at, v)
        if step is None:
            products.append(tree.zeros_like(at))
            continue
        there = local.gradient(tree.add(at, v, step))
        products.append(tree.scale(1.0 / step, tree.subtract(there, here)))
    return products


def central_differences(
    local: LocalLoss, at: Tree, vectors: Sequence[Tree], relative_step: float
) -> list[Tree]:
    """``finite_difference`` with a step of one's own, in units of ||theta|| / ||v||."""
    products: list[Tree] = []
    for v in vectors:
        step = step_of(at, v, relative_step)
        if step is None:
            products.append(tree.zeros_like(at))
            continue
        above = local.gradient(tree.add(at, v, step))
        below = local.gradient(tree.add(at, v, -step))
        products.append(tree.scale(0.5 / step, tree.subtract(above, below)))
    return products


def one_sided_step(at: Tree, vector: Tree) -> float | None:
    """The step that ``one_sided_difference`` takes."""
    relative = max(ONE_SIDED_STEPS.get(p.dtype, RELATIVE_STEP) for p in at.values())
    return step_of(at, vector, relative)


def step_of(at: Tree, vector: Tree, relative_step: float) -> float | None:
    """e = relative_step ||theta|| / ||v||; ``None`` where the vector is zero."""
    size = tree.norm(vector)
    return relative_step * (tree.norm(at) or 1.0) / size if size > 0.0 else None


Strategy = Callable[[LocalLoss, Tree, Sequence[Tree]], list[Tree]]

EXACT: dict[str, Strategy] = {
    "reverse-over-reverse": reverse_over_reverse,
    "forward-over-reverse": forward_over_reverse,
    "reverse-over-forward": reverse_over_forward,
}
"""Equal up to rounding, in the order in which they are preferred."""
STRATEGIES: dict[str, Strategy] = {
    **EXACT,
    "finite-difference": finite_difference,
    "one-sided-difference": one_sided_difference,
}


def products(local: LocalLoss, at: Tree, vectors: Sequence[Tree], strategy: str) -> list[Tree]:
    """H v for each vector, with H at the parameters ``at``.

    Raises:
        UnsupportedError: if the model has no derivative of the kind the strategy needs.
    """
    way = STRATEGIES[strategy]
    try:
        if strategy not in EXACT:  # differences of gradients, which the ranks share already
            return way(local, at, vectors)
        return over_ranks(
            local, lambda part: _by_parts(way, part, at, vectors), [at] * len(vectors)
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if strategy not in EXACT:
            raise
        raise UnsupportedError(
            f"Hessian products by {strategy} need a derivative that this model lacks ({error}). Use"
            " culpa.Exact(hvp='finite-difference'), which needs first derivatives only."
        ) from error


def _by_parts(way: Strategy, local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """One micro-batch after the other, so that the graph of one is in memory and no more."""
    found = [way(part, at, vectors) for part in local.parts()]
    return [reduce(tree.add, products) for products in zip(*found, strict=True)]

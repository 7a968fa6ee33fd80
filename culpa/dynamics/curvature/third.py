"""Third derivatives of one update's loss along one direction: H v and T[v, v] together.

T is the derivative of the Hessian, T[v, v] = d^2/dt^2 grad L(theta + t v) at t = 0.

torch 2.13 differentiates some normalisation layers wrongly the third time, in silence (pytorch
issues 186256, 196699, 196700), so ``settle`` holds Taylor mode against differences of Hessian
products, whose formulas are right, before anything is carried with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from culpa import tree
from culpa.dynamics.curvature import hessian
from culpa.dynamics.curvature.support import EQUAL, difference, overruled, tried
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.dynamics.shares import over_ranks
from culpa.errors import UnsupportedError
from culpa.tree import Tree

STEP = 2e-3
"""Of the differences, in units of ||theta|| / ||v||."""
Jet = tuple[Tree, Tree]
"""H v and T[v, v]."""


@dataclass(frozen=True)
class Third:
    """How third derivatives are computed.

    ``way``: ``"taylor"`` (nested forward mode over reverse, about 12 gradients) or ``"difference"``
    (central differences of Hessian products by ``hvp``, about 8 gradients).
    """

    way: str = "taylor"
    hvp: str = "reverse-over-reverse"

    def jet(self, local: LocalLoss, v: Tree) -> Jet:
        """H v and T[v, v] at the observed parameters."""
        return taylor(local, v) if self.way == "taylor" else by_difference(local, v, self.hvp)


def taylor(local: LocalLoss, v: Tree) -> Jet:
    """By the derivative of the derivative of the gradient along v, both in forward mode."""
    found = over_ranks(local, lambda part: list(_taylor(part, v)), [local.params, local.params])
    return found[0], found[1]


def _taylor(local: LocalLoss, v: Tree) -> Jet:
    gradient = torch.func.grad(local.value)

    def product(params: Tree) -> Tree:
        return torch.func.jvp(gradient, (params,), (v,))[1]

    with differentiable_twice():
        found = torch.func.jvp(product, (dict(local.params),), (dict(v),))
    return found[0], found[1]


def by_difference(local: LocalLoss, v: Tree, hvp: str, relative_step: float = STEP) -> Jet:
    """H v, and (H(theta + e v) v - H(theta - e v) v) / 2e."""
    (bent,) = hessian.products(local, local.params, [v], hvp)
    size = tree.norm(v)
    if size == 0.0:
        return bent, tree.zeros_like(v)
    step = relative_step * (tree.norm(local.params) or 1.0) / size
    above, below = (
        hessian.products(local, tree.add(local.params, v, e), [v], hvp)[0] for e in (step, -step)
    )
    return bent, tree.scale(0.5 / step, tree.subtract(above, below))


def settle(local: LocalLoss, v: Tree, hvp: str) -> tuple[Third, str]:
    """The way that is right on this model, and why; found out on one vector.

    Raises:
        UnsupportedError: if neither way works.
    """
    jet, missing = tried(lambda: taylor(local, v))
    steps = (STEP, 2 * STEP)
    pair, refused = tried(lambda: [by_difference(local, v, hvp, step)[1] for step in steps])
    agreed = pair is not None and difference(pair[1], pair[0]) <= EQUAL
    if jet is not None and tree.is_finite(jet[1]):
        if pair is None or not overruled(jet[1], *pair):
            return Third("taylor", hvp), "Taylor mode"
        missing = (
            f"Taylor mode is {difference(jet[1], pair[0]):.1%} off them: torch's derivative of some"
            " layer is wrong"
        )
    if agreed:
        return Third("difference", hvp), f"differences of Hessian products ({missing})"
    raise UnsupportedError(
        "order=2 needs third derivatives of the loss, and this model has none: Taylor mode fails"
        f" ({missing}), and differences of Hessian products {refused or 'disagree'}. Use order=1"
        " with culpa.Exact(at='gauss') or culpa.Secant(fraction), which need no third derivatives."
    )

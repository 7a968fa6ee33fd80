"""Derivatives of a behaviour along a displacement, per test point: grad gamma . D, D^T H D."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from culpa import tree
from culpa.dynamics.curvature.support import EQUAL, difference, overruled, tried
from culpa.dynamics.curvature.third import STEP
from culpa.errors import UnsupportedError
from culpa.tree import Tree

Values = Callable[[Tree], Tensor]
"""gamma per test point, ``[n]``, as a function of tensors by name."""


def first(values: Values, at: Tree, along: Tree) -> Tensor:
    """d/dt values(at + t along) at t = 0, ``[n]``.

    One forward-mode product; n reverse passes for a model without forward mode.
    """
    found, _ = tried(lambda: torch.func.jvp(values, (at,), (along,))[1])
    if found is not None:
        return found.detach()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in at.items()}
    with torch.enable_grad():
        rows = values(leaves)
    slopes = [
        torch.autograd.grad(
            row,
            list(leaves.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for row in rows
    ]
    products = [tree.dot(dict(zip(leaves, slope, strict=True)), along) for slope in slopes]
    return torch.tensor(products, dtype=rows.dtype, device=rows.device)


def second(values: Values, at: Tree, along: Tree) -> Tensor:
    """d^2/dt^2 values(at + t along) at t = 0, ``[n]``.

    Taylor mode (nested forward mode), held against differences of ``first`` at two steps, which
    are taken instead where they agree with each other and not with it: torch 2.13's nested
    forward mode through layer_norm is wrong (pytorch issue 196700). About 6 first derivatives.

    Raises:
        UnsupportedError: for a model without second derivatives at all.
    """
    size = tree.norm(along)
    if size == 0.0:
        return torch.zeros_like(first(values, at, along))
    step = STEP * (tree.norm(at) or 1.0) / size

    def difference_at(t: float) -> Tensor:
        above, below = (first(values, tree.add(at, tree.scale(s, along)), along) for s in (t, -t))
        return (above - below) / (2.0 * t)

    def slope(here: Tree) -> Tensor:
        return torch.func.jvp(values, (here,), (along,))[1]

    found, missing = tried(lambda: torch.func.jvp(slope, (at,), (along,))[1])
    fine, coarse = difference_at(step), difference_at(2.0 * step)
    if found is None and difference({"": coarse}, {"": fine}) <= EQUAL:
        return fine
    if found is None:
        raise UnsupportedError(
            f"a score with order=2 needs the behaviour's second derivatives, and there are none:"
            f" {missing}. Use StageEmbeddings.effect, which only evaluates it."
        )
    return fine if overruled({"": found}, {"": fine}, {"": coarse}) else found.detach()

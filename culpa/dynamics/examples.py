"""What one training example contributes to an update: the slope of its loss along a cotangent.

With s_i(theta) the share of example i in the update's loss (they sum to it) and w the cotangent of
the gradient, that is w . grad s_i. Give every example a weight u_i, all of them 1, as if u were one
more parameter:

    f(theta, u) = sum_i u_i s_i(theta),     H_f (w, 0) = (H w, (w . grad s_i)_i):

the products with the Hessian that a sweep needs anyway have the examples' slopes in them, for next
to nothing. A product by central differences has evaluated s_i(theta + e w) and s_i(theta - e w):
the slope is their difference. All others take a forward-mode product instead. (One-sided ones had
theirs by losses too: for a GPT-2 under AdamW up to .08 of the largest score off.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from culpa.dynamics import statistics
from culpa.dynamics.curvature import hessian
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.dynamics.propagator import CHOSEN, Exact, Propagator
from culpa.dynamics.shares import over_rows
from culpa.dynamics.statistics import Pulled
from culpa.errors import ProblemError
from culpa.trajectory.ranks.joined import sharing
from culpa.tree import Tree

WEIGHTS = "weight of every example "
"""The name of u among the parameters; no module can have one that ends like this."""
CLOSE = 1e-2
"""Relative difference of the loss from the examples' mean that rounding in bfloat16 explains."""


class Weighted(LocalLoss):
    """f(theta, u) of the module's docstring, u under the name ``WEIGHTS``."""

    def __init__(self, local: LocalLoss, examples: int) -> None:
        super().__init__(local.problem, local.transition, observed=False)
        like = next(iter(self.params.values()))
        self.params = {**self.params, WEIGHTS: torch.ones(examples).to(like)}
        self.graph = local.graph

    def value(self, params: Tree) -> Tensor:
        """f, differentiable in both."""
        return (params[WEIGHTS] * self.example_values(_without(params))).sum()

    def part(self, params: Tree, buffers: Tree, batch: object, at: int) -> Tensor:
        """As for ``LocalLoss``, weighted."""
        everything = self.everything(_without(params))
        losses = self.problem.example_losses_in(everything, buffers, batch)
        rows = [len(micro.rows) for micro in self.transition.record.contributing]
        return (params[WEIGHTS].split(rows)[at] * losses).mean()

    def parts(self) -> list[LocalLoss]:
        """Itself: the weights are those of all micro-batches."""
        return [self]


def _without(params: Tree) -> Tree:
    return {name: value for name, value in params.items() if name != WEIGHTS}


class _Watched(LocalLoss):
    """The loss as the sum of its shares, which it notes wherever a gradient is taken."""

    def __init__(self, local: LocalLoss) -> None:
        super().__init__(local.problem, local.transition, local.observed)
        self.seen: list[Tensor] = []

    def value(self, params: Tree) -> Tensor:
        """As for ``LocalLoss``."""
        shares = self.example_values(params)
        self.seen.append(shares.detach())
        return shares.sum()

    def parts(self) -> list[LocalLoss]:
        """Itself: shares are noted of all micro-batches together."""
        return [self]


def products(
    propagator: Propagator, local: LocalLoss, cotangents: Sequence[Tree], examples: int
) -> tuple[list[Tree], list[Tensor]]:
    """C w of the propagator, and the slopes w . grad s_i, float64 ``[examples]``, for each w.

    Cost: that of the products for ``Exact`` with second derivatives or central differences; for the
    others a forward-mode product for each cotangent besides, some two forward passes.
    """
    if sharing() is not None:
        return over_rows(
            local, lambda part, n: products(propagator, part, cotangents, n), cotangents, examples
        )
    if isinstance(propagator, Exact) and propagator.hvp in (*CHOSEN, *hessian.EXACT):
        weighted = Weighted(local, examples)
        still = torch.zeros_like(weighted.params[WEIGHTS])
        found = propagator.products(weighted, [{**w, WEIGHTS: still} for w in cotangents])
        slopes = [product.pop(WEIGHTS) for product in found]
    elif isinstance(propagator, Exact) and propagator.hvp == "finite-difference":
        both = [_by_differences(local, w, examples) for w in cotangents]
        found, slopes = [bent for bent, _ in both], [slope for _, slope in both]
    else:
        found = propagator.products(local, cotangents)
        with differentiable_twice():
            slopes = [
                torch.func.jvp(local.example_values, (local.params,), (w,))[1] for w in cotangents
            ]
    return found, [slope.detach().double().cpu() for slope in slopes]


def with_statistics(
    local: LocalLoss,
    running: Sequence[str],
    cotangents: Sequence[Tree],
    moved: Sequence[Tree],
    curved: Literal["added", "apart"],
    examples: int,
) -> tuple[list[Pulled], list[Tensor]]:
    """``statistics.pullback`` with exact products, and the slopes of ``products`` in them."""
    weighted = Weighted(local, examples)
    found = statistics.pullback(weighted, running, cotangents, moved, curved)
    slopes = [(one.product or one.gained)[WEIGHTS] for one in found]
    bare = [
        Pulled(_without(one.gained), one.before, one.product and _without(one.product))
        for one in found
    ]
    return bare, [slope.detach().double().cpu() for slope in slopes]


def _by_differences(local: LocalLoss, w: Tree, examples: int) -> tuple[Tree, Tensor]:
    """One product by central differences, and the slopes by the losses that it has evaluated."""
    watched = _Watched(local)
    (bent,) = hessian.products(watched, watched.params, [w], "finite-difference")
    step = hessian.step_of(watched.params, w, hessian.RELATIVE_STEP)
    if step is None:
        return bent, torch.zeros(examples)
    above, below = watched.seen
    return bent, (above.double() - below.double()) / (2.0 * step)


def check_losses(local: LocalLoss, examples: int) -> None:
    """Raise ``ProblemError`` unless the update's examples have one loss each, and it their mean.

    Cost: one forward pass.
    """
    with torch.no_grad():
        shares = local.example_values(local.params)
    if len(shares) != examples:
        raise ProblemError(
            f"example_losses returns {len(shares)} losses for update {local.transition.index},"
            f" which was recorded with {examples} training examples (the rows of its batch)."
            " Return one loss for each row."
        )
    mean, loss = float(shares.sum()), local.transition.loss
    if not math.isclose(mean, loss, rel_tol=CLOSE, abs_tol=1e-6):
        raise ProblemError(
            f"the loss of update {local.transition.index} is {loss:.6g} and the mean of its"
            f" example_losses {mean:.6g}. Scores of examples are shares of the loss: give"
            " Problem(example_losses=...) whose mean is the loss, any regularisation included."
        )

"""The reverse sweep p <- M_k^T p through one update, for several behaviours, with its trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from culpa import tree
from culpa.dynamics import updates
from culpa.dynamics.clip import clip
from culpa.dynamics.clip import derivative as clip_derivative
from culpa.dynamics.curvature import hessian
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.dynamics.propagator import Exact, Propagator
from culpa.dynamics.structured import GaussNewton
from culpa.dynamics.updates import Rule
from culpa.errors import UnsupportedError
from culpa.estimators.effects import mismatch
from culpa.estimators.trust import GROWTH_DOUBTFUL, UPDATE_DOUBTFUL, Trust, grade_update
from culpa.problem import Problem
from culpa.trajectory.walk import Transition
from culpa.tree import Slots, Tree

PROBES = 16
"""At so many updates of a run the sweep measures how good its products are."""
SETTLED = 3
"""One probe may be an outlier: so many are wanted before the sweep falls back."""


@dataclass
class Adjoint:
    """p_{k+1}: the derivative of one behaviour with respect to the state after update k."""

    params: Tree
    slots: Slots = field(default_factory=dict[str, dict[str, Tensor]])
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Remember the norm that growth is measured against."""
        self.initial = tree.norm(self.params)

    @property
    def growth(self) -> float:
        """||p|| over its norm at the end of training."""
        return tree.norm(self.params) / self.initial if self.initial > 0.0 else 1.0


class Sweep:
    """Carries the adjoints backwards, update by update.

    Args:
        propagator: ``None`` chooses: the exact Hessian while it is benign, and Gauss-Newton for
            all earlier updates once the products are more than ``UPDATE_DOUBTFUL`` off or the
            adjoint has grown more than ``GROWTH_DOUBTFUL``-fold.
    """

    def __init__(
        self,
        problem: Problem,
        adjoints: Sequence[Adjoint],
        propagator: Propagator | None,
        num_steps: int,
    ) -> None:
        self.problem = problem
        self.adjoints = adjoints
        self.chooses = propagator is None
        self.propagator: Propagator = propagator or Exact()
        self.fallback: int | None = None
        self._every = max(1, num_steps // PROBES)
        self._residuals: list[float] = []

    def trust(self, rule: Rule, transition: Transition, moved: Tree) -> Trust:
        """The trust in the scores of the update that the adjoints stand behind."""
        growth = max(p.growth for p in self.adjoints)
        start = tree.norm(transition.before.params)
        displacement = tree.norm(moved) / start if start > 0.0 else float("inf")
        gap = mismatch(rule, transition)
        return Trust(
            growth, displacement, self.residual, gap, grade_update(growth, self.residual, gap)
        )

    @property
    def residual(self) -> float:
        """The mean over the updates probed so far; nan before the first."""
        return sum(self._residuals) / len(self._residuals) if self._residuals else float("nan")

    def pull(
        self, rule: Rule, transition: Transition, by_example: Tensor | None, ids: Sequence[int]
    ) -> None:
        """p <- M_k^T p for every behaviour, in place; example scores on the way.

        The optimizer's pullback gives the cotangent w of the gradient; then C_k w joins theta's.
        """
        record, before = transition.record, transition.before
        pulled = updates.pullback(
            rule,
            record.groups,
            before.params,
            before.slots,
            clip(transition.grads, record.clip_grad_norm),
            [p.params for p in self.adjoints],
            [p.slots for p in self.adjoints],
        )
        local = LocalLoss(self.problem, transition)
        raw = [clip_derivative(transition.grads, record.clip_grad_norm, w) for _, _, w in pulled]
        if by_example is not None:
            for q, cotangent in enumerate(raw):
                by_example[:, q].index_add_(0, torch.tensor(ids), example_shares(local, cotangent))
        curved = self.propagator.products(local, raw)
        if transition.index % self._every == 0 or not self._residuals:
            self._probe(local, raw, curved)
        if not self.propagator.moves:
            return
        for p, (params, slots, _), bent in zip(self.adjoints, pulled, curved, strict=True):
            p.params = tree.add(params, bent)
            p.slots = {} if record.reset else slots

    def _probe(self, local: LocalLoss, raw: Sequence[Tree], curved: Sequence[Tree]) -> None:
        """Compare one product with the Hessian's one update later; fall back if that is too far."""
        q = max(range(len(raw)), key=lambda q: tree.norm(raw[q]))
        later = local.around(local.transition.after.params)
        try:
            (truth,) = hessian.products(later, later.params, [raw[q]], "reverse-over-reverse")
        except UnsupportedError:
            (truth,) = hessian.products(later, later.params, [raw[q]], "finite-difference")
        size = tree.norm(truth)
        gap = tree.norm(tree.subtract(truth, curved[q]))
        self._residuals.append(gap / size if size > 0.0 else float(gap > 0.0))
        exploded = max(p.growth for p in self.adjoints) > GROWTH_DOUBTFUL
        rough = len(self._residuals) >= SETTLED and self.residual > UPDATE_DOUBTFUL
        if self.chooses and self.fallback is None and (exploded or rough):
            self.propagator, self.fallback = GaussNewton(), local.transition.index


def example_shares(local: LocalLoss, cotangent: Tree) -> Tensor:
    """w . grad l_i / B for every example of the update, float64: one forward-mode product."""
    with differentiable_twice():
        shares = torch.func.jvp(local.example_values, (local.params,), (cotangent,))[1]
    return shares.detach().double().cpu()

"""The update map to second order in the displacement, expanded at the observed parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from culpa import tree
from culpa.dynamics.curvature.third import Third
from culpa.dynamics.local import LocalLoss
from culpa.errors import UnsupportedError
from culpa.tree import Tree


@dataclass(frozen=True)
class SecondOrder:
    """grad L(theta) - grad L(theta - D) = H D - T[D, D] / 2 + O(D^3): ``embed(order=2)``.

    The block form puts the gradient through the optimizer's own rule, so the rule's second
    derivative (Adam's; SGD has none) is in the result, and its higher ones. Better than the first
    order where the displacement is small against the radius in which the loss is nearly cubic, and
    worse outside of it: the terms left out grow with the cube of D and feed on themselves.
    """

    third: Third = field(default_factory=Third)

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return (
            "Zhang, Du, Ma, Lakkaraju, arXiv 2506.00175, Estimator 4.1, to second order; Taylor"
            " mode: Griewank and Walther, Evaluating Derivatives, SIAM 2008, chapter 13"
        )

    @property
    def moves(self) -> bool:
        """See ``Propagator``."""
        return True

    def products(self, local: LocalLoss, vectors: Sequence[Tree]) -> list[Tree]:
        """Refused: a second-order term belongs to a displacement and is not linear in it."""
        raise UnsupportedError(
            "order=2 carries displacements (form='block'): a sum of first-order effects has no"
            " second-order term of its own. Use culpa.embed(..., form='block', order=2)."
        )

    def gradient_difference(self, local: LocalLoss, displacement: Tree) -> Tree:
        """See ``Propagator``."""
        bent, turned = self.third.jet(local, displacement)
        return tree.add(bent, turned, -0.5)

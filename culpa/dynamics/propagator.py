"""How a difference of two trajectories is carried through one update: strategies as objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from culpa import tree
from culpa.dynamics.curvature import hessian
from culpa.dynamics.local import LocalLoss
from culpa.errors import OptionError
from culpa.tree import Tree


@runtime_checkable
class Propagator(Protocol):
    """What an estimator needs to know of the loss at one update."""

    @property
    def citation(self) -> str:
        """The source of the method, for reports."""
        ...

    @property
    def moves(self) -> bool:
        """Whether differences change from update to update at all; if not, M_k is the identity."""
        ...

    def products(self, local: LocalLoss, vectors: Sequence[Tree]) -> list[Tree]:
        """C v at the observed parameters for each vector, C a symmetric stand-in for H_k."""
        ...

    def gradient_difference(self, local: LocalLoss, displacement: Tree) -> Tree:
        """An estimate of grad L(theta_k) - grad L(theta_k - displacement)."""
        ...


POINTS = {
    "observed": (0.0,),
    "midpoint": (0.5,),
    "gauss": (0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6),
}
"""Where along the displacement the curvature is taken, as fractions of it from theta_k."""


CHOSEN = ("auto", "checked-difference")
"""Left open by the user; choice.py decides."""


@dataclass(frozen=True)
class Exact:
    """The Hessian itself: M_k of Estimator 4.1 without approximation.

    Args:
        hvp: how products are computed: ``"reverse-over-reverse"``, ``"forward-over-reverse"``,
            ``"reverse-over-forward"`` (equal but for rounding), ``"finite-difference"`` (central)
            or ``"one-sided-difference"`` (with the gradient that the replay has). ``"auto"`` lets
            ``culpa.attribute`` and ``culpa.embed`` choose an exact way that the model supports.
            ``"checked-difference"``: in attribute, for smooth models, one-sided differences while
            they agree with it; it says the gaps measured. A quarter cheaper in long runs; scores
            are some 1e-3 of the largest off, and more where a kink is hidden. Elsewhere these two
            are reverse-over-reverse.
        at: for embeddings, where the curvature is taken along a displacement D: ``"observed"``
            (theta_k, the paper's), ``"midpoint"`` (theta_k - D/2, exact for cubic losses) or
            ``"gauss"`` (two Gauss points along D, exact for losses of degree five; twice the cost).
    """

    hvp: str = "auto"
    at: str = "observed"

    def __post_init__(self) -> None:
        """Check both options."""
        strategies = (*CHOSEN, *hessian.STRATEGIES)
        if self.hvp not in strategies:
            raise OptionError(
                f"Exact(hvp=...) must be one of {', '.join(strategies)}, got {self.hvp!r}."
            )
        if self.at not in POINTS:
            raise OptionError(f"Exact(at=...) must be one of {', '.join(POINTS)}, got {self.at!r}.")

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return "Zhang, Du, Ma, Lakkaraju, arXiv 2506.00175, Estimator 4.1; Pearlmutter 1994"

    @property
    def moves(self) -> bool:
        """See ``Propagator``."""
        return True

    def products(self, local: LocalLoss, vectors: Sequence[Tree]) -> list[Tree]:
        """See ``Propagator``: H_k v."""
        return hessian.products(local, local.params, vectors, self._strategy)

    def gradient_difference(self, local: LocalLoss, displacement: Tree) -> Tree:
        """See ``Propagator``: the mean of H(theta_k - x D) D over the points x."""
        points = POINTS[self.at]
        total = tree.zeros_like(displacement)
        for x in points:
            at = tree.add(local.params, displacement, -x) if x else local.params
            found = hessian.products(local, at, [displacement], self._strategy)[0]
            total = tree.add(total, found, 1 / len(points))
        return total

    @property
    def _strategy(self) -> str:
        return "reverse-over-reverse" if self.hvp in CHOSEN else self.hvp

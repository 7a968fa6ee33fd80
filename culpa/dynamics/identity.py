"""No propagation: every update's own step is its effect, as in TracIn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from culpa import tree
from culpa.dynamics.local import LocalLoss
from culpa.tree import Tree


@dataclass(frozen=True)
class Identity:
    """M_k = I: what an update did to the parameters is taken to last unchanged to the end.

    The score of update t is grad gamma(theta_K) . (theta_{t+1} - theta_t), and of an example the
    share of its gradient in that step: the path-sum of TracIn with the gradient of the behaviour at
    the end. It answers which examples pull along with the behaviour, and finds poisoned ones well;
    it does not estimate what removing them would do.
    """

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return "Pruthi, Liu, Kale, Sundararajan, Estimating Training Data Influence (TracIn), 2020"

    @property
    def moves(self) -> bool:
        """See ``Propagator``."""
        return False

    def products(self, local: LocalLoss, vectors: Sequence[Tree]) -> list[Tree]:
        """See ``Propagator``: zeros."""
        return [tree.zeros_like(v) for v in vectors]

    def gradient_difference(self, local: LocalLoss, displacement: Tree) -> Tree:
        """See ``Propagator``: zero."""
        return tree.zeros_like(displacement)

"""The secant: the gradient difference itself, estimated on a fraction of the recorded batch.

g(theta) - g(theta - D) is the integral of H D along the displacement; a Hessian product replaces
that integral by its value at one end. On the same rows for both gradients the difference is a
control variate: its noise shrinks with D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from culpa import tree
from culpa.dynamics.local import LocalLoss
from culpa.errors import OptionError, UnsupportedError
from culpa.tree import Tree


@dataclass(frozen=True)
class Secant:
    """Carry embeddings by gradient differences on a random fraction of each batch.

    Args:
        fraction: of the rows of every micro-batch, in (0, 1]. 1 is exact replay of the
            counterfactual up to rounding; below 1 the cost is 2 ``fraction`` gradients an update.
            The loss must then be a mean over rows.
        seed: of the choice of rows.
    """

    fraction: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fraction."""
        if not 0 < self.fraction <= 1:
            raise OptionError(
                f"Secant(fraction) takes a fraction of each batch in (0, 1], got {self.fraction}."
            )

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return (
            "gradient differences on the same rows (control variate): Johnson and Zhang, "
            "Accelerating Stochastic Gradient Descent using Predictive Variance Reduction, 2013"
        )

    @property
    def moves(self) -> bool:
        """See ``Propagator``."""
        return True

    def products(self, local: LocalLoss, vectors: Sequence[Tree]) -> list[Tree]:
        """Refused: a secant belongs to a displacement, and single scores have none."""
        raise UnsupportedError(
            "Secant carries stage displacements (culpa.embed with form='block'); the scores of"
            " single updates and the additive form need a linear propagator such as culpa.Exact()."
        )

    def gradient_difference(self, local: LocalLoss, displacement: Tree) -> Tree:
        """See ``Propagator``."""
        shifted = tree.subtract(local.params, displacement)
        if self.fraction == 1:
            return tree.subtract(local.grads, local.gradient(shifted))
        sampled = local.on_rows(self._rows(local))
        return tree.subtract(sampled.gradient(local.params), sampled.gradient(shifted))

    def _rows(self, local: LocalLoss) -> list[list[int]]:
        """The rows of each micro-batch, the same for every stage and every repetition."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + local.transition.index)
        chosen: list[list[int]] = []
        for count in local.row_counts():
            wanted = max(1, math.ceil(self.fraction * count))
            order = torch.randperm(count, generator=generator)[:wanted]
            chosen.append(sorted(order.tolist()))
        return chosen

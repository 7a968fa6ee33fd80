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

from culpa.dynamics.local import LocalLoss
from culpa.errors import OptionError, UnsupportedError
from culpa.tree import Tree


@dataclass(frozen=True)
class Secant:
    """Carry embeddings by gradient differences on a random fraction of each batch.

    Args:
        fraction: of the rows of every micro-batch, in (0, 1]. 1 is exact replay of the
            counterfactual up to rounding; below 1 the cost is ``fraction`` gradients an update and
            stage, and once more an update for all stages together. The loss must then be a mean
            over rows: BatchNorm, which normalises by the rows at hand, is refused.
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
        shifted = local.away(displacement)
        if self.fraction == 1:
            return _less(local.grads, local.gradient(shifted))
        sampled, observed = local.once(self, lambda: self._sampled(local))
        return _less(observed, sampled.gradient(shifted))

    def _sampled(self, local: LocalLoss) -> tuple[LocalLoss, Tree]:
        """The loss on the rows chosen, and its gradient at theta_k: the same for every stage."""
        if local.normalises_by_batch:
            raise UnsupportedError(
                f"Secant({self.fraction}) takes a fraction of each batch, and BatchNorm in training"
                " mode would normalise by that fraction only, which is another loss. Use"
                " culpa.Secant(1), which costs as much as a replay, or a Hessian propagator such as"
                " culpa.Exact(at='gauss')."
            )
        sampled = local.on_rows(self._rows(local))
        return sampled, sampled.gradient(local.params)

    def _rows(self, local: LocalLoss) -> list[list[int]]:
        """The rows of each micro-batch, the same for every stage and every repetition."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + local.transition.index)
        chosen: list[list[int]] = []
        for count in local.row_counts():
            wanted = max(1, math.ceil(self.fraction * count))
            order = torch.randperm(count, generator=generator)[:wanted]
            chosen.append(sorted(order.tolist()))
        return chosen


def _less(observed: Tree, found: Tree) -> Tree:
    """``observed - found``, written into ``found``, which nobody else holds."""
    for name, value in found.items():
        if name in observed:
            torch.sub(observed[name], value, out=value)
        else:
            value.neg_()
    return found

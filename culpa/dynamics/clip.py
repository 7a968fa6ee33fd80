"""Gradient clipping by global norm, as ``torch.nn.utils.clip_grad_norm_``, and its derivative.

g' = c g with c = min(1, m / (||g|| + 1e-6)). Where it clips, the derivative along d is
c d - g (g . d) c^2 / (m ||g||), a symmetric map: one function serves both directions.
"""

from __future__ import annotations

from culpa import tree
from culpa.tree import Tree

EPSILON = 1e-6
"""torch's own."""


def clip(grads: Tree, max_norm: float | None) -> Tree:
    """The clipped gradients; ``None`` clips nothing."""
    if max_norm is None:
        return grads
    factor = max_norm / (tree.norm(grads) + EPSILON)
    return grads if factor >= 1.0 else tree.scale(factor, grads)


def derivative(grads: Tree, max_norm: float | None, direction: Tree) -> Tree:
    """The derivative of ``clip`` at ``grads`` applied to ``direction`` (its own transpose)."""
    if max_norm is None:
        return direction
    size = tree.norm(grads)
    factor = max_norm / (size + EPSILON)
    if factor >= 1.0:
        return direction
    along = tree.dot(grads, direction) * factor / (size * (size + EPSILON))
    return tree.subtract(tree.scale(factor, direction), tree.scale(along, grads))

"""Gradient clipping as ``torch.nn.utils`` does it, and its derivative.

By global norm (``clip_grad_norm_``): g' = c g with c = min(1, m / (||g|| + 1e-6)). Where it clips,
the derivative along d is c d - g (g . d) c^2 / (m ||g||).

By value (``clip_grad_value_``): every entry is brought into [-m, m]; the derivative keeps the
entries of d where it was inside, and is zero where it was cut. (At exactly +-m, where there is no
derivative, the entry is kept.)

Both derivatives are symmetric maps: one function serves both directions.
"""

from __future__ import annotations

import torch

from culpa import tree
from culpa.trajectory.schema import StepRecord
from culpa.tree import Tree

EPSILON = 1e-6
"""torch's own."""


def clip(grads: Tree, record: StepRecord) -> Tree:
    """The gradients of an update, clipped as its loop did."""
    if record.clip_grad_value is not None:
        bound = record.clip_grad_value
        return tree.map_values(lambda g: g.clamp(-bound, bound), grads)
    if record.clip_grad_norm is None:
        return grads
    factor = record.clip_grad_norm / (tree.norm(grads) + EPSILON)
    return grads if factor >= 1.0 else tree.scale(factor, grads)


def derivative(grads: Tree, record: StepRecord, direction: Tree) -> Tree:
    """The derivative of ``clip`` at ``grads`` applied to ``direction`` (its own transpose)."""
    if record.clip_grad_value is not None:
        bound = record.clip_grad_value
        return {n: torch.where(grads[n].abs() <= bound, d, 0.0) for n, d in direction.items()}
    if record.clip_grad_norm is None:
        return direction
    size = tree.norm(grads)
    factor = record.clip_grad_norm / (size + EPSILON)
    if factor >= 1.0:
        return direction
    along = tree.dot(grads, direction) * factor / (size * (size + EPSILON))
    return tree.add(tree.scale(factor, direction), grads, -along)

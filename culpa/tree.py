"""Arithmetic on ``dict[str, Tensor]``: the vectors of this library, keyed by parameter name.

A missing key is a zero tensor: an optimizer's slot that does not exist yet is the zero of its
space, and every function here treats it so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tree = dict[str, Tensor]
"""Tensors by name."""
Slots = dict[str, Tree]
"""An optimizer's state: slot name (``"momentum_buffer"``, ``"exp_avg"``, ...) -> tensors by name."""


def clone(tree: Mapping[str, Tensor]) -> Tree:
    """Detached copies that share no memory with ``tree``."""
    return {name: value.detach().clone() for name, value in tree.items()}


def clone_slots(slots: Mapping[str, Mapping[str, Tensor]]) -> Slots:
    """Detached copies of an optimizer's slots."""
    return {slot: clone(tree) for slot, tree in slots.items()}


def zeros_like(tree: Mapping[str, Tensor]) -> Tree:
    """Zeros of the same shapes and dtypes."""
    return {name: torch.zeros_like(value) for name, value in tree.items()}


def map_values(function: Callable[[Tensor], Tensor], tree: Mapping[str, Tensor]) -> Tree:
    """Apply ``function`` to every tensor."""
    return {name: function(value) for name, value in tree.items()}


def _names(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterable[str]:
    return list(a) + [name for name in b if name not in a]


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """a + b."""
    return {n: a[n] + b[n] if n in a and n in b else a.get(n, b.get(n)) for n in _names(a, b)}  # type: ignore[misc]


def subtract(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """a - b."""
    return {n: a[n] - b[n] if n in a and n in b else (a[n] if n in a else -b[n]) for n in _names(a, b)}


def scale(factor: float, tree: Mapping[str, Tensor]) -> Tree:
    """factor * tree."""
    return {name: factor * value for name, value in tree.items()}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """<a, b>, accumulated in float64 whatever the dtype of the tensors."""
    return math.fsum(
        float(torch.dot(a[n].reshape(-1).double(), b[n].reshape(-1).double())) for n in a if n in b
    )


def norm(tree: Mapping[str, Tensor]) -> float:
    """Euclidean norm, accumulated in float64."""
    return math.sqrt(max(0.0, dot(tree, tree)))


def is_finite(tree: Mapping[str, Tensor]) -> bool:
    """Whether every entry of every tensor is finite."""
    return all(bool(torch.isfinite(value).all()) for value in tree.values())

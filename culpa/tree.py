"""Arithmetic on ``dict[str, Tensor]``: the vectors of this library, keyed by parameter name.

A missing key is a zero tensor: an optimizer's slot that does not exist yet is the zero of its
space, and every function here treats it so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tree = dict[str, Tensor]
"""Tensors by name."""
Slots = dict[str, Tree]
"""An optimizer's state: slot name (such as ``"momentum_buffer"``) -> tensors by name."""


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


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """a + b."""
    if a.keys() == b.keys():
        return {name: value + b[name] for name, value in a.items()}
    both = {name: a[name] + b[name] for name in a if name in b}
    return {**b, **a, **both}


def subtract(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """a - b."""
    if a.keys() == b.keys():
        return {name: value - b[name] for name, value in a.items()}
    both = {name: a[name] - b[name] for name in a if name in b}
    return {**{name: -b[name] for name in b if name not in a}, **a, **both}


def scale(factor: float, tree: Mapping[str, Tensor]) -> Tree:
    """factor * tree."""
    return {name: factor * value for name, value in tree.items()}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """<a, b>, accumulated in float64 whatever the dtype of the tensors."""
    return math.fsum(float(torch.dot(_flat(a[n]), _flat(b[n]))) for n in a if n in b)


def _flat(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).double()


def norm(tree: Mapping[str, Tensor]) -> float:
    """Euclidean norm, accumulated in float64; nan if anything is."""
    return math.sqrt(max(dot(tree, tree), 0.0))


def is_finite(tree: Mapping[str, Tensor]) -> bool:
    """Whether every entry of every tensor is finite."""
    return all(bool(torch.isfinite(value).all()) for value in tree.values())

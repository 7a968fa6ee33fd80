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
BLOCK = 2**16
"""Numbers that inner products take at a time: they stay in the processor's cache."""
_WIDE = (torch.float32, torch.float64)
_SAFE = (1e-24, 1e24)


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
    """<a, b>: blocks of ``BLOCK`` numbers in their own dtype, half precision in float64.

    The blocks are added up in float64. Rounding: some 1e-8 of ||a|| ||b|| in float32. The memory
    of a whole tensor in float64 takes forty times as long as the sum itself.
    """
    return math.fsum([part for n in a if n in b for part in _blocks(a[n], b[n])])


def _blocks(a: Tensor, b: Tensor, exact: bool = False) -> list[float]:
    left, right = a.detach().reshape(-1), b.detach().reshape(-1)
    if exact or left.dtype != right.dtype or left.dtype not in _WIDE:
        pairs = zip(left.split(BLOCK), right.split(BLOCK), strict=True)
        return [torch.dot(x.double(), y.double()).item() for x, y in pairs]
    if left.numel() <= BLOCK:
        return [torch.dot(left, right).item()]
    pairs = zip(left.split(BLOCK), right.split(BLOCK), strict=True)
    return [torch.dot(x, y).item() for x, y in pairs]


def norm(tree: Mapping[str, Tensor]) -> float:
    """Euclidean norm, as exact as ``dot``; nan if anything is."""
    square = dot(tree, tree)
    if not _SAFE[0] < square < _SAFE[1]:  # squares in float32 end where their roots do not
        square = math.fsum([x for v in tree.values() for x in _blocks(v, v, exact=True)])
    return math.sqrt(max(square, 0.0))


def is_finite(tree: Mapping[str, Tensor]) -> bool:
    """Whether every entry of every tensor is finite."""
    return all(bool(torch.isfinite(value).all()) for value in tree.values())

"""Arithmetic on ``dict[str, Tensor]``: the vectors of this library, keyed by parameter name.

A missing key is a zero tensor: an optimizer's slot that does not exist yet is the zero of its
space, and every function here treats it so.

Of processes that hold a part of every tensor each, inner products and norms are those of the whole:
see ``parts_of_a_whole``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Tree = dict[str, Tensor]
"""Tensors by name."""
Slots = dict[str, Tree]
"""An optimizer's state: slot name (such as ``"momentum_buffer"``) -> tensors by name."""
BLOCK = 2**20
"""Numbers that inner products take at a time; cutting tensors up costs as much as smaller ones."""
SMALL = 2**16
"""The same where they are turned into float64 first, which is to stay in the processor's cache."""
_WIDE = (torch.float32, torch.float64)
_SAFE = (1e-24, 1e24)
Reduce = Callable[[float], float]
_total: ContextVar[Reduce] = ContextVar("sum over processes", default=float)
_most: ContextVar[Reduce] = ContextVar("largest of all processes", default=float)


@contextmanager
def parts_of_a_whole(total: Reduce, most: Reduce) -> Generator[None]:
    """Inside, trees are parts of those that several processes hold together.

    Args:
        total, most: the sum and the largest of what the processes pass, each of which must call it.
    """
    tokens = _total.set(total), _most.set(most)
    try:
        yield
    finally:
        _total.reset(tokens[0])
        _most.reset(tokens[1])


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


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], factor: float = 1.0) -> Tree:
    """a + factor * b."""
    alpha = int(factor) if factor in (1.0, -1.0) else factor  # integers take no other
    both = {name: torch.add(a[name], b[name], alpha=alpha) for name in a if name in b}
    if len(both) == len(a) == len(b):
        return both
    return {**(b if factor == 1.0 else scale(factor, b)), **a, **both}


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
    parts: list[float] = []
    for name, left in a.items():
        if name in b:
            parts += _blocks(left, b[name])
    return _total.get()(math.fsum(parts))


def _blocks(a: Tensor, b: Tensor, exact: bool = False) -> list[float]:
    left = _flat(a)
    right = left if b is a else _flat(b)
    if exact or left.dtype != right.dtype or left.dtype not in _WIDE:
        pairs = zip(left.split(SMALL), right.split(SMALL), strict=True)
        return [torch.dot(x.double(), y.double()).item() for x, y in pairs]
    if left.numel() <= BLOCK:
        return [torch.dot(left, right).item()]
    pairs = zip(left.split(BLOCK), right.split(BLOCK), strict=True)
    return [torch.dot(x, y).item() for x, y in pairs]


def _flat(value: Tensor) -> Tensor:
    # Of small tensors each call takes as long as the sum: none that is not needed.
    bare = value.detach() if value.requires_grad else value
    return bare if bare.ndim == 1 else bare.reshape(-1)


def norm(tree: Mapping[str, Tensor]) -> float:
    """Euclidean norm, as exact as ``dot``; nan if anything is."""
    square = dot(tree, tree)
    if not _SAFE[0] < square < _SAFE[1]:  # squares in float32 end where their roots do not
        own = math.fsum([x for v in tree.values() for x in _blocks(v, v, exact=True)])
        square = _total.get()(own)
    return math.sqrt(max(square, 0.0))


def largest(tree: Mapping[str, Tensor]) -> float:
    """The largest absolute value of all entries."""
    own = (float(value.detach().abs().max()) for value in tree.values() if value.numel())
    return _most.get()(max(own, default=0.0))


def is_finite(tree: Mapping[str, Tensor]) -> bool:
    """Whether every entry of every tensor is finite."""
    finite = all(bool(torch.isfinite(value).all()) for value in tree.values())
    return _total.get()(0.0 if finite else 1.0) == 0.0

"""The form of a batch: all of it but the bytes of its tensors.

Most batches of a training run look alike, so that of a plain tuple, list or dictionary of tensors
is worked out once for every combination of shapes and places in memory.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from culpa.errors import RecordError
from culpa.trajectory.digest import dtype_name
from culpa.trajectory.layout import (
    DEVICES,
    DTYPES,
    MAX_DEPTH,
    ArrayNode,
    DictNode,
    Layout,
    ListNode,
    Node,
    TensorNode,
    TupleNode,
    ValueNode,
    without_first_dimension,
)
from culpa.trajectory.schema import Placement

ALIGNMENT = 64
"""Addresses count modulo this many bytes."""


@dataclass(frozen=True)
class Form:
    """What batches of one signature have in common: all but their bytes."""

    layout: Layout
    json: bytes
    placements: tuple[Placement, ...]


_known: dict[Hashable, Form] = {}
MOST_FORMS = 1024


def form_of(batch: Any, leaves: list[Tensor]) -> Form:
    """A batch's form; its tensors are appended to ``leaves``.

    Raises:
        RecordError: on a leaf that is neither tensor, array, number, string, bool nor ``None``.
    """
    signature = _signature(batch, leaves)
    form = None if signature is None else _known.get(signature)
    if form is None:
        leaves.clear()
        form = _work_out(batch, leaves)
        if signature is not None:
            if len(_known) >= MOST_FORMS:
                _known.clear()
            _known[signature] = form
    return form


def _signature(batch: Any, leaves: list[Any]) -> Hashable | None:
    """What a ``Form`` follows from, for a tuple, list or dictionary of tensors on the CPU.

    ``None``: the batch is something else, and has to be looked at closely. Gathers the tensors.
    """
    kind: Any = type(batch)
    if kind is dict:
        kind = tuple(batch)
        if not all(type(key) is str for key in kind):
            return None
        leaves += batch.values()
    elif kind is tuple or kind is list:
        leaves += batch
    else:
        return None
    facts: list[Hashable] = []
    for leaf in leaves:
        if type(leaf) is not Tensor or leaf.layout is not torch.strided or not leaf.is_cpu:
            return None
        facts.append((leaf.dtype, leaf.shape, leaf.stride(), leaf.data_ptr() % ALIGNMENT))
    return kind, *facts


def _work_out(batch: Any, leaves: list[Tensor]) -> Form:
    root = describe(batch, leaves, "batch")
    sizes = {leaf.shape[0] if leaf.ndim else -1 for leaf in leaves}
    per_row = len(sizes) == 1 and min(sizes) > 0
    if per_row:
        root = without_first_dimension(root)
    placements = tuple(_placement(leaf) for leaf in leaves)
    size = sum(leaf.nbytes for leaf in leaves)
    if _spread(placements, leaves) > most_spread(size):
        raise RecordError(
            f"a batch's tensors are views that spread {size} bytes over"
            f" {_spread(placements, leaves)}, which a replay would have to allocate. Let the"
            " loader yield them .contiguous()."
        )
    usual = [(0, leaf.contiguous().stride()) for leaf in leaves]
    layout = Layout(per_row, root)
    return Form(layout, layout.encode(), () if [*placements] == usual else placements)


def describe(value: Any, leaves: list[Tensor], where: str, depth: int = 0) -> Node:
    """The nesting of a batch; ``where`` names the value in messages."""
    if depth > MAX_DEPTH:
        raise RecordError(f"a batch nests deeper than {MAX_DEPTH} levels; let it be flatter.")
    if isinstance(value, Tensor):
        if value.device.type not in DEVICES:
            raise RecordError(
                f"{where} is on {value.device.type!r}; batches can be on {', '.join(DEVICES)}."
            )
        if dtype_name(value.dtype) not in DTYPES:
            raise RecordError(f"{where} has the dtype {value.dtype}, which cannot be kept.")
        leaves.append(value.detach())
        return TensorNode(dtype_name(value.dtype), tuple(value.shape), value.device.type)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        array = cast("np.ndarray[Any, Any]", value)
        leaves.append(torch.from_numpy(np.ascontiguousarray(array)))
        return ArrayNode(dtype_name(leaves[-1].dtype), tuple(array.shape), "cpu")
    if _is_plain(value):
        return ValueNode(value)
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        if not all(isinstance(key, str) for key in mapping):
            raise RecordError(
                f"{where} is a dictionary with keys that are not strings; name its entries."
            )
        items = [
            describe(item, leaves, f"{where}[{key!r}]", depth + 1) for key, item in mapping.items()
        ]
        return DictNode(tuple(mapping), tuple(items))
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        sequence = cast("Sequence[Any]", value)
        items = [
            describe(item, leaves, f"{where}[{i}]", depth + 1) for i, item in enumerate(sequence)
        ]
        return ListNode(tuple(items)) if isinstance(value, list) else TupleNode(tuple(items))
    raise RecordError(
        f"{where} is a {type(value).__name__}, which culpa cannot keep without executing code to "
        "read it back. Let the loader yield tuples, lists or dictionaries of tensors, arrays, "
        "numbers and strings."
    )


def _is_plain(value: Any) -> TypeGuard[bool | int | float | str | None]:
    """Whether JSON holds the value exactly, as every reader understands it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, str)


def _placement(leaf: Tensor) -> Placement:
    """Address and strides; the strides of a copy where elements of the tensor share memory."""
    address = leaf.data_ptr() % ALIGNMENT if leaf.device.type == "cpu" else 0
    reach = 0  # the farthest element so far: the next larger stride must exceed it
    for dim in sorted(range(leaf.ndim), key=leaf.stride):
        if leaf.shape[dim] > 1 and leaf.stride(dim) <= reach:
            return address, leaf.contiguous().stride()
        reach += leaf.stride(dim) * (leaf.shape[dim] - 1)
    return address, leaf.stride()


def most_spread(size: int) -> int:
    """How much memory the tensors of a batch of ``size`` bytes may be spread over by strides."""
    return 64 * size + 2**28


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """From the first to the last element of a tensor in memory, in elements."""
    return 1 + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True)) if all(shape) else 1


def _spread(placements: Sequence[Placement], leaves: Sequence[Tensor]) -> int:
    return sum(
        extent(leaf.shape, strides) * leaf.element_size()
        for (_, strides), leaf in zip(placements, leaves, strict=True)
    )

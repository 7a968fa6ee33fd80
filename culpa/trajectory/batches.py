"""Batches as rows: any nesting of tuples, lists and dictionaries of tensors, taken apart and back.

A batch whose tensors share their first dimension is a list of examples: each row's bytes are kept
once, whatever the epochs. Any other batch is kept as one row. The layout (the nesting, dtypes and
row shapes, and plain values such as ``None``, numbers and strings) is data, not code: reading it
back executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from culpa.errors import IntegrityError, UnsupportedError
from culpa.trajectory.digest import raw_bytes
from culpa.trajectory.forms import (
    ALIGNMENT,
    Form,
    describe,
    extent,
    form_of,
    most_spread,
)
from culpa.trajectory.gather import Columns, Matrix, Rows
from culpa.trajectory.layout import (
    ArrayNode,
    DictNode,
    Layout,
    ListNode,
    Node,
    TensorNode,
    ValueNode,
    dtype_of,
    leaves_of,
    row_bytes,
)
from culpa.trajectory.recognition import joined
from culpa.trajectory.schema import Placement


@dataclass(frozen=True)
class EncodedBatch:
    """A batch taken apart: its form, and its tensors on the CPU."""

    form: Form
    leaves: list[Tensor]
    prepared: Sequence[Rows] | None = None

    @property
    def layout(self) -> Layout:
        """Its nesting."""
        return self.form.layout

    @property
    def columns(self) -> Sequence[Rows]:
        """Of each tensor its part of the rows, uint8 ``[rows, bytes]``, without copies."""
        # Prepared, as even a view of a tensor lets go of Python's lock, and the writer asks.
        return columns_of(self.form, self.leaves) if self.prepared is None else self.prepared

    @cached_property
    def rows(self) -> Rows:
        """uint8 ``[rows, bytes per row]``."""
        return joined(self.columns)


def columns_of(form: Form, leaves: Sequence[Tensor]) -> list[Rows]:
    """``EncodedBatch.columns``; ``[zeros (1, 0)]`` of a batch without tensors."""
    count = leaves[0].shape[0] if form.layout.per_row else 1
    found = [np.frombuffer(raw_bytes(leaf), dtype=np.uint8).reshape(count, -1) for leaf in leaves]
    return found or [np.zeros((1, 0), dtype=np.uint8)]


def encode(batch: Any) -> EncodedBatch:
    """Take a batch apart; its tensors are not copied, if they are on the CPU.

    Args:
        batch: any nesting of tuples, lists and dictionaries of tensors, arrays and plain values.

    Raises:
        RecordError: on a leaf that is neither tensor, array, number, string, bool nor ``None``.
    """
    leaves: list[Tensor] = []
    form = form_of(batch, leaves)
    return EncodedBatch(
        form, [leaf.detach() if leaf.is_cpu else leaf.detach().cpu() for leaf in leaves]
    )


def _placed(value: Tensor, placement: Placement) -> Tensor:
    """A copy of ``value`` that lies in memory as the recorded tensor did."""
    address, strides = placement
    size = value.element_size()
    span = extent(value.shape, strides)
    memory = torch.empty(span * size + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (address - memory.data_ptr()) % ALIGNMENT
    flat = memory[start : start + span * size].view(value.dtype)
    return flat.as_strided(tuple(value.shape), strides).copy_(value)


def decode(layout: Layout, rows: Rows | Columns, placements: Sequence[Placement] = ()) -> Any:
    """The batch again, from its layout and rows, such as uint8 ``[rows, bytes per row]``."""
    columns = Matrix(rows) if isinstance(rows, np.ndarray) else rows
    expected, leaves = _leaves(layout)
    if placements and len(placements) != len(leaves):
        raise IntegrityError(f"a batch of {len(leaves)} tensors has {len(placements)} placements.")
    if not layout.per_row and columns.count != 1:
        raise IntegrityError(f"a batch that is one row has {columns.count}.")
    if columns.width != expected:
        raise IntegrityError(
            f"the rows of a batch have {columns.width} bytes; their layout says {expected}."
        )
    read, left = list[Any](), most_spread(columns.count * columns.width)
    for at, leaf in enumerate(leaves):
        value = leaf.value(columns, layout.per_row)
        if placements:
            left -= leaf.require_placed(value, placements[at], left)
            value = _placed(value, placements[at])
        read.append(leaf.delivered(value))
    return _nested(layout.root, iter(read))


@dataclass(frozen=True)
class _Leaf:
    """A tensor or array of a layout: the bytes ``[start, stop)`` of every row."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str
    array: bool

    def value(self, columns: Columns, per_row: bool) -> Tensor:
        """Its elements, contiguous, on the CPU."""
        shape = (columns.count, *self.shape) if per_row else self.shape
        if not columns.count or self.start == self.stop:
            return torch.empty(shape, dtype=self.dtype)
        flat = columns.column(self.start, self.stop)
        if self.dtype is torch.bool and int(flat.max()) > 1:
            raise IntegrityError("a batch holds a bool that is neither 0 nor 1.")
        return flat.view(self.dtype).reshape(shape)

    def require_placed(self, value: Tensor, placement: Placement, left: int) -> int:
        """The bytes its placement spreads over, once that fits it and what is ``left`` for all."""
        address, strides = placement
        size = value.element_size()
        if (
            len(strides) != value.ndim
            or min(strides, default=0) < 0
            or not 0 <= address < ALIGNMENT
            or address % size
        ):
            raise IntegrityError(
                f"a batch's placement {placement} does not fit {tuple(value.shape)}."
            )
        spread = extent(value.shape, strides) * size
        if spread > left:
            raise IntegrityError(
                f"a batch's strides {strides} would need far more memory than its rows have."
            )
        return spread

    def delivered(self, value: Tensor) -> Any:
        """As the loader yielded it: an array, or where it was."""
        if self.array:
            return value.numpy()
        if self.device == "cpu":
            return value
        try:
            return value.to(self.device)
        except Exception as error:  # each backend fails in its own way
            raise UnsupportedError(
                f"a batch was recorded on {self.device!r}, which is not here: {error}."
            ) from error


@lru_cache(maxsize=1024)
def _leaves(layout: Layout) -> tuple[int, tuple[_Leaf, ...]]:
    """The bytes of a row, and what lies where in it, in the order in which it was written."""
    found, at = list[_Leaf](), 0
    for node in leaves_of(layout.root):
        size = row_bytes(node)
        array = isinstance(node, ArrayNode)
        found.append(_Leaf(at, at + size, dtype_of(node), node.shape, node.device, array))
        at += size
    return at, tuple(found)


def _nested(node: Node, leaves: Iterator[Any]) -> Any:
    if isinstance(node, TensorNode):
        return next(leaves)
    if isinstance(node, ValueNode):
        return node.value
    items = [_nested(item, leaves) for item in node.items]
    if isinstance(node, DictNode):
        return dict(zip(node.keys, items, strict=True))
    return items if isinstance(node, ListNode) else tuple(items)


def row_count(batch: Any) -> int:
    """How many rows a batch of examples has; 0 for a batch without a common first dimension."""
    leaves: list[Tensor] = []
    describe(batch, leaves, "batch")
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 else 0


def take_rows(batch: Any, index: Tensor) -> Any:
    """Some rows of a batch of examples, in the same nesting."""
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)]
    if isinstance(batch, np.ndarray):
        return cast("np.ndarray[Any, Any]", batch)[index.numpy()]
    if isinstance(batch, Mapping):
        return {k: take_rows(v, index) for k, v in cast("Mapping[str, Any]", batch).items()}
    if isinstance(batch, (list, tuple)):
        taken = [take_rows(item, index) for item in cast("Sequence[Any]", batch)]
        return taken if isinstance(batch, list) else tuple(taken)
    return batch

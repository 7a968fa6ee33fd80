"""Batches as rows: any nesting of tuples, lists and dictionaries of tensors, taken apart and back.

A batch whose tensors share their first dimension is a list of examples: each row's bytes are kept
once, whatever the epochs. Any other batch is kept as one row. The layout (the nesting, dtypes and
row shapes, and plain values such as ``None``, numbers and strings) is data, not code: reading it
back executes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from culpa.errors import IntegrityError, UnsupportedError
from culpa.trajectory.digest import raw_bytes
from culpa.trajectory.forms import (
    ALIGNMENT,
    Form,
    Placement,
    describe,
    extent,
    form_of,
    most_spread,
)
from culpa.trajectory.layout import (
    ArrayNode,
    DictNode,
    Layout,
    Leaf,
    ListNode,
    Node,
    TensorNode,
    ValueNode,
    dtype_of,
    leaf_count,
    row_bytes,
)

Rows = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EncodedBatch:
    """A batch taken apart: its form, and its tensors on the CPU."""

    form: Form
    leaves: list[Tensor]

    @property
    def layout(self) -> Layout:
        """Its nesting."""
        return self.form.layout

    @cached_property
    def rows(self) -> Rows:
        """uint8 ``[rows, bytes per row]``."""
        count = self.leaves[0].shape[0] if self.form.layout.per_row else 1
        parts = [
            np.frombuffer(raw_bytes(leaf), dtype=np.uint8).reshape(count, -1)
            for leaf in self.leaves
        ]
        return np.concatenate(parts, axis=1) if parts else np.zeros((1, 0), dtype=np.uint8)


def encode(batch: Any, *, copy: bool = False) -> EncodedBatch:
    """Take a batch apart.

    Args:
        batch: any nesting of tuples, lists and dictionaries of tensors, arrays and plain values.
        copy: take copies of its tensors, so that the loop may reuse them before ``rows`` is asked.

    Raises:
        RecordError: on a leaf that is neither tensor, array, number, string, bool nor ``None``.
    """
    leaves: list[Tensor] = []
    form = form_of(batch, leaves)
    held = [leaf.detach() if leaf.is_cpu else leaf.detach().cpu() for leaf in leaves]
    return EncodedBatch(form, [leaf.clone() for leaf in held] if copy else held)


def _placed(value: Tensor, placement: Placement) -> Tensor:
    """A copy of ``value`` that lies in memory as the recorded tensor did."""
    address, strides = placement
    size = value.element_size()
    span = extent(value.shape, strides)
    memory = torch.empty(span * size + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (address - memory.data_ptr()) % ALIGNMENT
    flat = memory[start : start + span * size].view(value.dtype)
    return flat.as_strided(tuple(value.shape), strides).copy_(value)


def decode(layout: Layout, rows: Rows, placements: Sequence[Placement] = ()) -> Any:
    """The batch again, from its layout and rows uint8 ``[rows, bytes per row]``."""
    expected, count = row_bytes(layout.root), leaf_count(layout.root)
    if placements and len(placements) != count:
        raise IntegrityError(f"a batch of {count} tensors has {len(placements)} placements.")
    if not layout.per_row and len(rows) != 1:
        raise IntegrityError(f"a batch that is one row has {len(rows)}.")
    if rows.shape[1] != expected:
        raise IntegrityError(
            f"the rows of a batch have {rows.shape[1]} bytes; their layout says {expected}."
        )
    return _Reader(layout, rows, placements).read(layout.root)


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


class _Reader:
    """Consumes the columns of a row matrix in the order in which the leaves were written."""

    def __init__(self, layout: Layout, rows: Rows, placements: Sequence[Placement]) -> None:
        self.per_row = layout.per_row
        self.placements = list(placements)
        self.placed = bool(placements)
        self.rows = rows
        self.at = 0
        self.left = most_spread(rows.nbytes)

    def read(self, node: Node) -> Any:
        if isinstance(node, (TensorNode, ArrayNode)):
            return self._leaf(node)
        if isinstance(node, ValueNode):
            return node.value
        items = [self.read(item) for item in node.items]
        if isinstance(node, DictNode):
            return dict(zip(node.keys, items, strict=True))
        return items if isinstance(node, ListNode) else tuple(items)

    def _leaf(self, node: Leaf) -> Any:
        size = row_bytes(node)
        column = np.ascontiguousarray(self.rows[:, self.at : self.at + size])
        self.at += size
        shape = (len(self.rows), *node.shape) if self.per_row else node.shape
        flat, dtype = torch.from_numpy(column.reshape(-1)), dtype_of(node)
        if dtype is torch.bool and flat.numel() and int(flat.max()) > 1:
            raise IntegrityError("a batch holds a bool that is neither 0 nor 1.")
        value = flat.view(dtype).reshape(shape) if flat.numel() else torch.empty(shape, dtype=dtype)
        # A copy in either case: memory that torch allocates is aligned, NumPy's is not.
        value = _placed(value, self._placement(value)) if self.placed else value.clone()
        if isinstance(node, ArrayNode):
            return value.numpy()
        if node.device == "cpu":
            return value
        try:
            return value.to(node.device)
        except Exception as error:  # each backend fails in its own way
            raise UnsupportedError(
                f"a batch was recorded on {node.device!r}, which is not here: {error}."
            ) from error

    def _placement(self, value: Tensor) -> Placement:
        """The next placement, once it fits the tensor and what memory is left for them all."""
        address, strides = placement = self.placements.pop(0)
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
        self.left -= extent(value.shape, strides) * size
        if self.left < 0:
            raise IntegrityError(
                f"a batch's strides {strides} would need far more memory than its rows have."
            )
        return placement

"""Batches as rows: any nesting of tuples, lists and dictionaries of tensors, taken apart and back.

A batch whose tensors share their first dimension is a list of examples: each row's bytes are kept
once, whatever the epochs. Any other batch is kept as one row. The layout (the nesting, dtypes and
row shapes, and plain values such as ``None``, numbers and strings) is data, not code: reading it
back executes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from culpa.errors import IntegrityError, RecordError, UnsupportedError
from culpa.trajectory.digest import dtype_name, raw_bytes
from culpa.trajectory.layout import (
    DEVICES,
    DTYPES,
    MAX_DEPTH,
    ArrayNode,
    DictNode,
    Layout,
    Leaf,
    ListNode,
    Node,
    TensorNode,
    TupleNode,
    ValueNode,
    dtype_of,
    leaves_of,
    row_bytes,
    without_first_dimension,
)

Rows = npt.NDArray[np.uint8]
Placement = tuple[int, tuple[int, ...]]
"""Where a tensor lay: its address modulo ``ALIGNMENT``, and its strides in elements."""
ALIGNMENT = 64


@dataclass(frozen=True)
class EncodedBatch:
    """A batch taken apart: its layout and its rows, uint8 ``[rows, bytes per row]``.

    ``placements`` has an entry for every tensor, or none where all are contiguous and aligned as
    new tensors are. Kernels choose their order of summation by strides and alignment: without
    them a replay of a batch that was a view would differ in the last bits.
    """

    layout: Layout
    rows: Rows
    placements: tuple[Placement, ...] = ()


def encode(batch: Any) -> EncodedBatch:
    """Take a batch apart; its tensors are copied, so the loop may reuse them.

    Raises:
        RecordError: on a leaf that is neither tensor, array, number, string, bool nor ``None``.
    """
    leaves: list[Tensor] = []
    root = _describe(batch, leaves, "batch")
    sizes = {leaf.shape[0] if leaf.ndim else -1 for leaf in leaves}
    per_row = len(sizes) == 1 and min(sizes) > 0
    count = sizes.pop() if per_row else 1
    if per_row:
        root = without_first_dimension(root)
    parts = [
        np.frombuffer(raw_bytes(leaf.cpu()), dtype=np.uint8).reshape(count, -1) for leaf in leaves
    ]
    rows = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0), dtype=np.uint8)
    placements = tuple(_placement(leaf) for leaf in leaves)
    if _spread(placements, leaves) > most_spread(rows.nbytes):
        raise RecordError(
            f"a batch's tensors are views that spread {rows.nbytes} bytes over"
            f" {_spread(placements, leaves)}, which a replay would have to allocate. Let the"
            " loader yield them .contiguous()."
        )
    usual = [(0, leaf.contiguous().stride()) for leaf in leaves]
    return EncodedBatch(Layout(per_row, root), rows, () if [*placements] == usual else placements)


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


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """From the first to the last element of a tensor in memory, in elements."""
    return 1 + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True)) if all(shape) else 1


def _spread(placements: Sequence[Placement], leaves: Sequence[Tensor]) -> int:
    return sum(
        _span(leaf.shape, strides) * leaf.element_size()
        for (_, strides), leaf in zip(placements, leaves, strict=True)
    )


def _placed(value: Tensor, placement: Placement) -> Tensor:
    """A copy of ``value`` that lies in memory as the recorded tensor did."""
    address, strides = placement
    size = value.element_size()
    span = _span(value.shape, strides)
    memory = torch.empty(span * size + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (address - memory.data_ptr()) % ALIGNMENT
    flat = memory[start : start + span * size].view(value.dtype)
    return flat.as_strided(tuple(value.shape), strides).copy_(value)


def decode(layout: Layout, rows: Rows, placements: Sequence[Placement] = ()) -> Any:
    """The batch again, from its layout and rows uint8 ``[rows, bytes per row]``."""
    expected, count = row_bytes(layout.root), len(leaves_of(layout.root))
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
    _describe(batch, leaves, "batch")
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


def _describe(value: Any, leaves: list[Tensor], where: str, depth: int = 0) -> Node:
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
            _describe(item, leaves, f"{where}[{key!r}]", depth + 1) for key, item in mapping.items()
        ]
        return DictNode(tuple(mapping), tuple(items))
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        sequence = cast("Sequence[Any]", value)
        items = [
            _describe(item, leaves, f"{where}[{i}]", depth + 1) for i, item in enumerate(sequence)
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
        self.left -= _span(value.shape, strides) * size
        if self.left < 0:
            raise IntegrityError(
                f"a batch's strides {strides} would need far more memory than its rows have."
            )
        return placement

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
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from culpa.errors import IntegrityError, RecordError
from culpa.trajectory.digest import dtype_name, raw_bytes

Node = dict[str, Any]


class Layout(msgspec.Struct, frozen=True):
    """How rows become a batch again. ``per_row``: each row is one example of a batch."""

    per_row: bool
    root: Node

    def encode(self) -> bytes:
        """Canonical JSON, readable with any SQLite tool."""
        return msgspec.json.encode(self, order="sorted")


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
        _drop_first_dimension(root)
    parts = [
        np.frombuffer(raw_bytes(leaf.cpu()), dtype=np.uint8).reshape(count, -1) for leaf in leaves
    ]
    rows = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0), dtype=np.uint8)
    placements = tuple(_placement(leaf) for leaf in leaves)
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


def _placed(value: Tensor, placement: Placement) -> Tensor:
    """A copy of ``value`` that lies in memory as the recorded tensor did."""
    address, strides = placement
    size = value.element_size()
    span = 1 + sum(s * (n - 1) for s, n in zip(strides, value.shape, strict=False))
    if len(strides) != value.ndim or min(strides, default=0) < 0 or address % size:
        raise IntegrityError(f"a batch's placement {placement} does not fit {tuple(value.shape)}.")
    if span * size > 64 * (value.numel() * size + 2**20):
        raise IntegrityError(f"a batch's strides {strides} would need {span * size} bytes.")
    memory = torch.empty(span * size + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (address - memory.data_ptr()) % ALIGNMENT
    flat = memory[start : start + span * size].view(value.dtype)
    return flat.as_strided(tuple(value.shape), strides).copy_(value)


def decode(layout: Layout, rows: Rows, placements: Sequence[Placement] = ()) -> Any:
    """The batch again, from its layout and rows uint8 ``[rows, bytes per row]``."""
    expected = row_bytes(layout.root)
    if rows.shape[1] != expected:
        raise IntegrityError(
            f"the rows of a batch have {rows.shape[1]} bytes; their layout says {expected}."
        )
    return _Reader(layout, rows, placements).read(layout.root)


def row_bytes(node: Node) -> int:
    """How many bytes one row of this layout has."""
    if node["kind"] in ("tensor", "array"):
        return _element_size(node) * math.prod(node["shape"])
    return sum(row_bytes(item) for item in node.get("items", []))


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


def _describe(value: Any, leaves: list[Tensor], where: str) -> Node:
    if isinstance(value, Tensor):
        leaves.append(value.detach())
        shape = list(value.shape)
        return {
            "kind": "tensor",
            "dtype": dtype_name(value.dtype),
            "shape": shape,
            "device": value.device.type,
        }
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        array = cast("np.ndarray[Any, Any]", value)
        leaves.append(torch.from_numpy(np.ascontiguousarray(array)))
        return {
            "kind": "array",
            "dtype": dtype_name(leaves[-1].dtype),
            "shape": list(array.shape),
            "device": "cpu",
        }
    if (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return {"kind": "value", "value": value}
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        if not all(isinstance(key, str) for key in mapping):
            raise RecordError(
                f"{where} is a dictionary with keys that are not strings; name its entries."
            )
        items = [_describe(item, leaves, f"{where}[{key!r}]") for key, item in mapping.items()]
        return {"kind": "dict", "keys": list(mapping), "items": items}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        sequence = cast("Sequence[Any]", value)
        items = [_describe(item, leaves, f"{where}[{i}]") for i, item in enumerate(sequence)]
        return {"kind": "list" if isinstance(value, list) else "tuple", "items": items}
    raise RecordError(
        f"{where} is a {type(value).__name__}, which culpa cannot keep without executing code to "
        "read it back. Let the loader yield tuples, lists or dictionaries of tensors, arrays, "
        "numbers and strings."
    )


def _drop_first_dimension(node: Node) -> None:
    if node["kind"] in ("tensor", "array"):
        node["shape"] = node["shape"][1:]
    for item in node.get("items", []):
        _drop_first_dimension(item)


def _dtype(node: Node) -> torch.dtype:
    dtype = getattr(torch, str(node["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise IntegrityError(
            f"a batch's layout names the dtype {node['dtype']!r}, which torch has not."
        )
    return dtype


def _element_size(node: Node) -> int:
    return _dtype(node).itemsize


class _Reader:
    """Consumes the columns of a row matrix in the order in which the leaves were written."""

    def __init__(self, layout: Layout, rows: Rows, placements: Sequence[Placement]) -> None:
        self.per_row = layout.per_row
        self.placements = iter(placements)
        self.rows = rows
        self.at = 0

    def read(self, node: Node) -> Any:
        match node["kind"]:
            case "tensor" | "array":
                return self._leaf(node)
            case "value":
                return node["value"]
            case "dict":
                return {k: self.read(i) for k, i in zip(node["keys"], node["items"], strict=True)}
            case "list":
                return [self.read(item) for item in node["items"]]
            case "tuple":
                return tuple(self.read(item) for item in node["items"])
            case kind:
                raise IntegrityError(f"a batch's layout has a node of unknown kind {kind!r}.")

    def _leaf(self, node: Node) -> Any:
        size = row_bytes(node)
        column = np.ascontiguousarray(self.rows[:, self.at : self.at + size])
        self.at += size
        shape = [len(self.rows), *node["shape"]] if self.per_row else node["shape"]
        flat = torch.from_numpy(column.reshape(-1))
        value = (
            flat.view(_dtype(node)).reshape(shape)
            if flat.numel()
            else torch.empty(shape, dtype=_dtype(node))
        )
        placement = next(self.placements, None)
        # A copy in either case: memory that torch allocates is aligned, NumPy's is not.
        value = value.clone() if placement is None else _placed(value, placement)
        if node["kind"] == "array":
            return value.numpy()
        return value.to(node["device"]) if node["device"] != "cpu" else value

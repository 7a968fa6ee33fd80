"""The layout of a batch: nesting, dtypes, row shapes and plain values, as data that runs nothing.

Restrictions, each for the reader's sake: at most ``MAX_DEPTH`` levels (a reader may recurse),
dimensions from 0 to ``MAX_DIMENSION`` (products stay exact), dtypes and devices by torch's names.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated

import msgspec
import torch

from culpa.errors import IntegrityError

MAX_DEPTH = 64
MAX_DIMENSION = 2**40
DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Those that torch itself drives; for other names it would look for a package to import."""
DTYPES = frozenset(
    [
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    ]
)
"""Those that torch can copy; it has names for more."""
MAX_DIMENSIONS = 64
"""Of one tensor: as many as torch allows."""

DAMAGED = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError)
"""What decoding bytes that somebody else wrote may raise."""

Dimension = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIMENSION)]
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]


class TensorNode(
    msgspec.Struct, frozen=True, tag_field="kind", tag="tensor", forbid_unknown_fields=True
):
    """A tensor; ``shape`` is a row's (without the first dimension) if the layout is per row."""

    dtype: str
    shape: Shape
    device: str


class ArrayNode(TensorNode, frozen=True, tag="array"):
    """A NumPy array."""


class ValueNode(
    msgspec.Struct, frozen=True, tag_field="kind", tag="value", forbid_unknown_fields=True
):
    """A plain value, the same in every row."""

    value: bool | int | float | str | None


class DictNode(
    msgspec.Struct, frozen=True, tag_field="kind", tag="dict", forbid_unknown_fields=True
):
    """A dictionary with string keys, in its order."""

    keys: tuple[str, ...]
    items: tuple[Node, ...]


class ListNode(
    msgspec.Struct, frozen=True, tag_field="kind", tag="list", forbid_unknown_fields=True
):
    """A list."""

    items: tuple[Node, ...]


class TupleNode(
    msgspec.Struct, frozen=True, tag_field="kind", tag="tuple", forbid_unknown_fields=True
):
    """A tuple."""

    items: tuple[Node, ...]


Node = TensorNode | ArrayNode | ValueNode | DictNode | ListNode | TupleNode
Leaf = TensorNode | ArrayNode


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rows become a batch again. ``per_row``: each row is one example of a batch."""

    per_row: bool
    root: Node

    def encode(self) -> bytes:
        """Canonical JSON, readable with any SQLite tool."""
        return msgspec.json.encode(self, order="sorted")

    @classmethod
    def decode(cls, data: bytes) -> Layout:
        """The inverse of ``encode``; raises ``IntegrityError`` on anything else."""
        try:
            layout = msgspec.json.decode(data, type=cls)
        except DAMAGED as error:
            raise IntegrityError(f"a batch's layout is damaged: {error}.") from error
        for leaf in leaves_of(layout.root):
            dtype_of(leaf)
            if leaf.device not in DEVICES:
                raise IntegrityError(f"a batch's layout names the device {leaf.device!r}.")
        return layout


def children(node: Node) -> tuple[Node, ...]:
    """The nodes inside of a node."""
    return node.items if isinstance(node, (DictNode, ListNode, TupleNode)) else ()


def leaves_of(root: Node) -> list[Leaf]:
    """The tensors and arrays in the order in which their bytes lie in a row.

    Raises:
        IntegrityError: on more levels than ``MAX_DEPTH``, or keys and items of different number.
    """
    found: list[Leaf] = []
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise IntegrityError(f"a batch's layout nests deeper than {MAX_DEPTH} levels.")
        if isinstance(node, DictNode) and (
            len(node.keys) != len(node.items) or len(set(node.keys)) != len(node.keys)
        ):
            raise IntegrityError("a batch's layout has a dictionary whose keys are not one each.")
        if isinstance(node, (TensorNode, ArrayNode)):
            found.append(node)
        waiting += [(item, depth + 1) for item in reversed(children(node))]
    return found


def dtype_of(leaf: Leaf) -> torch.dtype:
    """The torch dtype that a leaf names."""
    if leaf.dtype not in DTYPES:
        raise IntegrityError(
            f"a batch's layout names the dtype {leaf.dtype!r}, which batches cannot have."
        )
    dtype: torch.dtype = getattr(torch, leaf.dtype)
    return dtype


@lru_cache(maxsize=4096)
def row_bytes(root: Node) -> int:
    """How many bytes one row of this layout has."""
    return sum(dtype_of(leaf).itemsize * math.prod(leaf.shape) for leaf in leaves_of(root))


def without_first_dimension(node: Node) -> Node:
    """The layout of one row of a batch whose tensors have this layout."""
    if isinstance(node, (TensorNode, ArrayNode)):
        return msgspec.structs.replace(node, shape=node.shape[1:])
    if isinstance(node, ValueNode):
        return node
    return msgspec.structs.replace(
        node, items=tuple(without_first_dimension(item) for item in node.items)
    )

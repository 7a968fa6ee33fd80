"""Reading safetensors from memory: the same format, read more strictly than the package reads it.

Every byte of a file must follow from its tensors, so that a changed one is noticed wherever it is:
the header is compact JSON without metadata, padded with spaces to a multiple of 8 bytes, and the
tensors lie end to end up to the end of the file. Nothing is allocated before that is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Annotated

import msgspec
import torch
from blake3 import blake3
from torch import Tensor

from culpa.errors import IntegrityError
from culpa.trajectory.digest import dtype_name, header
from culpa.trajectory.layout import DAMAGED, Shape
from culpa.tree import Tree

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors package itself."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


Cut = Callable[[str, Tensor], Tensor]
"""What is kept of a tensor of this name."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header says of one tensor."""

    dtype: str
    shape: Shape
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


def entries(data: memoryview) -> Iterator[tuple[str, Entry, memoryview]]:
    """Name, header entry and bytes of every tensor of a file, in the order of the file.

    Raises:
        IntegrityError: saying what is wrong, if anything in the file is not as it must be.
    """
    if len(data) < 8:
        raise IntegrityError(f"it has {len(data)} bytes, too few for a safetensors header")
    size = int.from_bytes(data[:8], "little")
    if size > min(len(data) - 8, MAX_HEADER):
        raise IntegrityError(
            f"its header claims {size} bytes; the file has {len(data)}, and {MAX_HEADER} is the"
            " most allowed"
        )
    body = data[8 + size :]
    for name, entry in _described(bytes(data[8 : 8 + size]), len(body)):
        start, stop = entry.data_offsets
        yield name, entry, body[start:stop]


@lru_cache(maxsize=4)  # the states of a run have one header, and decoding it took half of reading
def _described(text: bytes, size: int) -> tuple[tuple[str, Entry], ...]:
    """What a header says of a body of so many bytes, checked."""
    try:
        found = msgspec.json.decode(text, type=dict[str, Entry])
    except DAMAGED as error:
        raise IntegrityError(f"its header is damaged: {error}") from error
    canonical = msgspec.json.encode(found)
    if canonical + b" " * (-len(canonical) % 8) != text:
        raise IntegrityError("its header is not the compact JSON of a list of tensors")
    at = 0
    for name, entry in found.items():
        start, stop = entry.data_offsets
        if entry.dtype not in DTYPES:
            raise IntegrityError(f"{name!r} has the unknown dtype {entry.dtype!r}")
        expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if start != at or stop - start != expected or stop > size:
            raise IntegrityError(
                f"{name!r} of shape {list(entry.shape)} and dtype {entry.dtype} needs {expected}"
                f" bytes from {at} on; its header says {start} to {stop}, the file has {size}"
            )
        at = stop
    if at != size:
        raise IntegrityError(f"{size - at} bytes follow the last tensor")
    return tuple(found.items())


def load(data: memoryview, cut: Cut | None = None) -> Tree:
    """The tensors of a file, as copies; of each what ``cut`` makes of it.

    Memory: what is returned, and one tensor.
    """
    found: Tree = {}
    for name, entry, raw in list(entries(data)):
        dtype = DTYPES[entry.dtype]
        value = _tensor(raw, dtype).reshape(entry.shape)
        if dtype is torch.bool and len(raw) and int(value.view(torch.uint8).max()) > 1:
            raise IntegrityError(f"{name!r} holds a bool that is neither 0 nor 1")
        found[name] = value if cut is None else cut(name, value)
    return found


def _tensor(raw: memoryview, dtype: torch.dtype) -> Tensor:
    if not len(raw):
        return torch.empty(0, dtype=dtype)
    value = torch.empty(len(raw), dtype=torch.uint8)
    memoryview(value.numpy().data).cast("B")[:] = raw
    return value.view(dtype)


def entry_digest(name: str, entry: Entry, raw: memoryview) -> bytes:
    """The digest of a tensor as it lies in a file, without making a tensor of it."""
    start = header(name, dtype_name(DTYPES[entry.dtype]), entry.shape)
    return blake3(start).update(raw).digest()


def described(entry: Entry) -> str:
    """dtype and shape as manifests have them: ``"float32 [128, 64]"``."""
    return f"{dtype_name(DTYPES[entry.dtype])} {list(entry.shape)}"

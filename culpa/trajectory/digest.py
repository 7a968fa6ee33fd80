"""Canonical digests: BLAKE3 over names, dtypes, shapes and bytes of tensors.

A tensor's digest is ``BLAKE3(header || bytes)`` where the header is the msgpack array
``["culpa tensor", name, dtype, [shape...]]`` and the bytes are its elements in C order,
little-endian, as they lie in memory. A tree's digest is the BLAKE3 of its tensors' digests in the
order of their names. Files are not hashed: their bytes may differ between writers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import torch
from blake3 import blake3
from torch import Tensor

DIGEST_BYTES = 32
FINGERPRINT_BYTES = 4


def header(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    """What stands before a tensor's bytes in its digest."""
    return msgspec.msgpack.encode(["culpa tensor", name, dtype, list(shape)])


@lru_cache(maxsize=4096)
def begun(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    """A hash that has seen the header, to be copied: the same tensors come at every update."""
    return blake3(header(name, dtype, shape))


def combine(digests: Iterable[bytes]) -> bytes:
    """One digest of several, in the order given."""
    return blake3(b"".join(digests)).digest()


def chain(previous: bytes, content: bytes) -> bytes:
    """The next link of a hash chain: ``BLAKE3(previous || BLAKE3(content))``."""
    return combine([previous, blake3(content).digest()])


def raw_bytes(value: Tensor) -> memoryview:
    """The elements of a CPU tensor in C order, without a copy where it is contiguous already."""
    flat = value.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def tensor_digest(name: str, value: Tensor) -> bytes:
    """32-byte digest of one named tensor."""
    value = value.detach().cpu()
    start = begun(name, dtype_name(value.dtype), tuple(value.shape))
    return start.copy().update(raw_bytes(value)).digest()


def tensor_digests(tree: Mapping[str, Tensor]) -> list[bytes]:
    """The digests of a tree's tensors, in the order of their names."""
    return [tensor_digest(name, tree[name]) for name in sorted(tree)]

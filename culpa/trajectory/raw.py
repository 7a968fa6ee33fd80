"""Tensors as bytes that say their name, dtype and shape, ready to be hashed and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors import TensorSpec, serialize

from culpa.trajectory import digest


class Raw(NamedTuple):
    """One tensor of a state, in C order, under the path that it has in a state's file."""

    path: str
    dtype: str
    """As torch calls it: ``"float32"``."""
    shape: tuple[int, ...]
    data: Any
    """Its bytes: anything that has the buffer protocol."""


def digests(tensors: Sequence[Raw]) -> list[bytes]:
    """The digest of each, in the order of their paths."""
    return [
        digest.begun(path, dtype, shape).copy().update(data).digest()
        for path, dtype, shape, data in sorted(tensors, key=_path)
    ]


def encode(tensors: Sequence[Raw]) -> bytes:
    """A state's file: safetensors."""
    held = [np.frombuffer(tensor.data, dtype=np.uint8) for tensor in tensors]
    specs = {
        tensor.path: TensorSpec(
            dtype=tensor.dtype,
            shape=list(tensor.shape),
            data_ptr=data.ctypes.data,
            data_len=data.nbytes,
        )
        for tensor, data in zip(tensors, held, strict=True)
    }
    return bytes(serialize(specs, metadata=None))


def _path(tensor: Raw) -> str:
    return tensor.path

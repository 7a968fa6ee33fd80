"""Digests of tensors that stay where they are while training changes what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blake3 import blake3
from torch import Tensor

from culpa.trajectory import digest


class Live:
    """A module's tensors by path; on the CPU, where the bytes of each lie is looked for once."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.names = sorted(named)
        self._tensors = [named[name] for name in self.names]
        self._look()

    def digests(self) -> list[bytes]:
        """``digest.tensor_digests`` of them as they are now."""
        if [tensor.data_ptr() for tensor in self._tensors] != self._addresses:
            self._look()  # somebody gave one other memory, by its .data
        return [
            digest.tensor_digest(name, tensor)
            if place is None
            else place[0].copy().update(place[1]).digest()
            for name, tensor, place in zip(self.names, self._tensors, self._places, strict=True)
        ]

    def _look(self) -> None:
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._places = [_place(n, t) for n, t in zip(self.names, self._tensors, strict=True)]


def _place(name: str, tensor: Tensor) -> tuple[Any, memoryview] | None:
    """A hash that has seen the header, and the bytes; ``None`` where those are copied first."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        return None
    header = digest.header(name, digest.dtype_name(tensor.dtype), tuple(tensor.shape))
    return blake3(header), digest.raw_bytes(tensor)

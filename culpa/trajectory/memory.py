"""The words of Python's and NumPy's global generators, read where they lie in memory.

``random.getstate()`` and ``np.random.get_state()`` build 624 integers, 10 and 35 microseconds;
training asks several times an update. What a generator keeps fits into one block of memory, which
is copied in half a microsecond. Nothing is assumed of where that block lies: it is found by trial,
on generators aside whose state is known, and where the trial fails there is no window, so that
the states are asked for as usual.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

WORDS = 624
GAUSS = 1.2345678901234567e-89  # a number that no generator holds by chance


@dataclass(frozen=True)
class Window:
    """So many bytes from an address on. ``owner`` keeps the memory alive."""

    owner: Any
    address: int
    size: int

    def read(self) -> bytes:
        """What is there now."""
        return self._there.raw

    @cached_property
    def _there(self) -> Any:
        return (ctypes.c_char * self.size).from_address(self.address)


def of_python(generator: random.Random) -> Window | None:
    """Words and position of a generator of ``random`` (not ``gauss_next``, an attribute)."""
    words = tuple(range(1000, 1000 + WORDS))
    probe = type(generator)()

    def put(position: int) -> None:
        probe.setstate((3, (*words, position), None))

    put(77)
    content = _content(probe)
    packed = struct.pack(f"={WORDS}I", *words)
    at = content.find(packed)
    for start, of_position in ((at - 4, 0), (at, 4 * WORDS)):  # the position is before or behind
        size = 4 * WORDS + 4
        if at < 0 or start < 0 or start + size > len(content):
            continue
        seen: list[int] = []
        for position in (77, 200):
            put(position)
            block = _content(probe)[start : start + size]
            seen += struct.unpack_from("=i", block, of_position)
        if seen == [77, 200]:
            return Window(generator, id(generator) + start, size)
    return None


def of_numpy(generator: Any) -> tuple[Window, Window] | None:
    """Words and position of a legacy generator of NumPy, and its cached Gaussian."""
    bits = generator._bit_generator
    if type(bits) is not np.random.MT19937:
        return None
    size = 4 * WORDS + 4
    probe: Any = type(generator)(0)
    words = np.arange(1000, 1000 + WORDS, dtype=np.uint32)
    probe.set_state(("MT19937", words, 77, 1, GAUSS))
    expected = words.tobytes() + struct.pack("=i", 77)
    if ctypes.string_at(probe._bit_generator.ctypes.state_address, size) != expected:
        return None
    at = _content(probe).find(struct.pack("=d", GAUSS))
    if at < 8:
        return None
    flags: list[int] = []
    for has in (1, 0):
        probe.set_state(("MT19937", words, 77, has, GAUSS))
        flags += struct.unpack_from("=i", _content(probe), at - 8)
    if flags != [1, 0]:
        return None
    return (
        Window(bits, bits.ctypes.state_address, size),
        Window(generator, id(generator) + at - 8, 16),
    )


def _content(value: object) -> bytes:
    """The bytes of an object of CPython; none elsewhere, where ``id`` is no address."""
    if sys.implementation.name != "cpython":
        return b""
    return ctypes.string_at(id(value), type(value).__basicsize__)

"""The words of Python's, NumPy's and torch's global generators, read where they lie in memory.

``random.getstate()`` and ``np.random.get_state()`` build 624 integers, 10 and 35 microseconds, and
torch's makes a tensor; training asks several times an update. What a generator keeps fits into one
block of memory, which is copied in half a microsecond. Nothing is assumed of where that block lies:
it is found by trial, on generators aside whose state is known, and where the trial fails there is
no window, so that the states are asked for as usual.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

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
        return self.there.raw

    @cached_property
    def there(self) -> Any:
        """An array of characters, whose ``raw`` is what is there now."""
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


AROUND = 32
"""Bytes before and behind torch's words with its position, and the Gaussians that it keeps."""


def of_torch(generator: torch.Generator) -> Window | None:
    """Seed, position, words and kept Gaussians of a generator of torch on the CPU."""
    probe = torch.Generator()
    address: Any = getattr(probe, "_cdata", None)
    if not isinstance(address, int) or generator.device.type != "cpu":
        return None
    probe.manual_seed(77)
    # Both are MT19937, seeded by the same recurrence.
    words = np.random.RandomState(77).get_state(legacy=False)["state"]["key"].tobytes()
    # The object holds all the words: up to its first ones, and to their end, it can be read.
    at = ctypes.string_at(address, 4 * WORDS).find(words[:64])
    if at < AROUND or ctypes.string_at(address + at, len(words)) != words:
        return None
    window = Window(probe, address + at - AROUND, len(words) + 2 * AROUND)
    for move in _MOVES:
        for _ in range(3):
            state, seen = probe.get_state(), window.read()
            move(probe)
            if not torch.equal(state, probe.get_state()) and window.read() == seen:
                return None
    offset = window.address - address
    return Window(generator, generator._cdata + offset, window.size)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType]


_MOVES: tuple[Callable[[torch.Generator], Any], ...] = (
    lambda g: torch.rand(3, generator=g),
    lambda g: torch.randn((), generator=g),  # every other one was kept by the one before
    lambda g: torch.randn((), generator=g, dtype=torch.float64),
    lambda g: torch.randn((), generator=g, dtype=torch.bfloat16),
    lambda g: torch.randn(20, generator=g),
    lambda g: torch.randperm(5, generator=g),
    lambda g: torch.rand(700, generator=g),
    lambda g: g.set_state(torch.Generator().manual_seed(5).get_state()),
    lambda g: g.manual_seed(g.initial_seed() + 1),
)
"""Each of which has to show in the window."""


def _content(value: object) -> bytes:
    """The bytes of an object of CPython; none elsewhere, where ``id`` is no address."""
    if sys.implementation.name != "cpython":
        return b""
    return ctypes.string_at(id(value), type(value).__basicsize__)

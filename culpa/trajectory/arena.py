"""Memory for the copies that a recording takes at every update, used again and again.

Fresh memory costs more than the copy: the system hands it out page by page, as each is touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch

SIZE = 2**29
"""The most bytes that it holds."""
PAGE = 4096
ALIGNMENT = 64

Made = TypeVar("Made")


class Region:
    """Memory, and what was last made of it: views, each of which would cost as much as a copy."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8)
        self._made: tuple[Any, Any] | None = None

    def made(self, key: Any, make: Callable[[torch.Tensor], Made]) -> Made:
        """``make(memory)``, called anew only if ``key`` is another object than last time."""
        made = self._made
        if made is None or made[0] is not key:
            made = self._made = key, make(self.memory)
        return made[1]


class Arena:
    """Hands out regions, and takes them back once what lies in them is written.

    Not for several threads: only the one that trains calls it.
    """

    def __init__(self, size: int = SIZE) -> None:
        self._left = size
        self._free: dict[int, list[Region]] = {}
        self._taken: list[Region] = []
        self._flying: deque[tuple[int, list[Region]]] = deque()
        self._newest = -1

    def take(self, size: int) -> Region | None:
        """A region of at least ``size`` bytes, for the item that is handed over next.

        ``None`` if there is no room.
        """
        size = -(-max(size, 1) // PAGE) * PAGE
        free = self._free.get(size)
        if free:
            region = free.pop()  # the one used last: it may still be in the processor's cache
        elif size <= self._left:
            region = Region(size)
            self._left -= size
        else:
            return None
        self._taken.append(region)
        return region

    def hand_over(self, number: int, *, update: bool) -> None:
        """What was taken belongs to item ``number``; that of the newest update is never given back.

        The recorder compares with it (``Watch._last``).
        """
        if self._taken:
            self._flying.append((number, self._taken))
            self._taken = []
            if update:
                self._newest = number

    def give_back(self, done: int) -> None:
        """Items before ``done`` are written."""
        flying = self._flying
        while flying and flying[0][0] < done and flying[0][0] != self._newest:
            for region in flying.popleft()[1]:
                self._free.setdefault(len(region.memory), []).append(region)

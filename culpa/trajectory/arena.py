"""Memory for the copies that a recording takes at every update, used again and again.

Fresh memory costs more than the copy: the system hands it out page by page, as each is touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SIZE = 2**29
"""The most bytes that it holds."""
PAGE = 4096
ALIGNMENT = 64


class Region:
    """Memory, uint8, and the tensors that were last made of it."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8)
        self._views: tuple[Any, list[Tensor]] | None = None

    def views(self, key: Any, parts: Sequence[tuple[int, torch.dtype, torch.Size]]) -> list[Tensor]:
        """Tensors in it, given where each begins; ``key`` stands for ``parts``, by identity."""
        if self._views is None or self._views[0] is not key:
            self._views = (
                key,
                [
                    self.memory[start : start + size.numel() * dtype.itemsize]
                    .view(dtype)
                    .view(size)
                    for start, dtype, size in parts
                ],
            )
        return self._views[1]


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

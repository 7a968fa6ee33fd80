"""The graph of an update's gradient, from where it was made to the product that needs it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from culpa.dynamics.curvature.apart import Slopes


class Graph:
    """What ``Slopes`` holds of one update, until it is used.

    Attributes:
        size: bytes that it keeps in memory, besides parameters and batch; 0 once it is used.
        aside: what was made in the same passes, for whoever knows it (dynamics/statistics.py).
    """

    def __init__(self, slopes: Slopes, names: Collection[str], size: int, aside: Any) -> None:
        self.size, self.aside = size, aside
        self._slopes: Slopes | None = slopes
        self._names = frozenset(names)

    def use(self, names: Collection[str]) -> Slopes | None:
        """The slopes, once, if they are by the parameters ``names``."""
        if self._names != frozenset(names):
            return None
        found, self._slopes, self.size = self._slopes, None, 0
        return found

"""Where a reverse sweep measures how good its products are, and what it makes of that.

A probe costs two or three gradients, so sparse ones do while the mean is clear of the bounds that
grades and the fallback are decided by. Every probe stands for the updates since the one before, so
that the mean is over updates however they are spaced.
"""

from __future__ import annotations

import math
from statistics import stdev

from culpa.estimators.trust import UPDATE_DOUBTFUL, UPDATE_TRUSTED

PROBES = 16
"""At most so many updates of a run are probed, spread over it."""
SPARSE = 4
"""Of so many only one where the mean is clear of both bounds."""
SETTLED = 3
"""One probe may be an outlier: so many are wanted before anything follows from them."""
CLEAR = 2.0
"""Standard errors of the mean from a bound."""


class Probes:
    """The residuals of one sweep, from the last update to the first.

    Args:
        num_steps: updates of the run.

    Attributes:
        every: the distance of probes where they are dense.
    """

    def __init__(self, num_steps: int) -> None:
        self.every = max(1, math.ceil(num_steps / PROBES))
        self._last = num_steps
        self._found: list[float] = []
        self._weights: list[int] = []
        self._clear = False

    def due(self, index: int) -> bool:
        """Whether update ``index`` is to be probed."""
        if not self._found:
            return True
        every = self.every * (SPARSE if self._clear else 1)
        return self._last - index >= every

    def add(self, index: int, residual: float) -> None:
        """The residual of a probed update."""
        self._found.append(residual)
        self._weights.append(self._last - index)
        self._last = index
        self._clear = self._is_clear()

    @property
    def settled(self) -> bool:
        """Whether there are enough to conclude from."""
        return len(self._found) >= SETTLED

    @property
    def mean(self) -> float:
        """Over the updates from the last to the one probed last; nan before the first probe."""
        total = sum(w * r for w, r in zip(self._weights, self._found, strict=True))
        return total / sum(self._weights) if self._weights else math.nan

    def _is_clear(self) -> bool:
        if not self.settled or not math.isfinite(self.mean):
            return False
        error = CLEAR * stdev(self._found) / math.sqrt(len(self._found))
        return all(abs(self.mean - bound) > error for bound in (UPDATE_TRUSTED, UPDATE_DOUBTFUL))

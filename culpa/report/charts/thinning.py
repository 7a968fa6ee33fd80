"""Which updates the per-update chart shows: all of a short run, the extremes of a long one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from culpa.report.numbers import finite

SHOWN_PER_BEHAVIOUR: Final = 1200
"""More stems than a wide screen has room for."""
SHOWN_ALTOGETHER: Final = 3600
"""Over all behaviours: keeps the page, which carries each one twice (chart and table), small."""


def allowance(behaviours: int, stages: int) -> int:
    """How many updates of each behaviour a page can carry beside its bars (one costs three)."""
    room = SHOWN_ALTOGETHER - 3 * stages * behaviours
    return max(30, min(SHOWN_PER_BEHAVIOUR, room // max(1, behaviours)))


def thin(scores: Sequence[float | None], spans: Sequence[tuple[int, int]], limit: int) -> list[int]:
    """Indices of about ``limit`` updates that keep what a reader looks for, in order.

    The run is cut into equal bins, and each keeps its lowest and its highest score (and its first
    score that is not finite): true updates, never averages, so no peak is lost. The lowest and
    the highest of every stage in ``spans`` are kept besides, so that no stage is empty. A run of
    at most ``limit`` updates is kept whole.
    """
    total = len(scores)
    if total <= limit:
        return list(range(total))
    values = [finite(score) for score in scores]
    each = 2 if all(value is not None for value in values) else 3
    bins = max(1, limit // each)
    kept: set[int] = set()
    for b in range(bins):
        kept |= _extremes(values, b * total // bins, (b + 1) * total // bins)
    if 2 * len(spans) <= limit:
        for start, stop in spans:
            kept |= _extremes(values, max(0, start), min(stop, total))
    return sorted(kept)


def _extremes(values: Sequence[float | None], start: int, stop: int) -> set[int]:
    finite_ones: list[tuple[float, int]] = []
    first_other: int | None = None
    for k in range(start, stop):
        value = values[k]
        if value is not None:
            finite_ones.append((value, k))
        elif first_other is None:
            first_other = k
    kept = {min(finite_ones)[1], max(finite_ones)[1]} if finite_ones else set[int]()
    return kept if first_other is None else kept | {first_other}

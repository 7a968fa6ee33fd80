"""How far a chart's axis reaches when some of the numbers cannot be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from culpa.report.numbers import finite

REPLAYED: Final = "replayed"
"""The grade of an exact number: drawn as a trusted one."""
GRADES: Final = ("trusted", "doubtful", "not identified")
"""The grades of an audit, best first. Any other text is shown as it is and drawn as the last."""
TOLERANCE: Final = 4.0
"""A number that is not identified may stretch the axis this many times before it is cut off."""
LARGEST: Final = 1e100
"""No axis reaches further: beyond it the arithmetic of a chart library overflows."""


def grade_index(grade: str) -> int:
    """Position of ``grade`` in ``GRADES``; the last for a grade this version does not know."""
    if grade == REPLAYED:
        return 0
    return GRADES.index(grade) if grade in GRADES else len(GRADES) - 1


def reach(identified: Iterable[float | None], others: Iterable[float | None] = ()) -> float:
    """Largest absolute value an axis has to show, at most 1e100; 1.0 where all is zero.

    A linearisation that diverged is often wrong by orders of magnitude and would flatten every
    number worth reading. So the axis is made for the ``identified`` numbers, and for the
    ``others`` as far as these stay within ``TOLERANCE`` times that; what lies beyond is drawn at
    the edge, and said to be. Without identified numbers everything counts.
    """
    first = _absolute(identified)
    second = _absolute(others)
    best = max(first, default=0.0)
    if best > 0.0:
        second = [value for value in second if value <= TOLERANCE * best]
    limit = max([best, *second])
    return min(limit, LARGEST) if limit > 1.0 / LARGEST else 1.0


def domain(values: Sequence[float | None], limit: float) -> tuple[float, float]:
    """Axis ends around zero and ``values`` cut to ``[-limit, limit]``, with 6 % of air."""
    cut = [clamp(value, limit) for value in values if value is not None]
    low, high = min([0.0, *cut]), max([0.0, *cut])
    if low == high:
        return (-1.0, 1.0)
    air = 0.06 * (high - low)
    return (low - air if low < 0.0 else low, high + air if high > 0.0 else high)


def clamp(value: float, limit: float) -> float:
    """``value`` cut to ``[-limit, limit]``."""
    return min(max(value, -limit), limit)


def _absolute(values: Iterable[float | None]) -> list[float]:
    return [abs(value) for item in values if (value := finite(item)) is not None]

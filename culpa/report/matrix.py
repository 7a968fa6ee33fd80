"""Stages by behaviours: how strongly each cell of the matrix is coloured."""

from __future__ import annotations

from dataclasses import dataclass

from culpa.auditing.record import AuditRecord
from culpa.report.charts.scale import clamp, grade_index, reach
from culpa.report.numbers import finite


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One stage on one behaviour. ``share`` in [-1, 1]: the effect as a part of the scale's end."""

    effect: float | None
    replayed: float | None
    was_replayed: bool
    share: float
    grade: str


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """``rows[stage][behaviour]``; ``ends[unit]`` is the effect at which the colour is full."""

    rows: list[list[Cell]]
    ends: dict[str, float]


def matrix(record: AuditRecord) -> Matrix:
    """The stages x behaviours matrix, zero in the middle of the scale.

    Behaviours of one unit share a scale, for their numbers compare; different units do not. The
    scale ends at the largest effect that is identified: one that is not would bleach the others.
    Where none is identified it ends at the largest.
    """
    ends: dict[str, float] = {}
    for unit in dict.fromkeys(behaviour.unit for behaviour in record.behaviours):
        columns = [q for q, behaviour in enumerate(record.behaviours) if behaviour.unit == unit]
        known = [s.effects[q] for s in record.stages for q in columns if grade_index(s.grade) < 2]
        every = [s.effects[q] for s in record.stages for q in columns]
        ends[unit] = reach(known if any(known) else every)
    rows = [
        [
            _cell(stage.effects[q], stage.replayed[q], stage.grade, ends[behaviour.unit])
            for q, behaviour in enumerate(record.behaviours)
        ]
        for stage in record.stages
    ]
    return Matrix(rows=rows, ends=ends)


def _cell(effect: float | None, replayed: float | None, grade: str, end: float) -> Cell:
    kept = finite(effect)
    return Cell(
        effect=effect,
        replayed=replayed,
        was_replayed=replayed is not None,
        share=0.0 if kept is None else round(clamp(kept / end, 1.0), 3),
        grade=grade,
    )

"""Stages by behaviours: how strongly each cell of the matrix is coloured."""

from __future__ import annotations

from dataclasses import dataclass

from culpa.auditing.record import AuditRecord, StageFinding
from culpa.report.charts.scale import clamp, grade_index, reach
from culpa.report.numbers import finite
from culpa.report.panels import grade_of
from culpa.report.table import known


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One stage on one behaviour: its best number, and the estimate too where there are both.

    ``share`` in [-1, 1]: the best number as a part of the scale's end.
    """

    best: float | None
    estimate: float | None
    was_replayed: bool
    both: bool
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
        cells = [(best_of(s, q), grade_of(s, q)) for s in record.stages for q in columns]
        known = [best for best, grade in cells if grade_index(grade) < 2]
        every = [best for best, _ in cells]
        ends[unit] = reach(known if any(known) else every)
    rows = [
        [_cell(stage, q, ends[behaviour.unit]) for q, behaviour in enumerate(record.behaviours)]
        for stage in record.stages
    ]
    return Matrix(rows=rows, ends=ends)


def best_of(stage: StageFinding, q: int) -> float | None:
    """The replayed effect on behaviour ``q`` or else the estimate; ``None``: nothing is known."""
    truth = stage.replayed[q]
    if not known(stage, q):
        return None
    return stage.effects[q] if truth is None else truth


def _cell(stage: StageFinding, q: int, end: float) -> Cell:
    best, replayed = best_of(stage, q), stage.replayed[q] is not None
    kept = finite(best)
    return Cell(
        best=best,
        estimate=stage.effects[q],
        was_replayed=replayed,
        both=replayed and stage.estimated,
        share=0.0 if kept is None else round(clamp(kept / end, 1.0), 3),
        grade=grade_of(stage, q),
    )

"""The audit in a terminal: one Rich table a behaviour, one row a stage, readable at 80 columns."""

from __future__ import annotations

import io
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from culpa.auditing.record import AuditRecord, StageFinding
from culpa.errors import OptionError
from culpa.report.numbers import finite, half_width, signed
from culpa.report.record_check import checked

WIDTH: Final = 80


def build(record: AuditRecord, behaviour: str | None = None) -> Table:
    """The table of one behaviour: AA-Score, estimated effect, true effect where replayed, grade.

    Numbers are in the behaviour's unit, signs always shown; positive: the stage raised it. The
    half-width at 95 % belongs to the true effect or, without one, to the estimate. The
    most blamed stage is red and the most credited green, by the true effect where it was
    replayed and else by the estimate, whatever its grade.

    Args:
        record: the audit.
        behaviour: name of the behaviour; the first of the audit if not given.

    Raises:
        OptionError: the audit has no such behaviour.
    """
    record = checked(record)
    return _table(record, _index(record, behaviour))


def tables(record: AuditRecord) -> list[Table]:
    """``build`` for every behaviour of the audit, in its order."""
    record = checked(record)
    return [_table(record, q) for q in range(len(record.behaviours))]


def to_text(record: AuditRecord) -> str:
    """All tables as plain text at 80 columns: no colour, numbers and rules in ASCII."""
    record = checked(record)
    made = [_table(record, q, ascii_only=True) for q in range(len(record.behaviours))]
    if not made:
        return "This audit has no behaviours.\n"
    file = io.StringIO()
    console = Console(file=file, width=WIDTH, color_system=None, legacy_windows=False)
    for table in made:
        console.print(table)
        console.print()
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n") + "\n"


def _table(record: AuditRecord, q: int, *, ascii_only: bool = False) -> Table:
    facts = record.behaviours[q]
    value = signed(facts.value, ascii_only=ascii_only)
    plus_minus = "+/-" if ascii_only else "\N{PLUS-MINUS SIGN}"
    table = Table(
        title=Text(f"{facts.name}: {value} {facts.unit} (mean of {facts.count})"),
        caption=Text(
            f"> 0: the stage raised it; < 0: it lowered it; {plus_minus}: at 95 %; -: not known"
        ),
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD,
    )
    table.add_column("Stage", overflow="fold", min_width=12)
    width = 9 if ascii_only else 10  # ASCII draws rules between columns
    for header in ("AA-Score", "Estimated", "Replayed"):
        head = Text(f"{header}\n[{facts.unit}]")
        table.add_column(head, justify="right", overflow="fold", min_width=9, max_width=width)
    table.add_column(plus_minus, justify="right")
    table.add_column("Grade", overflow="fold", min_width=8, max_width=14)
    blamed, credited = _extremes(record.stages, q)
    largest = largest_effect(record, q)
    for i, stage in enumerate(record.stages):
        replayed = stage.replayed[q]
        estimate = signed(stage.effects[q], ascii_only=ascii_only) if stage.estimated else "-"
        half = finite(stage.intervals[q]) if stage.intervals else None
        table.add_row(
            Text(stage.name),
            signed(stage.scores[q], ascii_only=ascii_only) if known(stage, q) else "-",
            estimate,
            "-" if replayed is None else signed(replayed, ascii_only=ascii_only),
            half_width(half, largest, ascii_only=ascii_only),
            Text(stage.grades[q] if stage.grades else stage.grade),
            style="red" if i == blamed else "green" if i == credited else None,
        )
    return table


def known(stage: StageFinding, q: int) -> bool:
    """Whether anything is known of it: it was estimated, or replayed."""
    return stage.estimated or stage.replayed[q] is not None


def largest_effect(record: AuditRecord, q: int) -> float:
    """The largest absolute best number of any stage; 0 if there is none."""
    best = (s.effects[q] if s.replayed[q] is None else s.replayed[q] for s in record.stages)
    return max((abs(b) for b in map(finite, best) if b is not None), default=0.0)


def _extremes(stages: list[StageFinding], q: int) -> tuple[int | None, int | None]:
    """Rows of the most blamed and of the most credited stage; ``None`` where no stage is."""
    known: list[tuple[float, int]] = []
    for i, stage in enumerate(stages):
        best = finite(stage.replayed[q])
        best = finite(stage.effects[q]) if best is None else best
        if best is not None:
            known.append((best, i))
    if not known:
        return (None, None)
    low, high = min(known), max(known)
    return (low[1] if low[0] < 0.0 else None, high[1] if high[0] > 0.0 else None)


def _index(record: AuditRecord, behaviour: str | None) -> int:
    names = [facts.name for facts in record.behaviours]
    if behaviour is None and names:
        return 0
    if behaviour not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise OptionError(
            f"the audit has no behaviour {behaviour!r}; it has {known}. Give one of these names."
        )
    return names.index(behaviour)

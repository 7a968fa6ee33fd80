"""How an audit was conducted, in plain lines: what it spent, why it stopped, placebos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from culpa.auditing.record import AuditRecord, WindowFinding
from culpa.report.numbers import NEGLIGIBLE, magnitude, plural, signed
from culpa.report.table import largest_effect

WINDOWS: Final = 20
"""Windows of a search that the page lists."""


def conduct(record: AuditRecord, *, ascii_only: bool = False) -> Iterator[str]:
    """The lines, each a sentence or two; none for a record that holds nothing of it."""
    yield from spending(record)
    yield from placebos(record, ascii_only=ascii_only)
    yield from record.tradeoffs
    yield from searching(record)


def spending(record: AuditRecord) -> Iterator[str]:
    """What was spent and why no more was; where first place is open."""
    if not record.stopped:
        return
    made = len(record.spent)
    yield (
        f"Spent {record.used:.2f} of {record.budget:g} trainings on replays and placebos"
        f" ({plural(made, 'job')} with the screening). Stopped because {record.stopped}."
    )
    names = [b.name for b, sure in zip(record.behaviours, record.settled, strict=False) if not sure]
    if names:
        yield (
            f"Not settled at 95 %: which stage comes first for {', '.join(names)}. A larger budget"
            " may settle it."
        )


def placebos(record: AuditRecord, *, ascii_only: bool = False) -> Iterator[str]:
    """For each behaviour what disturbances that mean nothing did to it."""
    for q, facts in enumerate(record.behaviours):
        moved = [p.effects[q] for p in record.placebos if p.kind == "rounding"]
        neutral = [p.effects[q] for p in record.placebos if p.kind != "rounding"]
        if not moved and not neutral:
            continue
        parts: list[str] = []
        if moved:
            size = max(map(abs, moved))
            told = f"up to {magnitude(size, digits=2, ascii_only=ascii_only)} {facts.unit}"
            if size < NEGLIGIBLE * largest_effect(record, q):
                told = "less than a thousandth of the largest effect"
            parts.append(f"rounding noise moved {facts.name} by {told}")
        if neutral:
            skipped = signed(max(neutral, key=abs), digits=2, ascii_only=ascii_only)
            parts.append(
                f"skipping a neutral update moved {'it' if moved else facts.name} by {skipped}"
                f" {facts.unit} beyond its score"
            )
        yield f"Placebo: {'; '.join(parts)}."


def searching(record: AuditRecord) -> Iterator[str]:
    """What was done to find single culprits."""
    shown = [w for w in record.windows if w.replayed is not None]
    if shown:
        yield (
            f"Searched for single culprits: {plural(len(record.windows), 'window')} examined,"
            f" {len(shown)} of them left out and replayed. Two culprits that undo each other inside"
            " of one window look innocent together."
        )


def windows(record: AuditRecord) -> list[WindowFinding]:
    """The windows worth listing: those replayed, largest effect first, then the largest jumps."""

    def size(window: WindowFinding) -> tuple[bool, float]:
        numbers = window.jumps if window.replayed is None else window.replayed
        return window.replayed is None, -max(map(abs, numbers), default=0.0)

    return sorted(record.windows, key=size)[:WINDOWS]

"""The audit in a terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import msgspec
import pytest
from rich.console import Console
from rich.table import Table

from culpa.auditing.record import AuditRecord
from culpa.errors import OptionError
from culpa.report.numbers import half_width, signed
from culpa.report.table import build as build_table
from culpa.report.table import largest_effect, tables, to_text


def shown(table: Table, *, width: int = 80, colour: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    console.print(table)
    return file.getvalue()


def line_with(text: str, part: str) -> str:
    return next(line for line in text.splitlines() if part in line)


def test_one_table_a_behaviour_one_row_a_stage(record: AuditRecord) -> None:
    made = tables(record)
    assert [t.row_count for t in made] == [len(record.stages)] * len(record.behaviours)
    for q, (facts, table) in enumerate(zip(record.behaviours, made, strict=True)):
        text = shown(table, width=120)
        assert facts.name in text
        assert text.count(f"[{facts.unit}]") == 3
        for stage in record.stages:
            cells = line_with(text, stage.name).replace(stage.name, "").split()
            true = stage.replayed[q]
            assert cells[:3] == [
                signed(stage.scores[q]),
                signed(stage.effects[q]),
                "-" if true is None else signed(true),
            ]
            assert cells[3] == half_width(stage.intervals[q], largest_effect(record, q))
            assert " ".join(cells[4:]) == stage.grades[q]


def test_tables_are_readable_at_80_columns(record: AuditRecord) -> None:
    text = to_text(record)
    assert max(map(len, text.splitlines())) <= 80
    for stage in record.stages:
        for q in range(len(record.behaviours)):
            assert signed(stage.effects[q], ascii_only=True) in text
    assert all(not line.endswith(" ") for line in text.splitlines())
    assert text.replace("°", "").isascii()
    assert "…" not in text


def test_the_digits_of_rounding_are_not_shown(record: AuditRecord) -> None:
    tiny = [msgspec.structs.replace(s, intervals=[1e-7] * 3) for s in record.stages]
    text = shown(tables(msgspec.structs.replace(record, stages=tiny))[0], width=120)
    assert text.count(" ~0 ") == len(tiny)
    assert half_width(0.0123, 1.0) == "0.012"
    assert half_width(math.nan, 1.0) == half_width(None, 1.0) == "-"


def test_what_is_not_known_is_a_dash(build: Callable[..., AuditRecord]) -> None:
    record = build(stages=["only"], replayed=False)
    bare = msgspec.structs.replace(record.stages[0], intervals=[], grades=[], estimated=False)
    cells = line_with(shown(tables(msgspec.structs.replace(record, stages=[bare]))[0]), "only")
    assert cells.split()[2:] == ["-", "-", "-", bare.grade]


def test_the_most_blamed_stage_is_red_and_the_most_credited_green(record: AuditRecord) -> None:
    text = shown(build_table(record), width=120, colour=True)
    coloured = [stage.name for stage in record.stages if "\x1b[31m" in line_with(text, stage.name)]
    green = [stage.name for stage in record.stages if "\x1b[32m" in line_with(text, stage.name)]
    known = {
        s.name: s.effects[0] if s.replayed[0] is None else s.replayed[0] for s in record.stages
    }
    assert coloured == [min(known, key=known.__getitem__)]
    assert green == [max(known, key=known.__getitem__)]


def test_no_stage_is_blamed_that_raised_the_behaviour(build: Callable[..., AuditRecord]) -> None:
    record = build(stages=["only"], replayed=False)
    stage = msgspec.structs.replace(record.stages[0], effects=[0.1, -0.1, math.nan])
    first, second, third = tables(msgspec.structs.replace(record, stages=[stage]))
    assert "\x1b[31m" not in shown(first, colour=True)
    assert "\x1b[32m" in shown(first, colour=True)
    assert "\x1b[32m" not in shown(second, colour=True)
    assert "\x1b[31m" in shown(second, colour=True)
    assert "\x1b[31m" not in shown(third, colour=True)
    assert "not finite" in shown(third)


def test_names_are_text_not_markup(build: Callable[..., AuditRecord]) -> None:
    record = build(
        stages=["[red]alarm[/]", "\x1b[2Jwipe", ":boom:"], behaviours=[("[b]x[/b]", "[u]")]
    )
    text = to_text(record)
    assert "[red]alarm[/]" in text
    assert "[b]x[/b]" in text
    assert ":boom:" in text
    assert "\x1b" not in text
    assert "\x1b[2J" not in shown(build_table(record), colour=True)


def test_long_names_are_folded_not_cut(build: Callable[..., AuditRecord]) -> None:
    text = to_text(build(stages=["x" * 100, "y"], behaviours=[("z" * 100, "a unit of many words")]))
    assert text.count("x") == 100
    assert text.count("z") == 100
    assert max(map(len, text.splitlines())) <= 80


def test_a_behaviour_is_chosen_by_name(record: AuditRecord) -> None:
    name = record.behaviours[1].name
    assert shown(build_table(record, name)) == shown(tables(record)[1])
    assert shown(build_table(record)) == shown(tables(record)[0])
    with pytest.raises(OptionError, match=r"no behaviour 'nope'; it has 'log-likelihood"):
        build_table(record, "nope")


def test_an_audit_without_behaviours_has_no_table(build: Callable[..., AuditRecord]) -> None:
    record = build(behaviours=[])
    assert tables(record) == []
    assert to_text(record) == "This audit has no behaviours.\n"
    with pytest.raises(OptionError, match="none"):
        build_table(record)


def test_a_record_that_contradicts_itself_is_refused(record: AuditRecord) -> None:
    short = msgspec.structs.replace(record.stages[0], scores=[1.0])
    with pytest.raises(OptionError, match="scores has 1 entries for 3 behaviours"):
        tables(msgspec.structs.replace(record, stages=[short]))
    with pytest.raises(OptionError, match="format 99"):
        tables(msgspec.structs.replace(record, format=99))

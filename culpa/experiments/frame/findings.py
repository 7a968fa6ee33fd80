"""What an experiment found, as JSON: claims, tables, figures, and where they come from."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Claim(Struct, frozen=True):
    """One sentence of what an experiment must show.

    ``holds``: whether it did here; ``numbers``: by which measurement, in words.
    """

    text: str
    holds: bool
    numbers: str


class Table(Struct, frozen=True):
    """A table; cells are text, formatted by the experiment. ``note`` stands below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


class Figure(Struct, frozen=True):
    """A figure: a complete Vega-Lite specification, its data included.

    ``name`` is a part of the file's name: lower case, hyphens.
    """

    name: str
    caption: str
    spec: dict[str, Any]


class Findings(Struct, frozen=True, kw_only=True):
    """What ``run`` returns.

    Attributes:
        settings: a sentence or two: model, data, optimizer, what the truth is.
        claims: what had to be shown, and whether it was.
        tables, figures: as they stand on the page.
        stand_ins: what replaces the paper's data or weights; empty where nothing does.
        notes: what a reader should know: where we and the paper differ, what the paper leaves open.
    """

    settings: str
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...] = ()
    stand_ins: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class RunFacts(Struct, frozen=True):
    """A recorded run that ``culpa verify`` accepted: part and name, root digest, updates."""

    name: str
    root_digest: str
    updates: int


class Result(Struct, frozen=True, kw_only=True):
    """Findings with all that a caption names.

    ``minutes``: processor minutes of its parts, those of earlier, interrupted runs included.
    """

    experiment: str
    title: str
    paper: str
    must_show: str
    scale: str
    seeds: tuple[int, ...]
    machine: str
    minutes: float
    findings: Findings
    runs: tuple[RunFacts, ...]

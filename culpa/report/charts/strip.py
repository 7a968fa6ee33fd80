"""The strip: what every single update did to one behaviour, over the stages it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from culpa.report.charts.scale import GRADES, domain, grade_index, reach
from culpa.report.charts.theme import (
    AUTOSIZE,
    SIGNED_LABEL,
    Drawing,
    axis_words,
    config,
    grade_opacity,
    import_altair,
    sign_colour,
)
from culpa.report.numbers import NOT_FINITE, finite

HEIGHT: Final = 260
ZOOM: Final = "zoom"
"""Name of the interval selection; the page's buttons set its signal ``zoom_k``."""
_SEEN_START: Final = "clamp(scale('x', datum.a), 0, width)"
_SEEN_STOP: Final = "clamp(scale('x', datum.b), 0, width)"
_PIXELS_PER_UPDATE: Final = "(scale('x', 1) - scale('x', 0))"


@dataclass(frozen=True, kw_only=True)
class Stem:
    """One update on one behaviour, inside of stage number ``stage`` (-1: of none)."""

    update: int
    stage: int
    score: float | None
    grade: str
    growth: float | None
    displacement: float | None
    learning_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Band:
    """The updates ``[start, stop)`` of one stage."""

    stage: str
    start: int
    stop: int


def update_strip(
    stems: Sequence[Stem],
    bands: Sequence[Band],
    *,
    num_updates: int,
    behaviour: str,
    unit: str,
    description: str,
) -> Drawing:
    """Every (kept) update as a stem from zero to its score, over the shaded stages."""
    alt = import_altair()
    rows = [_stem_row(stem) for stem in stems]
    limit = reach([row["s"] for row in rows if row["g"] < 2], [row["s"] for row in rows])
    low, high = domain([row["s"] for row in rows], limit)
    ends = (low, high + 0.1 * (high - low))  # room for the names of the stages
    whole = alt.Scale(domain=[-0.5, max(0.5, num_updates - 0.5)], nice=False)
    axis = alt.Axis(
        title="update",
        labelExpr="datum.value % 1 == 0 ? format(datum.value, ',d') : ''",
        tickMinStep=1,
        grid=False,
        domain=False,
        tickCount=alt.expr("max(3, floor(width / 90))"),
    )
    x = alt.X("k:Q", scale=whole, axis=axis)
    y = alt.Y(
        "y:Q",
        scale=alt.Scale(domain=ends, nice=False),
        title=None,
        axis=alt.Axis(labelExpr=SIGNED_LABEL, tickCount=5, minExtent=44),
    )
    stages = [
        {"t": i, "name": band.stage, "a": band.start - 0.5, "b": band.stop - 0.5, "odd": i % 2}
        for i, band in enumerate(bands)
    ]
    shades = alt.Chart(alt.NamedData("stages"))
    shade = shades.encode(
        x=alt.X("a:Q", scale=whole, axis=axis),
        x2="b:Q",
        fill=alt.condition(
            "datum.odd", alt.value("var(--band-odd)"), alt.value("var(--band-even)")
        ),
    ).mark_rect(aria=False, clip=True, tooltip=None)
    name = shades.encode(
        text="name:N", x=alt.value(alt.expr(f"{_SEEN_START} + 5")), y=alt.value(11)
    ).mark_text(
        align="left",
        fontSize=11,
        fontWeight=600,
        color="var(--muted)",
        aria=False,
        clip=True,
        limit=alt.expr(f"max(1, {_SEEN_STOP} - {_SEEN_START} - 10)"),
        opacity=alt.expr(f"{_SEEN_STOP} - {_SEEN_START} < 28 ? 0 : 1"),
    )
    zero = alt.Chart(alt.NamedData("origin")).mark_rule(color="var(--axis)", aria=False)
    points = (
        alt.Chart(alt.NamedData("updates"))
        .transform_lookup(
            lookup="t", from_=alt.LookupData(alt.NamedData("stages"), key="t", fields=["name"])
        )
        .transform_calculate(
            y=f"isValid(datum.s) ? clamp(datum.s, -{limit!r}, {limit!r}) : null",
            sign="datum.s < 0 ? 'lowered' : 'raised'",
            grade="['" + "', '".join(GRADES) + "'][datum.g]",
        )
        .encode(x=x, y=y, color=sign_colour(alt), tooltip=_stem_tooltip(alt))
    )
    zoom = alt.selection_interval(
        name=ZOOM,
        bind="scales",
        encodings=["x"],
        zoom="wheel![event.ctrlKey || event.metaKey || event.shiftKey]",
    )
    per_update = max(1.0, num_updates / max(1, len(stems)))
    stem = points.encode(y2=alt.datum(0), strokeOpacity=grade_opacity(alt)).mark_rule(
        aria=False,
        clip=True,
        strokeWidth=alt.expr(f"clamp({0.72 * per_update} * {_PIXELS_PER_UPDATE}, 1.25, 12)"),
    )
    off = points.transform_filter(f"isValid(datum.s) && abs(datum.s) > {limit!r}").mark_point(
        shape=alt.expr("datum.s > 0 ? 'triangle-up' : 'triangle-down'"),
        size=50,
        filled=True,
        opacity=1,
        aria=False,
        clip=True,
    )
    lost = (
        points.transform_filter("!isValid(datum.s)")
        .encode(y=alt.datum(0), color=alt.value("var(--ink)"))
        .mark_point(shape="cross", angle=45, size=60, filled=True, aria=False, clip=True)
    )
    meaning = (f"effect on {behaviour} [{unit}]", "> 0: the update raised it")
    layers = alt.layer(shade, zero.encode(y=alt.datum(0)), stem.add_params(zoom), off, lost, name)
    spec = (
        axis_words(alt, layers, *meaning, orient="top")
        .properties(
            autosize=AUTOSIZE,
            width="container",
            height=HEIGHT,
            description=description,
            padding={"left": 0, "right": 8, "top": 4, "bottom": 4},
        )
        .configure(**config())
        .to_dict()
    )
    spec["datasets"] = {"updates": rows, "stages": stages, "origin": [{"zero": 0}]}
    return Drawing(spec=spec, left_out=_left_out([row["s"] for row in rows], limit))


def _stem_row(stem: Stem) -> dict[str, Any]:
    """Keys of one letter: the page carries thousands of these."""
    return {
        "k": stem.update,
        "t": stem.stage,
        "s": _rounded(stem.score),
        "g": grade_index(stem.grade),
        "w": _rounded(stem.growth),
        "d": _rounded(stem.displacement),
        "l": _rounded(stem.learning_rate),
    }


def _rounded(value: float | None) -> float | None:
    kept = finite(value)
    return None if kept is None else float(f"{kept:.4g}")


def _stem_tooltip(alt: Any) -> list[Any]:
    numbers = (("s", "+.3"), ("w", ".3"), ("d", ".3"), ("l", ".3"))
    titles = {"s": "effect", "w": "growth", "d": "displacement", "l": "learning rate"}
    return [
        alt.Tooltip("k:Q", title="update", format=",d"),
        alt.Tooltip("name:N", title="stage"),
        *(alt.Tooltip(f"{key}:Q", title=titles[key], format=f"{form}~g") for key, form in numbers),
        alt.Tooltip("grade:N", title="grade"),
    ]


def _left_out(scores: Sequence[float | None], limit: float) -> str:
    far = sum(score is not None and abs(score) > limit for score in scores)
    lost = sum(score is None for score in scores)
    notes: list[str] = []
    if far:
        notes.append(f"Beyond the axis, drawn as a triangle at its edge: {far}.")
    if lost:
        notes.append(f"Score {NOT_FINITE}, drawn as a cross on the zero line: {lost}.")
    return " ".join(notes)

"""Stage bars: what each stage did to one behaviour, estimated and, where replayed, in truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from culpa.report.charts.scale import clamp, domain, grade_index, reach
from culpa.report.charts.theme import (
    AUTOSIZE,
    SIGNED_LABEL,
    Drawing,
    axis_words,
    by_width,
    config,
    grade_opacity,
    import_altair,
    sign_colour,
)
from culpa.report.numbers import NOT_FINITE, finite, magnitude, signed

NOT_KNOWN: Final = "not known"
ROOMY: Final = 12
"""Up to so many stages have roomy rows; more stand closer together."""


def row_height(stages: int) -> int:
    """Pixels a stage takes in the chart of so many."""
    return 38 if stages <= ROOMY else 24


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One stage on one behaviour. Numbers may be NaN or infinite; positive: the stage raised it.

    ``effect`` is ``None`` where it was neither estimated nor replayed.
    """

    stage: str
    effect: float | None
    score: float | None
    replayed: float | None
    grade: str
    interval: float | None = None
    """Half-width at 95 % around the replayed effect or else the estimate; not finite: unknown."""
    floor: float | None = None
    """Half-width of what is chaos, by placebos; not finite: unknown."""

    @property
    def best(self) -> float | None:
        """The replayed effect or else the estimate."""
        return finite(self.effect if self.replayed is None else self.replayed)


def stage_bars(bars: Sequence[Bar], *, behaviour: str, unit: str, description: str) -> Drawing:
    """Horizontal bars, one a stage: estimate (bar), AA-Score (tick), replayed truth (diamond).

    A thin line is the interval of the best number, a grey band around zero what is chaos.
    """
    alt = import_altair()
    row = row_height(len(bars))
    limit = reach(
        [bar.replayed for bar in bars]
        + [x for bar in bars if grade_index(bar.grade) < 2 for x in (bar.effect, bar.score)],
        [x for bar in bars if grade_index(bar.grade) == 2 for x in (bar.effect, bar.score)]
        + [x for bar in bars for x in (*_interval(bar), bar.floor)],
    )
    rows = [_bar_row(i, bar, limit) for i, bar in enumerate(bars)]
    ends = domain(
        [values[key] for values in rows for key in ("effect", "score", "replayed", "low", "high")],
        limit,
    )
    meaning = (f"effect on {behaviour} [{unit}]", "> 0: the stage raised it")
    base = alt.Chart(alt.NamedData("stages")).encode(
        y=alt.Y(
            "i:O", title=None, axis=_name_axis(alt), scale=alt.Scale(domain=list(range(len(bars))))
        ),
        tooltip=[
            alt.Tooltip(f"{field}:N", title=label)
            for field, label in (
                ("name", "stage"),
                ("effect_text", "estimated effect"),
                ("score_text", "AA-Score"),
                ("replayed_text", "true effect"),
                ("interval_text", "± at 95 %"),
                ("floor_text", "chaos within ±"),
                ("grade_text", "grade"),
            )
        ],
    )
    axis = alt.Axis(
        grid=True,
        labelExpr=SIGNED_LABEL,
        tickCount=alt.expr("max(3, floor(width / 80))"),
    )
    scale = alt.Scale(domain=ends, nice=False)
    effect = base.encode(x=alt.X("effect:Q", title=None, axis=axis, scale=scale))
    bar = effect.mark_bar(height=row // 2, aria=False, strokeWidth=1.25).encode(
        color=sign_colour(alt), stroke=sign_colour(alt), fillOpacity=grade_opacity(alt)
    )
    zero = alt.Chart(alt.NamedData("origin")).mark_rule(color="var(--axis)", aria=False)
    chaos = base.encode(x="floor_low:Q", x2="floor_high:Q").mark_bar(
        height=row - 6, color="var(--axis)", opacity=0.28, aria=False
    )
    whisker = base.encode(x="low:Q", x2="high:Q").mark_rule(
        color="var(--ink)", strokeWidth=1.5, opacity=1, aria=False
    )
    halo = base.encode(x="score:Q").mark_tick(
        color="var(--surface)", thickness=5, height=0.74 * row, opacity=1, aria=False
    )
    tick = base.encode(x="score:Q").mark_tick(
        color="var(--ink)", thickness=2.5, height=0.68 * row, opacity=1, aria=False
    )
    diamond = base.encode(x="replayed:Q").mark_point(
        shape="diamond",
        size=3 * row,
        filled=True,
        fill="var(--surface)",
        stroke="var(--ink)",
        strokeWidth=2,
        opacity=1,
        aria=False,
    )
    off = (
        base.transform_filter("isValid(datum.off)")
        .encode(x="off:Q", color=sign_colour(alt))
        .mark_point(
            shape=alt.expr("datum.off > 0 ? 'triangle-right' : 'triangle-left'"),
            size=90,
            xOffset=alt.expr("datum.off > 0 ? 8 : -8"),
            filled=True,
            stroke="var(--surface)",
            strokeWidth=1,
            opacity=1,
            aria=False,
        )
    )
    label = base.encode(text="label:N", x=alt.value("width")).mark_text(
        align="left", dx=10, color="var(--ink)", fontSize=12, aria=False
    )
    origin = zero.encode(x=alt.datum(0))
    layers = alt.layer(origin, bar, chaos, whisker, halo, tick, off, diamond, label)
    spec = (
        axis_words(alt, layers, *meaning, orient="bottom")
        .add_params(alt.param(name="names", value=[bar.stage for bar in bars]))
        .properties(
            autosize=AUTOSIZE,
            width="container",
            height=row * len(bars),
            description=description,
            padding={"left": 0, "right": 4, "top": 4, "bottom": 4},
        )
        .configure(**config())
        .to_dict()
    )
    spec["datasets"] = {"stages": rows, "origin": [{"zero": 0}]}
    return Drawing(spec=spec, left_out=_bars_left_out(bars, limit))


def _bar_row(i: int, bar: Bar, limit: float) -> dict[str, Any]:
    effect, score, replayed = finite(bar.effect), finite(bar.score), finite(bar.replayed)
    beyond = effect is not None and abs(effect) > limit
    low, high = _interval(bar)
    floor = finite(bar.floor)
    return {
        "i": i,
        "name": bar.stage,
        "effect": None if effect is None else clamp(effect, limit),
        "score": None if score is None or abs(score) > limit else score,
        "replayed": replayed,
        "low": None if low is None else clamp(low, limit),
        "high": None if high is None else clamp(high, limit),
        "floor_low": None if floor is None else -min(floor, limit),
        "floor_high": None if floor is None else min(floor, limit),
        "off": clamp(effect, limit) if effect is not None and beyond else None,
        "sign": "lowered" if effect is not None and effect < 0.0 else "raised",
        "g": grade_index(bar.grade),
        "label": in_words(bar.effect if bar.replayed is None else bar.replayed),
        "effect_text": in_words(bar.effect),
        "score_text": NOT_KNOWN if bar.effect is None else signed(bar.score),
        "replayed_text": "not replayed" if bar.replayed is None else signed(bar.replayed),
        "interval_text": _known(bar.interval),
        "floor_text": _known(bar.floor),
        "grade_text": bar.grade,
    }


def _interval(bar: Bar) -> tuple[float | None, float | None]:
    """The ends of its interval, where both are known."""
    best, half = bar.best, finite(bar.interval)
    return (None, None) if best is None or half is None else (best - half, best + half)


def _known(value: float | None) -> str:
    return NOT_KNOWN if finite(value) is None else magnitude(value)


def in_words(effect: float | None) -> str:
    """An effect with its sign, or that it is not known."""
    return NOT_KNOWN if effect is None else signed(effect)


def _name_axis(alt: Any) -> Any:
    return alt.Axis(
        labelExpr="names[datum.value]",
        labelLimit=alt.expr(by_width(92, 240)),
        labelFontSize=12.5,
        labelColor="var(--ink)",
        labelPadding=10,
        ticks=False,
        domain=False,
    )


def _bars_left_out(bars: Sequence[Bar], limit: float) -> str:
    far = [f"{bar.stage} ({signed(bar.effect)})" for bar in bars if _beyond(bar.effect, limit)]
    lost = [bar.stage for bar in bars if bar.effect is not None and finite(bar.effect) is None]
    unknown = [bar.stage for bar in bars if bar.effect is None and bar.replayed is None]
    notes: list[str] = []
    if far:
        notes.append(f"Beyond the axis, drawn as an arrow at its edge: {', '.join(far)}.")
    if lost:
        notes.append(f"Estimate {NOT_FINITE}, no bar: {', '.join(lost)}.")
    if unknown:
        notes.append(f"Neither estimated nor replayed, no bar: {', '.join(unknown)}.")
    return " ".join(notes)


def _beyond(value: float | None, limit: float) -> bool:
    kept = finite(value)
    return kept is not None and abs(kept) > limit

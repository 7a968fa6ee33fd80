"""What the charts have in common: colours, axes, the way numbers become solid or pale.

Colours are CSS variables of the page (``var(--raise)``), so that the same drawing follows light,
dark and print without being drawn again. Text of the record enters a chart as data only, never as
a field name or an expression, so nothing in it can act.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from culpa.errors import UnsupportedError
from culpa.report.charts.scale import GRADES

FONT: Final = (
    "Inter, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', Arial, sans-serif"
)
OPACITY: Final = (0.95, 0.55, 0.22)
"""How solid a number is drawn, by grade: trusted, doubtful, not identified."""
AUTOSIZE: Final = {"type": "fit-x", "contains": "padding"}
"""As wide as its container, padding included."""
SIGNED_LABEL: Final = "datum.value == 0 ? '0' : format(datum.value, '+~g')"
"""Axis labels with the sign written out, as a Vega expression."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A Vega-Lite specification, and the sentence that says what the axis had to leave out."""

    spec: dict[str, Any]
    left_out: str


def import_altair() -> Any:
    """Altair, or an error that says how to get it."""
    try:
        import altair
    except ImportError as error:
        raise UnsupportedError(
            "the HTML report needs Altair, vl-convert and Jinja2, and Altair is not installed. "
            "Run: pip install 'culpa[report]'. The terminal table and the JSON need none of them."
        ) from error
    return altair


def by_width(narrow: int, wide: int) -> str:
    """A Vega expression: one number on a phone, another on anything wider."""
    return f"containerSize()[0] < 520 ? {narrow} : {wide}"


def axis_words(alt: Any, chart: Any, what: str, sign: str, *, orient: str) -> Any:
    """``chart`` with what its number axis means in words: one line, or two where it is narrow.

    A title of the axis itself would be cut at the end of a short axis or squeeze the plot.
    """
    return chart.add_params(
        alt.param(name="one_line", value=[f"{what}; {sign}"]),
        alt.param(name="two_lines", value=[what, sign]),
    ).properties(
        title=alt.TitleParams(
            text=alt.expr("containerSize()[0] < 520 ? two_lines : one_line"),
            limit=alt.expr("containerSize()[0]"),
            orient=orient,
            offset=12 if orient == "bottom" else 8,
        )
    )


def sign_colour(alt: Any) -> Any:
    """Colour by the field ``sign``: blue raised, orange lowered, apart for any colour vision."""
    scale = alt.Scale(domain=["raised", "lowered"], range=["var(--raise)", "var(--lower)"])
    return alt.Color("sign:N", legend=None, scale=scale)


def grade_opacity(alt: Any) -> Any:
    """Opacity by the field ``g``, the index of the grade."""
    scale = alt.Scale(type="ordinal", domain=list(range(len(GRADES))), range=list(OPACITY))
    return alt.Opacity("g:O", legend=None, scale=scale)


def config() -> dict[str, Any]:
    """Vega-Lite configuration shared by every chart."""
    axis = {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "gridColor": "var(--grid)",
        "domainColor": "var(--axis)",
        "tickColor": "var(--axis)",
        "labelFontSize": 11.5,
        "titleFontSize": 11.5,
        "titleFontWeight": "normal",
        "titlePadding": 10,
    }
    title = {
        "color": "var(--muted)",
        "fontSize": 11.5,
        "fontWeight": "normal",
        "anchor": "start",
        "frame": "bounds",
        "offset": 8,
        "lineHeight": 16,
    }
    return {
        "background": "transparent",
        "font": FONT,
        "axis": axis,
        "axisY": {"grid": False},
        "title": title,
        "view": {"stroke": None},
    }

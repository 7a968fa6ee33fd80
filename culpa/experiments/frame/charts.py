"""Charts of the pages, as plain Vega-Lite with their data: strips, lines, bars.

Drawn by vl-convert without a browser. Colours: blue for what raised a behaviour or is the default,
orange for what lowered it, grey for context; they differ in lightness too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

SCHEMA: Final = "https://vega.github.io/schema/vega-lite/v6.json"
BLUE, ORANGE, GREY, INK = "#1f5fa8", "#d2691e", "#a9b0b7", "#24292f"
SERIES: Final = ("#24292f", "#d2691e", "#1f5fa8", "#2a8c82", "#8250a8", "#b8860b", "#a9b0b7")
GRADES: Final = ("#2a8c4a", "#e0a100", "#c62828")
"""Green, yellow, red."""
Row = Mapping[str, Any]


def chart(*, title: str = "", **parts: Any) -> dict[str, Any]:
    """A complete specification: ``parts`` are Vega-Lite's own (data, layer, encoding ...)."""
    spec: dict[str, Any] = {"$schema": SCHEMA, **parts}
    if title:
        spec["title"] = title
    spec["config"] = {
        "background": "#ffffff",
        "aria": False,  # a text for every mark would be most of the file; the page has the numbers
        "font": "Liberation Sans, Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {"gridColor": "#e7eaed", "domainColor": GREY, "tickColor": GREY},
        "title": {"anchor": "start", "fontSize": 12, "fontWeight": "normal", "color": INK},
        "header": {"titleFontSize": 0, "labelFontSize": 12, "labelColor": INK},
    }
    return spec


def strips(
    rows: Sequence[Row], *, x: str, y: str, panel: str, panels: Sequence[str], columns: int = 2
) -> dict[str, Any]:
    """One bar an update, one panel for each behaviour; marked updates in orange.

    ``rows`` have ``x`` (number), ``value``, ``marked`` (bool), ``panel``, and may have ``truth``,
    drawn as a point. ``x`` and ``y`` are the axes' titles.
    """
    across = {"field": "x", "type": "quantitative", "title": x, "scale": {"nice": False}}
    layer: list[dict[str, Any]] = [
        {
            "mark": {"type": "bar", "width": 2},
            "encoding": {
                "x": across,
                "y": {"field": "value", "type": "quantitative", "title": y},
                "color": {
                    "field": "marked",
                    "type": "nominal",
                    "legend": None,
                    "scale": {"domain": [False, True], "range": [BLUE, ORANGE]},
                },
            },
        }
    ]
    if any("truth" in row for row in rows):
        point = {"type": "point", "size": 9, "color": INK, "strokeWidth": 1, "opacity": 0.8}
        layer.append(
            {
                "mark": point,
                "encoding": {"x": across, "y": {"field": "truth", "type": "quantitative"}},
            }
        )
    return chart(
        data={"values": [dict(row) for row in rows]},
        facet={"field": "panel", "type": "nominal", "sort": list(panels), "title": None},
        columns=columns,
        spec={"width": 330, "height": 130, "layer": layer},
        resolve={"scale": {"y": "independent"}},
    )


def lines(
    rows: Sequence[Row],
    *,
    x: Mapping[str, Any],
    y: Mapping[str, Any],
    series: Sequence[str],
    panels: Sequence[str] = (),
    width: int = 230,
    height: int = 220,
    columns: int = 3,
) -> dict[str, Any]:
    """Lines with points, coloured by ``series``; ``rows`` have x, y, series and, maybe, panel.

    ``x`` and ``y`` are encodings without their field.
    """
    colour = {
        "field": "series",
        "type": "nominal",
        "sort": list(series),
        "title": None,
        "scale": {"domain": list(series), "range": list(SERIES[: len(series)])},
        "legend": {"labelLimit": 320, "orient": "bottom", "columns": 3},
    }
    both = {
        "x": {"field": "x", "type": "quantitative", **x},
        "y": {"field": "y", "type": "quantitative", **y},
        "color": colour,
    }
    inner: dict[str, Any] = {
        "width": width,
        "height": height,
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.8, "clip": True}, "encoding": dict(both)},
            {
                "mark": {"type": "point", "size": 36, "filled": True, "clip": True, "opacity": 1},
                "encoding": dict(both),
            },
        ],
    }
    data = {"values": [dict(row) for row in rows]}
    if not panels:
        return chart(data=data, **inner)
    facet = {"field": "panel", "type": "nominal", "sort": list(panels), "title": None}
    return chart(data=data, facet=facet, columns=columns, spec=inner)


def graded(
    rows: Sequence[Row],
    *,
    x: Mapping[str, Any],
    y: Mapping[str, Any],
    series: Sequence[str],
    panels: Sequence[str],
    grades: Sequence[str],
    title: str,
) -> dict[str, Any]:
    """``lines``, the first series thick and with dots of three colours for its ``grades``.

    ``rows`` have x, y, series, panel, and ``grade``, which is ``None`` but for the first series;
    ``title`` stands over the colours.
    """
    axis = {"grid": False, "format": "~g", "tickCount": 3, "labelSeparation": 14}
    spec = lines(rows, x={**x, "axis": axis}, y=y, series=series, panels=panels)
    line, point = spec["spec"]["layer"]
    line["encoding"]["strokeWidth"] = {
        "condition": {"test": {"field": "series", "equal": series[0]}, "value": 3.2},
        "value": 1.5,
    }
    fill = {
        "field": "grade",
        "type": "nominal",
        "title": title,
        "scale": {"domain": list(grades), "range": list(GRADES)},
        "legend": {"orient": "bottom", "columns": 3},
    }
    point["transform"] = [{"filter": "isValid(datum.grade)"}]
    point["mark"] = {"type": "point", "size": 150, "filled": True, "opacity": 1, "stroke": "white"}
    point["encoding"] = {"x": line["encoding"]["x"], "y": line["encoding"]["y"], "fill": fill}
    return spec | {"resolve": {"scale": {"x": "independent"}}}


def bars(
    rows: Sequence[Row], *, y: str, panels: Sequence[str], order: Sequence[str], columns: int = 3
) -> dict[str, Any]:
    """One bar a category, its truth as a tick; ``rows`` have name, value, truth, marked, panel.

    ``y`` is the axis's title.
    """
    across = {"field": "name", "type": "nominal", "sort": list(order), "title": None}
    axis = {"labelAngle": 0, "labelLimit": 110}
    inner: dict[str, Any] = {
        "width": {"step": 58},
        "height": 170,
        "layer": [
            {
                "mark": {"type": "bar", "width": 30},
                "encoding": {
                    "x": across | {"axis": axis},
                    "y": {"field": "value", "type": "quantitative", "title": y},
                    "color": {
                        "field": "marked",
                        "type": "nominal",
                        "legend": None,
                        "scale": {"domain": [False, True], "range": [BLUE, ORANGE]},
                    },
                },
            },
            {
                "mark": {"type": "tick", "color": INK, "thickness": 2.5, "width": 40},
                "encoding": {"x": across, "y": {"field": "truth", "type": "quantitative"}},
            },
        ],
    }
    return chart(
        data={"values": [dict(row) for row in rows]},
        facet={"field": "panel", "type": "nominal", "sort": list(panels), "title": None},
        columns=columns,
        spec=inner,
        resolve={"scale": {"y": "independent"}},
    )

"""What growth.py found: exponents, and the figure with one panel a quantity, one line a job."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert
from blake3 import blake3

from culpa.experiments.frame.charts import INK, chart, lines


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of log(y) over log(x) where x is at least a tenth of its largest."""
    largest = max(x for x, _ in points)
    upper = [(math.log(x), math.log(y)) for x, y in points if x >= largest / 10 and y > 0]
    slope, _ = statistics.linear_regression(*zip(*upper, strict=True))
    return round(slope, 2)


def exponents(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """How every part grows with every quantity."""
    found = {
        axis: {
            part: exponent([(row[axis], row["seconds"][part]) for row in rows])
            for part in rows[0]["seconds"]
        }
        for axis, rows in results["growth"].items()
    }
    memory = [(row["updates"], row["bytes"]) for row in results["memory"]]
    return found | {"memory": {p: exponent([(k, b[p]) for k, b in memory]) for p in memory[0][1]}}


def picture(results: Mapping[str, Any], titles: Mapping[str, str], parts: Sequence[str]) -> str:
    """Small multiples as SVG, logarithmic in both directions.

    ``titles`` of the horizontal axes, by the names of the panels; ``parts`` are the lines.
    """
    panels = [
        _panel(
            titles[axis],
            "in trainings",
            [
                {"x": row[axis], "y": ratio, "series": part}
                for row in rows
                for part, ratio in row["times plain training"].items()
            ],
            parts,
        )
        for axis, rows in results["growth"].items()
    ]
    memory = results["memory"]
    state = 2 * 4 * memory[0]["parameters"]
    points = [
        {"x": row["updates"], "y": row["bytes"][part] / state, "series": part}
        for row in memory
        for part in parts
        if row["bytes"].get(part, 0) > 0
    ]
    panels.append(_panel("updates K", "memory, in states (dotted: √K)", points, parts))
    panels[-1]["layer"].append(_root([row["updates"] for row in memory]))
    spec = chart(concat=panels, columns=3, spacing=28)
    spec["config"]["axis"] |= {"labelOverlap": True}
    return str(vl_convert.vegalite_to_svg(json.dumps(spec)))


def mark(results: Path) -> str:
    """What the figure says of the file it was drawn from; fonts differ between machines."""
    return f"<!-- of {results.name}, BLAKE3 {blake3(results.read_bytes()).hexdigest()} -->"


def _panel(
    across: str, up: str, rows: Sequence[Mapping[str, Any]], parts: Sequence[str]
) -> dict[str, Any]:
    axis = {"format": "~s", "tickCount": 5}
    spec = lines(
        rows,
        x={"title": across, "scale": {"type": "log"}, "axis": axis},
        y={"title": up, "scale": {"type": "log"}, "axis": axis},
        series=parts,
        width=215,
        height=190,
    )
    return {key: part for key, part in spec.items() if key not in ("$schema", "config")}


def _root(across: Sequence[int]) -> dict[str, Any]:
    """The square root, dotted."""
    rows = [{"x": k, "y": math.sqrt(k)} for k in across]
    return {
        "data": {"values": rows},
        "mark": {"type": "line", "strokeDash": [2, 3], "color": INK, "strokeWidth": 1},
        "encoding": {
            "x": {"field": "x", "type": "quantitative"},
            "y": {"field": "y", "type": "quantitative"},
        },
    }

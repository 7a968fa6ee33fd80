"""What the charts draw, what they cut off, and what they say about it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culpa.auditing.record import AuditRecord
from culpa.report.charts import Band, Bar, Stem, stage_bars, update_strip
from culpa.report.charts.scale import TOLERANCE, domain, grade_index, reach
from culpa.report.charts.thinning import allowance, thin
from culpa.report.matrix import matrix

HOSTILE = "datum['x'] + '; </script>"
maybe_finite = st.one_of(st.none(), st.floats())


def bar(effect: float | None, grade: str = "trusted", **other: Any) -> Bar:
    return Bar(
        **{"stage": "s", "effect": effect, "score": 0.0, "replayed": None, "grade": grade} | other
    )


def stem(update: int, score: float | None, grade: str = "trusted") -> Stem:
    return Stem(
        update=update,
        stage=0,
        score=score,
        grade=grade,
        growth=1.0,
        displacement=0.1,
        learning_rate=0.01,
    )


def draw_bars(*bars: Bar) -> Any:
    return stage_bars(bars, behaviour="clean digits", unit="nats", description="words")


def draw_strip(*stems: Stem) -> Any:
    return update_strip(
        stems,
        [Band(stage=HOSTILE, start=0, stop=len(stems))],
        num_updates=len(stems),
        behaviour=HOSTILE,
        unit="nats",
        description="words",
    )


def every_item(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, value
    children: Any = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from every_item(child, (*path, str(key)))


@given(st.lists(maybe_finite), st.lists(maybe_finite))
def test_an_axis_can_always_be_drawn(good: list[float | None], bad: list[float | None]) -> None:
    limit = reach(good, bad)
    low, high = domain([x for x in good + bad if x is not None and math.isfinite(x)], limit)
    assert 0.0 < limit < math.inf
    assert low <= 0.0 <= high
    assert low < high
    assert math.isfinite(high - low)


def test_a_diverged_estimate_does_not_flatten_the_others() -> None:
    assert reach([0.1, -0.4], [3e9, math.nan]) == 0.4
    assert reach([0.1, -0.4], [TOLERANCE * 0.4]) == TOLERANCE * 0.4
    assert reach([], [3e9]) == 3e9
    assert reach([0.0], [0.0]) == 1.0


def test_unknown_grades_count_as_not_identified() -> None:
    assert [grade_index(g) for g in ("trusted", "doubtful", "not identified", "new")] == [
        0,
        1,
        2,
        2,
    ]


def test_bars_show_estimate_score_and_truth() -> None:
    drawing = draw_bars(bar(0.25, score=0.3, replayed=0.2), bar(-0.5, "doubtful"))
    rows = drawing.spec["datasets"]["stages"]
    assert [(r["effect"], r["score"], r["replayed"]) for r in rows] == [
        (0.25, 0.3, 0.2),
        (-0.5, 0.0, None),
    ]
    assert [(r["sign"], r["g"]) for r in rows] == [("raised", 0), ("lowered", 1)]
    assert [r["label"] for r in rows] == ["+0.200", "−0.500"]  # the best number of each
    assert [r["replayed_text"] for r in rows] == ["+0.200", "not replayed"]
    params = {param["name"]: param["value"] for param in drawing.spec["params"] if "value" in param}
    assert params["two_lines"] == ["effect on clean digits [nats]", "> 0: the stage raised it"]
    assert params["one_line"] == ["effect on clean digits [nats]; > 0: the stage raised it"]
    assert drawing.left_out == ""
    assert drawing.spec["description"] == "words"


def test_intervals_surround_the_best_number_and_placebos_zero() -> None:
    drawing = draw_bars(
        bar(0.25, replayed=0.2, interval=0.05, floor=0.01),
        bar(-0.5, interval=0.1, floor=math.nan),
        bar(0.3, interval=math.inf),
    )
    rows = drawing.spec["datasets"]["stages"]
    assert [(r["low"], r["high"]) for r in rows] == [
        (pytest.approx(0.15), pytest.approx(0.25)),
        (pytest.approx(-0.6), pytest.approx(-0.4)),
        (None, None),
    ]
    assert [(r["floor_low"], r["floor_high"]) for r in rows] == [
        (-0.01, 0.01),
        (None, None),
        (None, None),
    ]
    assert [r["interval_text"] for r in rows] == ["0.0500", "0.100", "not known"]
    ends = [
        value
        for path, value in every_item(drawing.spec)
        if path[-2:] == ("scale", "domain") and "x" in path
    ]
    assert ends
    assert all(low < -0.6 for low, _ in ends)  # the axis reaches the end of the longest whisker


def test_bars_say_what_lies_beyond_the_axis_and_what_is_not_finite() -> None:
    drawing = draw_bars(
        bar(0.2),
        bar(-3e9, "not identified", stage="wild"),
        bar(math.nan, "not identified", stage="lost"),
    )
    rows = drawing.spec["datasets"]["stages"]
    assert [r["effect"] for r in rows] == [0.2, -0.2, None]
    assert [r["off"] for r in rows] == [None, -0.2, None]
    assert [r["label"] for r in rows] == ["+0.200", "−3.00×10⁹", "not finite"]
    assert "wild (−3.00×10⁹)" in drawing.left_out
    assert "lost" in drawing.left_out


def test_strip_shows_every_update_given() -> None:
    drawing = draw_strip(
        stem(0, 0.1), stem(1, math.inf), stem(2, -9e9, "not identified"), stem(3, -0.2)
    )
    rows = drawing.spec["datasets"]["updates"]
    assert [(r["k"], r["s"]) for r in rows] == [(0, 0.1), (1, None), (2, -9e9), (3, -0.2)]
    assert "triangle at its edge: 1." in drawing.left_out
    assert "cross on the zero line: 1." in drawing.left_out


@settings(max_examples=6)
@given(st.lists(st.tuples(maybe_finite, maybe_finite), min_size=1, max_size=6))
def test_every_drawing_is_json(numbers: list[tuple[float | None, float | None]]) -> None:
    bars = [bar(a, "not identified", score=b, replayed=b) for a, b in numbers]
    stems = [stem(k, a) for k, (a, _) in enumerate(numbers)]
    for drawing in (draw_bars(*bars), draw_strip(*stems)):
        assert json.loads(json.dumps(drawing.spec, allow_nan=False)) == drawing.spec


def test_texts_of_the_record_are_data_only() -> None:
    one = Bar(stage=HOSTILE, effect=1.0, score=1.0, replayed=1.0, grade=HOSTILE)
    bars = stage_bars([one], behaviour=HOSTILE, unit=HOSTILE, description=HOSTILE)
    harmless = {"value", "title", "description", "name", "grade_text"}
    for drawing in (bars, draw_strip(stem(0, 1.0, HOSTILE))):
        for path, value in every_item(drawing.spec):
            if isinstance(value, str) and HOSTILE in value:
                named = [part for part in path if not part.isdigit()]
                assert named[-1] in harmless, path
            assert path[-1:] not in {("url",), ("href",)}


def test_a_short_run_is_shown_whole() -> None:
    assert thin([1.0, math.nan, 3.0], [(0, 3)], 3) == [0, 1, 2]


@given(
    st.lists(st.floats(), min_size=50, max_size=400),
    st.integers(6, 40),
    st.integers(1, 399),
)
def test_thinning_keeps_the_extremes_of_the_run_and_of_every_stage(
    scores: list[float], limit: int, edge: int
) -> None:
    edge = min(edge, len(scores) - 1)
    spans = [(0, edge), (edge, len(scores))]
    kept = thin(scores, spans, limit)
    assert kept == sorted(set(kept))
    assert len(kept) <= limit + 3 * len(spans)
    for start, stop in (*spans, (0, len(scores))):
        finite = [scores[k] for k in range(start, stop) if math.isfinite(scores[k])]
        shown = [scores[k] for k in kept if start <= k < stop and math.isfinite(scores[k])]
        if finite:
            assert (min(shown), max(shown)) == (min(finite), max(finite))
        if len(finite) < stop - start:
            assert any(not math.isfinite(scores[k]) for k in kept if start <= k < stop)


@pytest.mark.parametrize(("behaviours", "stages"), [(1, 3), (3, 4), (10, 40), (50, 10), (0, 0)])
def test_a_page_carries_a_bounded_number_of_updates(behaviours: int, stages: int) -> None:
    each = allowance(behaviours, stages)
    assert 30 <= each <= 1200
    assert each * behaviours <= 3600


def test_matrix_scale_is_symmetric_and_shared_by_unit(build: Callable[..., AuditRecord]) -> None:
    record = build()
    found = matrix(record)
    best = [
        [e if r is None else r for e, r in zip(s.effects, s.replayed, strict=True)]
        for s in record.stages
    ]
    assert record.stages[0].grades == ["not identified"] * 3  # and the others are replayed
    assert found.ends["nats"] == max(abs(row[q]) for row in best[1:] for q in (0, 1))
    assert found.ends["points"] == max(abs(row[2]) for row in best[1:])
    for numbers, row in zip(best, found.rows, strict=True):
        for number, cell, facts in zip(numbers, row, record.behaviours, strict=True):
            share = max(-1.0, min(1.0, number / found.ends[facts.unit]))
            assert cell.share == pytest.approx(share, abs=1e-3)
            assert cell.best == number


def test_matrix_without_anything_identified_still_has_a_scale(
    build: Callable[..., AuditRecord],
) -> None:
    record = build()
    bad = [
        msgspec.structs.replace(
            s,
            grade="not identified",
            grades=["not identified"] * 3,
            effects=[math.nan, math.inf, 2.0],
            replayed=[None] * 3,
        )
        for s in record.stages
    ]
    found = matrix(msgspec.structs.replace(record, stages=bad))
    assert found.ends == {"nats": 1.0, "points": 2.0}
    assert [cell.share for cell in found.rows[0]] == [0.0, 0.0, 1.0]

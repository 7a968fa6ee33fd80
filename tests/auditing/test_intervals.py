"""Intervals, contests and the noise floor: laws of their own, without training anything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culpa.auditing.contest import Known, contest, settled, urgency
from culpa.auditing.floor import NEUTRAL, ROUNDING, floor_at, hidden, student
from culpa.auditing.intervals import Estimate, half_widths
from culpa.auditing.record import PlaceboFinding
from culpa.estimators.trust import NOT_IDENTIFIED, TRUSTED


def placebo(at: int, effect: float, kind: str = ROUNDING) -> PlaceboFinding:
    return PlaceboFinding(kind=kind, at=at, effects=[effect])


# Quantiles of Student's t from any printed table.
@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042)]
)
def test_student(degrees: int, quantile: float) -> None:
    assert student(degrees) == pytest.approx(quantile, rel=0.005)
    assert student(1e9) == pytest.approx(1.96, rel=1e-3)
    assert student(0) == math.inf


def test_the_floor_is_that_of_the_moment_or_of_more_training() -> None:
    made = [placebo(10, 1e-3), placebo(10, -1e-3), placebo(60, 1e-6), placebo(30, 9.0, NEUTRAL)]
    assert floor_at(made, 10, 0, 100) == pytest.approx(4.303e-3, rel=1e-3)
    assert floor_at(made, 59, 0, 100) == floor_at(made, 10, 0, 100)
    assert floor_at(made, 60, 0, 100) == floor_at(made, 90, 0, 100) == pytest.approx(12.706e-6)
    assert floor_at(made, 5, 0, 100) == floor_at(made, 10, 0, 100)
    # What 40 updates amplify says nothing about 100.
    assert math.isnan(floor_at(made[2:], 0, 0, 100))
    assert math.isnan(floor_at([], 0, 0, 100))


def test_hidden_is_inside_of_the_floor() -> None:
    assert hidden(-0.9, 1.0)
    assert not hidden(-1.1, 1.0)
    assert not hidden(0.0, 1.0), "an effect of exactly zero: nothing changed"
    assert not hidden(1e-9, math.nan)


def estimates(residual: float | None, grade: str = TRUSTED) -> dict[str, Estimate]:
    values = {"a": 1.0, "b": -0.5, "c": 0.25, "d": 0.01}
    made = {n: Estimate([v], [v], residual, grade) for n, v in values.items()}
    return made | {"last": Estimate([0.1], [0.1], math.nan, TRUSTED)}


def test_replays_that_agree_narrow_the_intervals_and_others_widen_them() -> None:
    found = estimates(0.1)
    before = half_widths(found, {}, 0)
    right = half_widths(found, {"a": [1.0], "b": [-0.5]}, 0)
    wrong = half_widths(found, {"a": [2.0], "b": [0.5]}, 0)
    assert before["last"] == right["last"] == 0.0, "after the last stage nothing is linearised"
    for name in "abcd":
        assert right[name] < before[name] < wrong[name]
    assert before["a"] > before["b"] > before["c"] > before["d"] > 0.0


def test_a_smaller_residual_is_a_narrower_interval_and_no_identification_none() -> None:
    narrow, wide = (half_widths(estimates(r), {}, 0)["a"] for r in (0.01, 0.1))
    assert narrow < wide < half_widths(estimates(None), {}, 0)["a"]
    assert half_widths(estimates(0.1, NOT_IDENTIFIED), {}, 0)["a"] == math.inf
    assert half_widths(estimates(math.inf), {}, 0)["a"] == math.inf


def test_a_contest_is_settled_when_nobody_can_beat_its_replayed_leader() -> None:
    known = {"a": Known(-1.0, 0.0, True), "b": Known(-0.5, 0.4, False), "c": Known(2.0, 0.0, True)}
    blame = contest(known, -1)
    assert (blame.leader, blame.rivals, blame.settled) == ("a", (), True)
    assert settled(known)
    assert urgency([known]) == {}
    close = known | {"b": Known(-0.5, 0.6, False)}
    assert contest(close, -1).rivals == ("b",)
    assert not settled(close)
    assert set(urgency([close])) == {"b"}
    unproved = known | {"a": Known(-1.0, 0.1, False)}
    assert not settled(unproved)
    assert set(urgency([unproved])) == {"a"}


def test_chaos_ties_what_replays_cannot_part() -> None:
    tied = {"a": Known(-1.0, 0.4, True), "b": Known(-0.5, 0.4, True)}
    assert contest(tied, -1).tied
    assert urgency([tied]) == {}


def test_what_is_not_identified_may_be_anything() -> None:
    known = {"a": Known(-1.0, 0.0, True), "b": Known(0.0, math.inf, False)}
    assert not contest(known, -1).settled
    assert not contest(known, 1).settled
    assert set(urgency([known])) == {"b"}


@given(
    st.dictionaries(
        st.sampled_from("abcdefgh"),
        st.builds(Known, st.floats(-5, 5), st.floats(0, 3), st.booleans()),
        min_size=1,
    ),
    st.sampled_from([-1, 1]),
)
def test_replaying_what_is_urgent_ends(known: dict[str, Known], side: int) -> None:
    one = contest(known, side)
    if one.settled and one.leader is not None:
        assert known[one.leader].replayed
        best = side * known[one.leader].value
        assert all(side * k.value <= best for k in known.values())
    steps = 0
    while wanted := urgency([known]):
        assert not known[next(iter(wanted))].replayed
        first = max(wanted, key=lambda n: wanted[n])
        known = known | {first: Known(known[first].value, 0.0, True)}
        steps += 1
    assert steps <= len(known)

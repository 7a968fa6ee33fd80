"""Which stage is replayed next: most worth for its price, and of equals the cheapest."""

from __future__ import annotations

import math

import pytest

from culpa.auditing.contest import Known, contest, most_urgent_first

PLENTY, LITTLE = 9.0, 0.1


@pytest.mark.parametrize("left", [PLENTY, LITTLE])
def test_among_equals_the_cheapest_goes_first(left: float) -> None:
    prices = {"early": 0.9, "middle": 0.5, "late": 0.1}
    equal = {"early": 2.0 + 1e-12, "middle": 2.0, "late": 2.0}
    assert most_urgent_first(equal, prices, left) == ["late", "middle", "early"]


def test_a_stage_that_costs_nothing_does_not_come_first_whatever_it_is_worth() -> None:
    worth, prices = {"big": 3.0, "free": 0.1}, {"big": 0.9, "free": 0.0}
    assert most_urgent_first(worth, prices, LITTLE) == ["big", "free"]


def test_worth_is_weighed_against_price_where_not_all_can_be_paid() -> None:
    worth, prices = {"dear": 2.2, "cheap": 2.0}, {"dear": 0.9, "cheap": 0.2}
    assert most_urgent_first(worth, prices, LITTLE) == ["cheap", "dear"]
    assert most_urgent_first(worth, prices, PLENTY) == ["dear", "cheap"]


def test_what_is_not_identified_leads_no_contest() -> None:
    known = {"sure": Known(-0.5, 0.0, True), "unknown": Known(0.0, math.inf, False)}
    lowered = contest(known, -1)
    assert (lowered.leader, lowered.rivals, lowered.settled) == ("sure", ("unknown",), False)

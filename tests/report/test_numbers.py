"""Numbers and names as a reader sees them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culpa.report.numbers import (
    NOT_FINITE,
    count,
    data_size,
    duration,
    finite,
    magnitude,
    moment,
    plural,
    signed,
    visible,
    visible_everywhere,
)

DIGITS = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")


def read_back(text: str) -> float:
    """The number that a reader takes from ``text``."""
    return float(text.translate(DIGITS).replace("×10", "e"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "+1.00"),
        (-0.4178, "−0.418"),
        (0.00123456, "+0.00123"),
        (0.00099951, "+0.00100"),
        (0.0009994, "+9.99×10⁻⁴"),
        (999.4, "+999"),
        (999.6, "+1.00×10³"),
        (-3e9, "−3.00×10⁹"),
        (5e-324, "+4.94×10⁻³²⁴"),
        (math.nan, NOT_FINITE),
        (math.inf, NOT_FINITE),
        (-math.inf, NOT_FINITE),
        (None, NOT_FINITE),
    ],
)
def test_signed(value: float | None, text: str) -> None:
    assert signed(value) == text


@given(st.floats(min_value=-1e308, max_value=1e308))
def test_what_is_read_is_the_number_to_three_digits_with_its_sign(value: float) -> None:
    for text in (signed(value), signed(value, ascii_only=True)):
        assert math.isclose(read_back(text), value, rel_tol=0.0051, abs_tol=5e-324)
        assert text[0] == ("0" if value == 0 else "+" if value > 0 else text[0])
        assert (text[0] in "−-") == (value < 0)


@given(st.floats())
def test_plain_numbers_are_ascii_and_narrow(value: float) -> None:
    text = signed(value, ascii_only=True)
    assert text.isascii()
    assert len(text) <= 10


def test_a_magnitude_has_no_plus() -> None:
    assert magnitude(43.0) == "43.0"
    assert magnitude(-43.0) == "−43.0"


def test_finite() -> None:
    assert finite(1.5) == 1.5
    assert [finite(x) for x in (math.nan, math.inf, -math.inf, None)] == [None] * 4


def test_counts_sizes_and_durations() -> None:
    assert count(1234567) == "1,234,567"
    assert (plural(1, "stage"), plural(2000, "stage")) == ("1 stage", "2,000 stages")
    assert [data_size(n) for n in (1, 999, 12_345_678, 5 * 10**12)] == [
        "1 bytes",
        "999 bytes",
        "12.3 MB",
        "5.00 TB",
    ]
    assert [duration(s) for s in (0.0, 0.12, 14.23, 125.0, 7505.0, math.inf)] == [
        "0 s",
        "0.120 s",
        "14.2 s",
        "2 min 05 s",
        "2 h 05 min",
        NOT_FINITE,
    ]


def test_what_acts_instead_of_being_seen_is_replaced() -> None:
    assert visible("a\x1b[31mb") == "a\ufffd[31mb"
    assert visible("abc\u202egnp.exe") == "abc\ufffdgnp.exe"
    assert visible("half \udc80 a character") == "half \ufffd a character"
    assert visible("two\nlines\tand a tab") == "two lines and a tab"


@pytest.mark.parametrize(
    "text", ["", "plain", "größer 数字 ×10⁻³", "<b>&amp;</b>", "שלום", "👩\u200d🔬"]
)
def test_what_is_seen_stays(text: str) -> None:
    assert visible(text) == text


def test_visible_everywhere_reaches_keys_and_leaves_numbers() -> None:
    given_ = {"a\x00": ["b\x00", {"c": ("d\x00", 1, None, 2.5)}]}
    assert visible_everywhere(given_) == {"a\ufffd": ["b\ufffd", {"c": ["d\ufffd", 1, None, 2.5]}]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-01-05T20:14:09Z", "2026-01-05 20:14 UTC"),
        ("2026-01-05T20:14:09+02:00", "2026-01-05 18:14 UTC"),
        ("2026-01-05T20:14:09", "2026-01-05T20:14:09"),
        ("0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00+14:00"),
        ("yesterday", "yesterday"),
    ],
)
def test_moment(text: str, shown: str) -> None:
    assert moment(text) == shown

"""Numbers and names as a reader sees them: sign, three significant digits, nothing invisible."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, cast

MINUS: Final = "\u2212"
"""The minus sign proper: as wide as a plus, unlike the hyphen."""
NOT_FINITE: Final = "not finite"
ABSENT: Final = "\u2013"
"""Stands where there is no number: a stage that was not replayed."""
NEGLIGIBLE: Final = 1e-3
"""A half-width below this part of the largest effect is rounding, whose digits mean nothing."""
_SUPERSCRIPT: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_REORDERING: Final = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))
_BYTES: Final = ("bytes", "kB", "MB", "GB", "TB", "PB")


def finite(value: float | None) -> float | None:
    """``value`` as JSON can carry it: ``None`` for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def magnitude(value: float | None, *, digits: int = 3, ascii_only: bool = False) -> str:
    """A number in ``digits`` significant digits, without a plus.

    Fixed notation from 0.001 up to 1000, powers of ten outside of it; "not finite" for NaN,
    infinities and ``None``. ``ascii_only`` writes ``-1.20e-05`` for a plain terminal.
    """
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    if value == 0.0:
        return "0"
    mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
    power = int(exponent)
    minus = "-" if ascii_only else MINUS
    sign = minus if value < 0.0 else ""
    if -3 <= power < 3:
        return f"{sign}{abs(value):.{max(0, digits - 1 - power)}f}"
    if ascii_only:
        return f"{sign}{mantissa}e{power:+03d}"
    return f"{sign}{mantissa}×10{str(power).translate(_SUPERSCRIPT)}"


def signed(value: float | None, *, digits: int = 3, ascii_only: bool = False) -> str:
    """As ``magnitude``, with the plus written out: the sign is the finding. Zero has no sign."""
    text = magnitude(value, digits=digits, ascii_only=ascii_only)
    positive = value is not None and math.isfinite(value) and value > 0.0
    return f"+{text}" if positive else text


def half_width(value: float | None, largest: float, *, ascii_only: bool = False) -> str:
    """Two digits; ``~0`` below a thousandth of the ``largest`` effect, and ``-`` where unknown."""
    if value is None or not math.isfinite(value):
        return "-"
    if value < NEGLIGIBLE * largest:
        return "~0"
    return magnitude(value, digits=2, ascii_only=ascii_only)


def small(value: float | None, largest: float) -> str:
    """As ``signed``, but ``~0`` below a thousandth of ``largest``: a remainder of rounding."""
    kept = finite(value)
    return "~0" if kept is not None and abs(kept) < NEGLIGIBLE * abs(largest) else signed(value)


def count(number: int) -> str:
    """A count with its thousands separated: ``12,345``."""
    return f"{number:,}".replace("-", MINUS)


def plural(number: int, what: str) -> str:
    """``1 stage``, ``1,200 stages``: ``what`` is an English noun with a regular plural."""
    return f"{count(number)} {what}" if number == 1 else f"{count(number)} {what}s"


def data_size(number: int) -> str:
    """Bytes in decimal units: ``12.3 MB`` is 12.3 million bytes."""
    value, unit = float(number), 0
    while abs(value) >= 999.5 and unit < len(_BYTES) - 1:
        value, unit = value / 1000.0, unit + 1
    return f"{number} bytes" if unit == 0 else f"{magnitude(value)} {_BYTES[unit]}"


def duration(seconds: float) -> str:
    """Seconds as ``0.120 s``, ``12.3 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if not math.isfinite(seconds):
        return NOT_FINITE
    if abs(seconds) < 99.95:
        return f"{magnitude(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(text: str) -> str:
    """An ISO 8601 time as ``2026-01-05 20:14 UTC``; any other text, or a time of no zone, as is."""
    try:
        given = datetime.fromisoformat(text)
        if given.tzinfo is None:
            return text
        return f"{given.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):  # no time, or before the year 1 in UTC
        return text


def visible(text: str) -> str:
    """``text`` without characters that act instead of being seen.

    Control characters (terminal escapes), lone surrogates (which no file can hold) and the marks
    that reorder the text around them become the replacement character; line ends become spaces.
    """
    spaced = " ".join(text.split()) if any(c in "\t\n\r" for c in text) else text
    if spaced.isprintable():
        return spaced
    return "".join("\ufffd" if _acts(c) else c for c in spaced)


def _acts(character: str) -> bool:
    hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return hidden or unicodedata.bidirectional(character) in _REORDERING


def visible_everywhere(value: object) -> object:
    """``visible`` on every string inside of nested mappings and sequences, keys included."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        mapping = cast("Mapping[object, object]", value)
        return {visible_everywhere(k): visible_everywhere(v) for k, v in mapping.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [visible_everywhere(item) for item in cast("Sequence[object]", value)]
    return value

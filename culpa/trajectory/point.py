"""Where a recording can go on after a crash: values, as the log keeps them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from culpa.errors import IntegrityError, UnsupportedError
from culpa.trajectory.rng import RandomState


class OpenLoop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A loop over ``recorder.batches`` that was going on at a point."""

    number: int
    start: int
    """The update at which it began."""
    draws: int
    """Batches drawn before the point's own."""
    checked: bool
    """Whether its batches are those of the updates (not so where recorder.step is inside)."""


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process needs, besides s_index, to make update ``index`` as it was made first.

    Taken when the first batch of that update arrived, about once a commit. Updates after it are
    in the log; they are made again and must come out as recorded.
    """

    index: int
    stage: str
    random: RandomState
    hypers: tuple[dict[str, Any], ...]
    scheduler: Any = None
    refused: str = ""
    """Why the scheduler's state could not be kept, if so."""
    loops: tuple[OpenLoop, ...]
    next_loop: int
    """The number of loops begun before this point, open ones included."""
    fresh: bool
    had_slots: bool
    has_slots: bool
    """Whether the optimizer had a state, at the update before and now."""
    seconds: float

    def encode(self) -> bytes:
        """Its bytes in the log."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Point:
        """The inverse of ``encode``; raises ``IntegrityError`` on anything else."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise IntegrityError(f"the point to go on from is damaged: {error}.") from error


@dataclass(frozen=True)
class LoopEnd:
    """A loop over batches that ended: updates [start, stop), so many batches drawn."""

    number: int
    start: int
    stop: int
    draws: int
    exhausted: bool
    """The loader had no more; otherwise the loop was left."""
    checked: bool
    random: RandomState
    """The generators after it."""
    drawn: tuple[tuple[int, RandomState], ...] = ()
    """Of the draws that no update followed: number, and the generators before."""

    def encode(self) -> bytes:
        """Its bytes in the log, without the draws, which have rows of their own."""
        facts = (self.start, self.stop, self.draws, self.exhausted, self.checked, self.random)
        return msgspec.msgpack.encode(facts)


EndedLoop = tuple[int, int, int, bool, bool, RandomState]
"""A ``LoopEnd`` in the log: start, stop, draws, exhausted, checked, random."""


def plain(value: Any, where: str) -> Any:
    """A scheduler's state as data; raises ``UnsupportedError`` where it is more than that."""
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        if all(isinstance(key, (str, int)) for key in mapping):
            return {key: plain(item, f"{where}[{key!r}]") for key, item in mapping.items()}
    if isinstance(value, (list, tuple)):
        items = cast("list[Any]", value)
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(items)]
    if value is None or isinstance(value, (bool, str, float)) or _is_small(value):
        return value
    raise UnsupportedError(f"{where} is a {type(value).__name__}")


def _is_small(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def shaped(stored: Any, live: Any) -> Any:
    """Stored data in the types that the live state has: tuples and counters."""
    if isinstance(live, Mapping) and isinstance(stored, dict):
        known, found = cast("Mapping[Any, Any]", live), cast("dict[Any, Any]", stored)
        items = {k: shaped(v, known.get(k)) for k, v in found.items()}
        return Counter(items) if isinstance(live, Counter) else items
    if isinstance(live, (list, tuple)) and isinstance(stored, list):
        found, known = cast("list[Any]", stored), cast("list[Any]", live)
        padded = [*known, *[None] * max(0, len(found) - len(known))]
        items = [shaped(v, k) for v, k in zip(found, padded, strict=False)]
        return tuple(items) if isinstance(live, tuple) else items
    if isinstance(live, float) and isinstance(stored, int) and math.isfinite(live):
        return float(stored)
    return stored

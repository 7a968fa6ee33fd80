"""What an audit pays for, in trainings, and how it decides between replaying and estimating."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from culpa.dynamics.propagator import Propagator
from culpa.dynamics.secant import Secant

REPLAY, PRODUCTS = 1.3, 5.0
"""Gradients an update: to execute and check it; of ``embed`` for a stage that lies behind."""


@runtime_checkable
class History(Protocol):
    """What prices depend on: a ``Run``, or one that is only planned."""

    @property
    def num_steps(self) -> int:
        """K."""
        ...

    def kept_before(self, k: int) -> int:
        """The largest kept index <= k."""
        ...


def price(history: History, start: int, stop: int) -> float:
    """Of replaying history without the updates ``[start, stop)``: updates executed over all."""
    first = history.kept_before(start)
    return (history.num_steps - first - (stop - start)) / history.num_steps


def replaying_costs_less(
    history: History, stops: Iterable[int], replays: float, propagator: Propagator | None
) -> bool:
    """Whether replays of all stages, for ``replays`` trainings, cost less than estimating them.

    Args:
        history: the run.
        stops: where each stage ends.
        replays: what they cost together.
        propagator: of the estimates.
    """
    behind = sum(history.num_steps - stop for stop in stops) / history.num_steps
    products = 2.0 * propagator.fraction if isinstance(propagator, Secant) else PRODUCTS
    return REPLAY * replays <= REPLAY + products * behind

"""``culpa.embed(..., order=2)``: what it accepts, and how its derivatives are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from culpa import tree
from culpa.dynamics.choice import Choice
from culpa.dynamics.curvature import third
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.propagator import Exact, Propagator
from culpa.dynamics.second_order import SecondOrder
from culpa.errors import OptionError, UnsupportedError


def first_propagator(propagator: Propagator | None, form: str, order: int) -> Propagator | None:
    """The propagator of the first-order term: what was given, or order 2's own.

    Raises:
        OptionError: an order that is neither 1 nor 2, or not an order of this form.
        UnsupportedError: order 2 about a point that has the second-order term in it already.
    """
    if order not in (1, 2):
        raise OptionError(f"order must be 1 or 2, got {order!r}.")
    if order == 1:
        return propagator
    if form != "block":
        raise OptionError(
            f"order=2 needs form='block', got form={form!r}: a sum of first-order effects has no"
            " second-order term of its own. Single updates: embed(updates=[...], order=2)."
        )
    if propagator is None:
        return Exact()
    if not isinstance(propagator, Exact) or propagator.at != "observed":
        raise UnsupportedError(
            f"order=2 expands at the observed parameters, and {propagator!r} does not. Leave the"
            " propagator out, or give Exact(at='observed'). Exact(at='midpoint'), Exact(at='gauss')"
            " and Secant have the second-order term in them already."
        )
    return propagator


def second(choice: Choice, updates: list[Callable[[], LocalLoss]]) -> Choice:
    """The choice with the second-order term, checked on the first of the updates.

    Raises:
        UnsupportedError: if the model has no third derivatives.
    """
    if not updates:
        return replace(choice, propagator=SecondOrder())
    local = updates[0]()
    vector = local.spread(local.grads) if tree.norm(local.grads) > 0.0 else local.params
    way, reason = third.settle(local, vector, choice.reference)
    return replace(
        choice,
        propagator=SecondOrder(way),
        because=f"{choice.reason}; third derivatives by {reason}",
        provisional=False,
    )

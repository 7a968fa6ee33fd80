"""Before a sweep: whether the model can do what the propagator needs, and how it is computed.

A propagator that the model cannot support is refused here, by name, with those that work. For
``Exact(hvp="auto")`` the strategy is chosen: an exact one that the model supports; and, in sweeps
over at least ``MEASURED_FROM`` updates, the fastest of what was timed on three of them, where
finite differences qualify only if they are within ``EQUAL`` of the exact products there, and on
every later check. Timing noise cannot turn results by more than that: an exact strategy gives way
to another, or to finite differences, only if it takes ``1 / CLEARLY`` times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from culpa import tree
from culpa.dynamics.curvature import hessian
from culpa.dynamics.curvature.support import (
    EQUAL,
    consistent,
    examine,
    not_symmetric,
    tried,
    worst,
)
from culpa.dynamics.identity import Identity
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.propagator import Exact, Propagator
from culpa.dynamics.secant import Secant
from culpa.dynamics.structured import BlockWise, GaussNewton, LayerWise, Subset
from culpa.errors import UnsupportedError
from culpa.problem import Problem
from culpa.trajectory.engine import Engine
from culpa.trajectory.run import Run
from culpa.trajectory.walk import forward
from culpa.tree import Tree

MEASURED_FROM = 200
"""Updates of a sweep from which on measuring pays for itself (it costs some 60 gradients)."""
CLEARLY = 0.75
"""A strategy is preferred to a better one if it takes at most this share of its time."""


@dataclass(frozen=True)
class Measured:
    """What a strategy took on the surveyed updates.

    ``seconds``: the median; ``error``: the largest relative difference from the exact product.
    """

    seconds: float
    error: float


@dataclass
class Choice:
    """What a sweep multiplies by, and why.

    Attributes:
        propagator: with its strategy named.
        reason: for the user to read.
        reference: the strategy that the sweep's own checks take for the truth.
        measured: by strategy; empty where nothing was timed.
        fallback: what the sweep may fall back to, if the model supports it.
        provisional: whether the products are approximations that further checks may end.
    """

    propagator: Propagator
    reason: str
    reference: str = "reverse-over-reverse"
    measured: dict[str, Measured] = field(default_factory=dict[str, Measured])
    fallback: Propagator | None = None
    provisional: bool = False

    def fall_back(self) -> None:
        """Multiply by the fallback's matrix from here on."""
        if self.fallback is not None:
            self.propagator, self.fallback, self.provisional = self.fallback, None, False

    def confirmed(self, local: LocalLoss, vectors: Sequence[Tree], found: list[Tree]) -> list[Tree]:
        """The products ``found``; the exact ones, from here on, where they stopped agreeing."""
        if not self.provisional or not isinstance(self.propagator, Exact):
            return found
        exact = hessian.products(local, local.params, vectors, self.reference)
        gap = worst(found, exact)
        if gap <= EQUAL:
            return found
        self.propagator, self.provisional = replace(self.propagator, hvp=self.reference), False
        self.reason += (
            f"; given up for {self.reference} at update {local.transition.index}, where it was"
            f" {gap:.1e} off"
        )
        return exact


def settle(
    propagator: Propagator,
    updates: Sequence[Callable[[], LocalLoss]],
    vectors: Sequence[Tree],
    *,
    length: int,
    along: bool = False,
    fallback: Propagator | None = None,
) -> Choice:
    """Check a propagator on the first of some updates, and choose what it leaves open.

    Args:
        propagator: what the sweep is asked to use.
        updates: functions that walk to an update and return its loss; at least one.
        vectors: like those that the sweep multiplies; names may be missing or in excess.
        length: updates that the sweep goes through.
        along: whether it needs gradient differences along displacements instead of products.
        fallback: what the sweep would fall back to; left out of the choice if unsupported.

    Raises:
        UnsupportedError: the model cannot do it; says why, and names what works.
    """
    if length == 0:
        return Choice(propagator, "nothing to multiply")
    local = updates[0]()
    tried_on = _directions(local, vectors)
    if not isinstance(propagator, Exact):
        if propagator.moves:
            _require(propagator, local, tried_on[0], along)
        found = examine(local, ["reverse-over-reverse"], tried_on[0])
        reference = next(iter(found.products), "finite-difference")
        return Choice(propagator, "as asked", reference)
    kept = fallback if fallback and not _failure(fallback, local, tried_on[0], along) else None
    if propagator.hvp != "auto":
        found = examine(local, [propagator.hvp], tried_on[0])
        if propagator.hvp in found.refused:
            raise _refusal(propagator, found.refused[propagator.hvp], local, tried_on[0], along)
        reference = next((s for s in hessian.EXACT if s in found.products), "finite-difference")
        return Choice(propagator, "as asked", reference, fallback=kept)
    measuring = length >= MEASURED_FROM and len(updates) > 1
    found = examine(local, hessian.EXACT if measuring else ["reverse-over-reverse"], tried_on[0])
    if not found.products and not measuring:
        found = examine(local, hessian.EXACT, tried_on[0])
    exact = [s for s in hessian.EXACT if s in found.products]
    if not exact:
        cause = "; ".join(f"{s}: {why}" for s, why in found.refused.items())
        if consistent(local, tried_on[0]) is None:
            raise _refusal(propagator, cause, local, tried_on[0], along)
        return Choice(
            replace(propagator, hvp="finite-difference"),
            f"finite-difference: two steps agree, and nothing exact is supported ({cause})",
            "finite-difference",
            fallback=kept,
        )
    if not measuring:
        reason = f"{exact[0]}: supported; not timed for fewer than {MEASURED_FROM} updates"
        return Choice(replace(propagator, hvp=exact[0]), reason, exact[0], fallback=kept)
    chosen, reason, measured = _survey(exact, local, updates, vectors, differences=not along)
    return Choice(
        replace(propagator, hvp=chosen),
        reason,
        exact[0],
        measured,
        kept,
        provisional=chosen not in hessian.EXACT,
    )


def _survey(
    exact: list[str],
    first: LocalLoss,
    updates: Sequence[Callable[[], LocalLoss]],
    vectors: Sequence[Tree],
    *,
    differences: bool,
) -> tuple[str, str, dict[str, Measured]]:
    """The strategy to use, why, and what was measured."""
    seconds: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    where: list[int] = []
    running = [*exact, *(s for s in hessian.STRATEGIES if differences and s not in hessian.EXACT)]
    for at, walk in enumerate(updates):
        local = first if at == 0 else walk()
        directions = _directions(local, vectors)
        where.append(local.transition.index)
        truth: list[Tree] = []
        for strategy in running:
            began = _now(local)
            found = hessian.products(local, local.params, directions, strategy)
            seconds.setdefault(strategy, []).append(_now(local) - began)
            truth = truth or found  # the first strategy is exact
            errors.setdefault(strategy, []).append(worst(found, truth))
        # What was slower than the first strategy is not timed again.
        running = [s for s in running if median(seconds[s]) <= median(seconds[exact[0]])]
    measured = {s: Measured(median(seconds[s]), max(errors[s])) for s in seconds}
    chosen = exact[0]
    for strategy in running:
        agrees = measured[strategy].error <= EQUAL
        if agrees and _faster(strategy, chosen, seconds):
            chosen = strategy
    return chosen, _reason(chosen, exact[0], measured, where), measured


def _faster(one: str, other: str, seconds: dict[str, list[float]]) -> bool:
    return median(seconds[one]) <= CLEARLY * median(seconds[other])


def _reason(chosen: str, exact: str, measured: dict[str, Measured], where: Sequence[int]) -> str:
    base = measured[exact].seconds
    rows = ", ".join(
        f"{s} {m.seconds / base:.2f} of the time and {m.error:.0e} off"
        for s, m in measured.items()
        if s != exact
    )
    shown = ", ".join(map(str, where))
    return f"{chosen}: measured on updates {shown} against {exact}: {rows or 'nothing else works'}"


def _now(local: LocalLoss) -> float:
    """Seconds, once the device has done what it was given."""
    if any(p.is_cuda for p in local.params.values()):
        torch.cuda.synchronize()
    return time.perf_counter()


def _directions(local: LocalLoss, vectors: Sequence[Tree]) -> list[Tree]:
    """The vectors on exactly the parameters of the update; its gradient where there is no other."""
    zeros = tree.zeros_like(local.params)
    found = [{n: v.get(n, zeros[n]) for n in zeros} for v in vectors]
    found = [v for v in found if tree.norm(v) > 0.0]
    return found or [local.spread(local.grads) if tree.norm(local.grads) > 0.0 else local.params]


def _failure(propagator: Propagator, local: LocalLoss, vector: Tree, along: bool) -> str:
    """Why the propagator cannot pass this update; empty if it can."""
    if along:
        reason = tried(lambda: propagator.gradient_difference(local, vector))[1]
    else:
        reason = tried(lambda: propagator.products(local, [vector]))[1]
    if reason or not propagator.moves or isinstance(propagator, Secant):
        return reason
    if isinstance(propagator, LayerWise | BlockWise | Subset):  # parts of that Hessian
        return examine(local, ["reverse-over-reverse"], vector).refused.get(
            "reverse-over-reverse", ""
        )
    return not_symmetric(local, propagator.products, vector)


def _require(propagator: Propagator, local: LocalLoss, vector: Tree, along: bool) -> None:
    reason = _failure(propagator, local, vector, along)
    if reason:
        raise _refusal(propagator, reason, local, vector, along)


def _refusal(
    propagator: Propagator, reason: str, local: LocalLoss, vector: Tree, along: bool
) -> UnsupportedError:
    """Names the propagator, why it cannot be used, and everything that was tried and works."""
    exact = examine(local, hessian.EXACT, vector).products
    working = [f"culpa.Exact(hvp={s!r})" for s in hessian.EXACT if s in exact]
    if consistent(local, vector) is not None:
        working.append("culpa.Exact(hvp='finite-difference')")
    others = [GaussNewton(), Secant(1.0), Identity()] if along else [GaussNewton(), Identity()]
    working += [f"culpa.{p!r}" for p in others if not _failure(p, local, vector, along)]
    return UnsupportedError(
        f"{propagator!r} cannot be used on this run: {reason}. What works on its update"
        f" {local.transition.index}: {', '.join(working)}; and culpa.replay, which needs"
        " .backward() only."
    )


def surveyed(
    run: Run, engine: Engine, problem: Problem, start: int
) -> list[Callable[[], LocalLoss]]:
    """At most three updates spread over [start, num_steps), each a walk of one update or few."""

    def walk(k: int) -> Callable[[], LocalLoss]:
        def go() -> LocalLoss:
            (transition,) = forward(run, engine, k, k + 1)
            return LocalLoss(problem, transition)

        return go

    kept = [k for k in run.kept_states if start <= k < run.num_steps] or [start]
    return [walk(k) for k in dict.fromkeys((kept[0], kept[len(kept) // 2], kept[-1]))]

"""What one observed update did to the state: Delta_t = s_{t+1} - s_{t+1}(without t)."""

from __future__ import annotations

from collections.abc import Sequence

from culpa import tree
from culpa.dynamics import running, updates
from culpa.dynamics.clip import clip
from culpa.dynamics.updates import Rules
from culpa.errors import UnsupportedError
from culpa.problem import Problem
from culpa.trajectory.run import Run
from culpa.trajectory.walk import Transition
from culpa.tree import Slots, Tree

Displacement = tuple[Tree, Slots]
"""A difference of two states: of the parameters, and of the (extended) optimizer slots."""


def direct_effect(rules: Rules, transition: Transition, counterfactual: str) -> Displacement:
    """The effect of update t on the state right after it, exact (Estimator 4.1, equation 6).

    Under ``"restart"`` the counterfactual starts its next update with a fresh optimizer: the slots
    differ by all that they have gained. Under ``"zero-gradient"`` it made the update with a
    gradient of zero.
    """
    before, after = transition.before, transition.after
    groups, names = transition.record.groups, {n for tree in after.slots.values() for n in tree}

    def extended(params: Tree, slots: Slots) -> Slots:
        return updates.extend(rules, groups, params, slots, names)

    held = extended(after.params, after.slots)
    if counterfactual == "restart":
        fresh = extended(before.params, {})
        return tree.subtract(after.params, before.params), difference(held, fresh)
    if counterfactual == "skip":
        without = extended(before.params, before.slots)
        return tree.subtract(after.params, before.params), difference(held, without)
    zero = tree.zeros_like(transition.grads)
    moved, ticked = updates.apply(rules, groups, before.params, before.slots, zero)
    made = tree.subtract(after.params, before.params)
    return tree.subtract(made, moved), difference(held, extended(before.params, ticked))


def difference(a: Slots, b: Slots) -> Slots:
    """a - b, slot by slot; a missing slot is zero."""
    return {slot: tree.subtract(a.get(slot, {}), b.get(slot, {})) for slot in {**a, **b}}


def slots_dot(a: Slots, b: Slots) -> float:
    """<a, b> over all slots."""
    return sum(tree.dot(a[slot], b[slot]) for slot in a if slot in b)


def mismatch(rules: Rules, transition: Transition) -> float:
    """How far the differentiable step is from the recorded one, relative to the recorded one.

    Rounding gives 1e-7 to 1e-4; more means that the mathematics here is not what the loop did.
    """
    groups, before = transition.record.groups, transition.before
    grads = clip(transition.grads, transition.record)
    modelled, _ = updates.apply(rules, groups, before.params, before.slots, grads)
    made = tree.subtract(transition.after.params, before.params)
    size = tree.norm(made)
    gap = tree.norm(tree.subtract(made, modelled))
    return gap / size if size > 0.0 else gap


def running_statistics(run: Run, problem: Problem) -> tuple[str, ...]:
    """The names of the running statistics that are part of this run's state.

    Raises:
        UnsupportedError: if training changed any other floating-point buffer.
    """
    found = running.names(run.state(0), run.state(run.num_steps))
    running.require_layers(problem.model, found)
    return found


def statistics_made(transition: Transition, names: Sequence[str]) -> Tree:
    """What the update did to the running statistics, r_{t+1} - r_t.

    Without the update they would have stood still, in each of the three senses: what moves them is
    its forward pass, and not the optimizer.
    """
    after, before = transition.after.buffers, transition.before.buffers
    return {name: after[name] - before[name] for name in names}


def refuse_running_statistics(run: Run, what: str) -> None:
    """Raise if training moved running statistics, for an estimator that does not carry them."""
    found = running.names(run.state(0), run.state(run.num_steps))
    if found:
        raise UnsupportedError(
            f"{what} does not carry running statistics, and training changed the buffer"
            f" {found[0]!r}. culpa.attribute and culpa.embed do, and culpa.replay(run, problem,"
            " without=stage) gives the exact effect."
        )

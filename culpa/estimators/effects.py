"""What one observed update did to the state: Delta_t = s_{t+1} - s_{t+1}(without t)."""

from __future__ import annotations

from culpa import tree
from culpa.dynamics import updates
from culpa.dynamics.clip import clip
from culpa.dynamics.updates import Rule
from culpa.errors import UnsupportedError
from culpa.trajectory.run import Run
from culpa.trajectory.state import State, largest_difference
from culpa.trajectory.walk import Transition
from culpa.tree import Slots, Tree

Displacement = tuple[Tree, Slots]
"""A difference of two states: of the parameters, and of the (extended) optimizer slots."""


def direct_effect(rule: Rule, transition: Transition, counterfactual: str) -> Displacement:
    """The effect of update t on the state right after it, exact (Estimator 4.1, equation 6).

    Under ``"restart"`` the counterfactual starts its next update with a fresh optimizer: all of the
    slots are the difference. Under ``"zero-gradient"`` it made the update with a gradient of zero.
    """
    before, after = transition.before, transition.after
    held = updates.extend(rule, after.slots)
    if counterfactual == "restart":
        return tree.subtract(after.params, before.params), held
    if counterfactual == "skip":
        without = updates.extend(rule, before.slots)
        return tree.subtract(after.params, before.params), difference(held, without)
    zero = tree.zeros_like(transition.grads)
    moved, ticked = updates.apply(rule, transition.record.groups, before.params, before.slots, zero)
    made = tree.subtract(after.params, before.params)
    return tree.subtract(made, moved), difference(held, updates.extend(rule, ticked))


def difference(a: Slots, b: Slots) -> Slots:
    """a - b, slot by slot; a missing slot is zero."""
    return {slot: tree.subtract(a.get(slot, {}), b.get(slot, {})) for slot in {**a, **b}}


def slots_dot(a: Slots, b: Slots) -> float:
    """<a, b> over all slots."""
    return sum(tree.dot(a[slot], b[slot]) for slot in a if slot in b)


def mismatch(rule: Rule, transition: Transition) -> float:
    """How far the differentiable step is from the recorded one, relative to the recorded one.

    Rounding gives 1e-7 to 1e-4; more means that the mathematics here is not what the loop did.
    """
    groups, before = transition.record.groups, transition.before
    grads = clip(transition.grads, transition.record.clip_grad_norm)
    modelled, _ = updates.apply(rule, groups, before.params, before.slots, grads)
    made = tree.subtract(transition.after.params, before.params)
    size = tree.norm(made)
    gap = tree.norm(tree.subtract(made, modelled))
    return gap / size if size > 0.0 else gap


def refuse_running_statistics(run: Run, what: str) -> None:
    """Raise if training changed floating-point buffers, which these sweeps do not carry.

    BatchNorm's running statistics are part of the state: a sweep that left them out would be
    silently wrong about every behaviour in evaluation mode.
    """
    first, last = _floating(run.state(0)), _floating(run.state(run.num_steps))
    name, _ = largest_difference(first, last)
    if name:
        raise UnsupportedError(
            f"{what} does not carry running statistics yet, and training changed the buffer"
            f" {name!r}. culpa.replay(run, problem, without=stage) gives the exact effect for such"
            " models."
        )


def _floating(state: State) -> Tree:
    return {name: value for name, value in state.buffers.items() if value.is_floating_point()}

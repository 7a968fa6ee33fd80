"""What every update adds to the error of a displacement: measured on a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from culpa import tree
from culpa.dynamics import updates
from culpa.dynamics.clip import clip
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.updates import Rules
from culpa.trajectory.schema import Stage
from culpa.trajectory.walk import Transition
from culpa.tree import Slots, Tree

PARTS = 5
"""The updates after a stage's first successor are so many parts, each with one measurement."""


def remainder(
    rules: Rules,
    transition: Transition,
    local: LocalLoss,
    displacement: Tree,
    slots: Slots,
    estimate: Tree,
) -> Tree:
    """What one update adds to the error of D: the remainder of Theorem 4.1's proof, measured.

    The gradient difference along D is computed in truth (one gradient), and the update that it
    makes compared with the one that the estimate makes; momentum repeats an error 1 / (1 - mu)
    times, which is counted here.
    """
    record = transition.record
    there = {n: p - displacement[n] for n, p in local.params.items()}
    shifted = local.moving(local.gradient(there))
    params = tree.subtract(transition.before.params, displacement)
    made = [
        updates.apply(rules, record.groups, params, slots, clip(grads, record))[0]
        for grads in (shifted, tree.subtract(transition.grads, estimate))
    ]
    hyper = record.hypers[0]
    memory = float(hyper.get("momentum", hyper.get("betas", (0.0,))[0]))
    return tree.scale(1.0 / (1.0 - memory), tree.subtract(made[0], made[1]))


def probes(stages: Sequence[Stage], num_steps: int) -> dict[str, dict[int, int]]:
    """For each stage the updates after it at which the remainder is measured: at most six.

    Returns:
        By stage: the update, and how many updates its remainder stands for; they add up to all
        those after the stage. The first stands for itself alone, since the counterfactual's
        optimizer may start there: Adam's first step has the size of the rate whatever the gradient,
        so that its remainder is like no other. Each other one is the middle of an equal part.
    """
    return {s.name: _of(s.stop, num_steps) for s in stages}


def _of(stop: int, num_steps: int) -> dict[int, int]:
    if stop >= num_steps:
        return {}
    left = num_steps - stop - 1
    parts = min(left, PARTS)
    bounds = [stop + 1 + left * i // parts for i in range(parts + 1)] if parts else []
    middles = {(a + b - 1) // 2: b - a for a, b in pairwise(bounds)}
    return {stop: 1, **middles}

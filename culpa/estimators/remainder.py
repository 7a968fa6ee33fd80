"""What every update adds to the error of a displacement: measured on a few of them."""

from __future__ import annotations

from collections.abc import Sequence

from culpa import tree
from culpa.dynamics import updates
from culpa.dynamics.clip import clip
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.updates import Rules
from culpa.trajectory.schema import Stage
from culpa.trajectory.walk import Transition
from culpa.tree import Slots, Tree


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


def probes(stages: Sequence[Stage], num_steps: int) -> dict[str, frozenset[int]]:
    """For each stage the updates after it at which the remainder is measured: at most six."""
    return {
        s.name: frozenset(range(s.stop, num_steps, max(1, (num_steps - s.stop + 5) // 6)))
        for s in stages
    }

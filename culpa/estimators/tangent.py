"""The tangent sweep: one pass forwards gives each stage's embedding D_S."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from culpa import tree
from culpa.dynamics import updates
from culpa.dynamics.clip import clip
from culpa.dynamics.clip import derivative as clip_derivative
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.propagator import Propagator
from culpa.dynamics.updates import Rule
from culpa.estimators.effects import direct_effect
from culpa.trajectory.schema import Stage
from culpa.trajectory.walk import Transition
from culpa.tree import Slots, Tree


@dataclass
class Carried(ABC):
    """One stage's displacement on its way through the run.

    Attributes:
        displacement, slots: what is carried; ``slots`` are the counterfactual's in ``Block`` and a
            displacement in ``Additive``.
        at_stage_end: the norm of the displacement there.
        remainders, probed: the sum of the remainders measured so far, and their number.
    """

    stage: Stage
    counterfactual: str
    displacement: Tree = field(default_factory=dict[str, Tensor])
    slots: Slots = field(default_factory=dict[str, dict[str, Tensor]])
    at_stage_end: float = 0.0
    remainders: Tree = field(default_factory=dict[str, Tensor])
    probed: int = 0

    @abstractmethod
    def advance(
        self,
        rule: Rule,
        transition: Transition,
        local: LocalLoss,
        propagator: Propagator,
        probe: bool,
    ) -> None:
        """Carry the displacement through one observed update."""

    def note(
        self, rule: Rule, transition: Transition, local: LocalLoss, slots: Slots, bent: Tree
    ) -> None:
        """Measure this update's remainder."""
        left = remainder(rule, transition, local, self.displacement, slots, bent)
        self.remainders, self.probed = tree.add(self.remainders, left), self.probed + 1


class Block(Carried):
    """One stage's block displacement (the paper's Appendix B), D = theta - theta(without S).

    The counterfactual theta - D is advanced with an estimate of its gradient, g_k minus the
    propagator's difference, through the optimizer's own rule: first order in the loss, exact in
    the optimizer (its moments, its step counter, its first step). Inside the stage the
    counterfactual stands still, so a stage starts from its exact displacement, and the last
    stage's embedding is exact.
    """

    def advance(
        self,
        rule: Rule,
        transition: Transition,
        local: LocalLoss,
        propagator: Propagator,
        probe: bool,
    ) -> None:
        """Carry the displacement through one observed update."""
        k, record = transition.index, transition.record
        if k < self.stage.start:
            return
        if k == self.stage.start:
            self.slots = tree.clone_slots(transition.before.slots)
        elif record.reset or (self.counterfactual == "restart" and k == self.stage.stop):
            self.slots = {}
        made = tree.subtract(transition.after.params, transition.before.params)
        if k in self.stage.updates:
            if self.counterfactual == "zero-gradient":
                made = tree.subtract(
                    made, self._step(rule, transition, tree.zeros_like(transition.grads))
                )
            self.displacement = tree.add(self.displacement, made)
            self.at_stage_end = tree.norm(self.displacement)
            return
        if not propagator.moves:
            return
        direction = {name: self.displacement[name] for name in local.params}
        bent = propagator.gradient_difference(local, direction)
        if probe:
            self.note(rule, transition, local, self.slots, bent)
        grads = clip(transition.grads, record.clip_grad_norm)
        modelled, _ = updates.apply(
            rule, record.groups, transition.before.params, transition.before.slots, grads
        )
        shifted = clip(tree.subtract(transition.grads, bent), record.clip_grad_norm)
        moved = self._step(rule, transition, shifted)
        self.displacement = tree.add(self.displacement, tree.subtract(modelled, moved))

    def _step(self, rule: Rule, transition: Transition, grads: Tree) -> Tree:
        """The counterfactual's increment; its slots move on."""
        params = tree.subtract(transition.before.params, self.displacement)
        moved, self.slots = updates.apply(rule, transition.record.groups, params, self.slots, grads)
        return moved


class Additive(Carried):
    """One stage's displacement by Estimator 4.3: the sum of its updates' effects, each alone.

    Linear throughout: D <- M_k D, and D <- M_k D + Delta_k inside the stage.
    """

    def advance(
        self,
        rule: Rule,
        transition: Transition,
        local: LocalLoss,
        propagator: Propagator,
        probe: bool,
    ) -> None:
        """Carry the displacement through one observed update."""
        k, record = transition.index, transition.record
        if k < self.stage.start:
            return
        if record.reset:
            self.slots = {}
        if self.displacement and propagator.moves:
            direction = {name: self.displacement[name] for name in local.params}
            bent = propagator.products(local, [direction])[0]
            if probe and k >= self.stage.stop:
                self.note(rule, transition, local, transition.before.slots, bent)
            self.displacement, self.slots = updates.pushforward(
                rule,
                record.groups,
                transition.before.params,
                transition.before.slots,
                clip(transition.grads, record.clip_grad_norm),
                self.displacement,
                self.slots,
                clip_derivative(transition.grads, record.clip_grad_norm, bent),
            )
        if k in self.stage.updates:
            moved, slots = direct_effect(rule, transition, self.counterfactual)
            self.displacement = tree.add(self.displacement, moved)
            self.slots = {
                s: tree.add(self.slots.get(s, {}), slots.get(s, {}))
                for s in {**self.slots, **slots}
            }
            self.at_stage_end = tree.norm(self.displacement)


FORMS: dict[str, type[Carried]] = {"block": Block, "additive": Additive}


def remainder(
    rule: Rule,
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
    shifted = local.gradient({n: p - displacement[n] for n, p in local.params.items()})
    params = tree.subtract(transition.before.params, displacement)
    made = [
        updates.apply(rule, record.groups, params, slots, clip(grads, record.clip_grad_norm))[0]
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

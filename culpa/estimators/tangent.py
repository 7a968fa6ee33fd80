"""The tangent sweep: one pass forwards gives each stage's embedding D_S."""

from __future__ import annotations

import math
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
from culpa.dynamics.running import shifted
from culpa.dynamics.secant import Secant
from culpa.dynamics.statistics import advance, check, pushforward
from culpa.dynamics.updates import Rules
from culpa.estimators.effects import difference, direct_effect, statistics_made
from culpa.estimators.remainder import remainder
from culpa.trajectory.schema import Stage
from culpa.trajectory.walk import Transition
from culpa.tree import Slots, Tree


@dataclass
class Carried(ABC):
    """One stage's displacement on its way through the run.

    Attributes:
        running: the names of the running statistics that are part of the state.
        displacement, slots, statistics: what is carried; ``slots`` are a displacement in
            ``Additive``, in ``Block`` the counterfactual's; ``statistics`` the displacement of r.
        at_stage_end: the norm of the displacement there.
        remainders, squares, probed: the sum of the remainders measured so far, that of their
            squared norms, each times the updates it stands for, and whether there are any.
        independent: whether the remainders of different updates are, as those of samples are.
    """

    stage: Stage
    counterfactual: str
    running: Sequence[str] = ()
    displacement: Tree = field(default_factory=dict[str, Tensor])
    slots: Slots = field(default_factory=dict[str, dict[str, Tensor]])
    statistics: Tree = field(default_factory=dict[str, Tensor])
    at_stage_end: float = 0.0
    remainders: Tree = field(default_factory=dict[str, Tensor])
    squares: float = 0.0
    probed: bool = False
    independent: bool = False

    @abstractmethod
    def advance(
        self,
        rules: Rules,
        transition: Transition,
        local: LocalLoss,
        propagator: Propagator,
        probe: int,
    ) -> None:
        """Carry the displacement through one observed update.

        Args:
            rules, transition, local, propagator: the update, and what it is carried by.
            probe: for how many updates this one's remainder stands; 0: it is not measured.
        """

    def note(
        self,
        rules: Rules,
        transition: Transition,
        local: LocalLoss,
        slots: Slots,
        bent: Tree,
        probe: int,
    ) -> None:
        """Measure this update's remainder, which stands for ``probe`` updates."""
        left = remainder(rules, transition, local, self.displacement, slots, bent)
        self.remainders = tree.add(self.remainders, tree.scale(float(probe), left))
        self.squares += probe * tree.dot(left, left)
        self.probed = True

    @property
    def error(self) -> float:
        """The size of the error that the updates after the stage make.

        Independent remainders add up as their squares do. nan where none was measured.
        """
        if not self.probed:
            return float("nan")
        return math.sqrt(self.squares) if self.independent else tree.norm(self.remainders)


class Block(Carried):
    """One stage's block displacement (the paper's Appendix B), D = theta - theta(without S).

    The counterfactual theta - D is advanced with an estimate of its gradient, g_k minus the
    propagator's difference, through the optimizer's own rule: first order in the loss, exact in
    the optimizer (its moments, its step counter, its first step). Running statistics are those of
    the counterfactual's own forward pass, exact in them. Inside the stage the counterfactual
    stands still, so a stage starts from its exact displacement, and the last stage's embedding is
    exact.

    Where the rule is affine (SGD), the difference of the two states moves by the rule's derivative,
    exactly and for less than the counterfactual does; the slots carried are then ``apart``, the
    observed less the counterfactual's.
    """

    apart: Slots | None = None

    def advance(
        self,
        rules: Rules,
        transition: Transition,
        local: LocalLoss,
        propagator: Propagator,
        probe: int,
    ) -> None:
        """Carry the displacement through one observed update."""
        k, record = transition.index, transition.record
        if k < self.stage.start:
            return
        if k == self.stage.start:
            self.slots = tree.clone_slots(transition.before.slots)
        elif record.reset or (self.counterfactual == "restart" and k == self.stage.stop):
            self.slots, self.apart = {}, None
        if k in self.stage.updates:
            made = tree.subtract(transition.after.params, transition.before.params)
            if self.counterfactual == "zero-gradient":
                params = tree.subtract(transition.before.params, self.displacement)
                zero = tree.zeros_like(transition.grads)
                made = tree.subtract(made, self._step(rules, transition, params, zero))
            self.displacement = tree.add(self.displacement, made)
            self.statistics = tree.add(self.statistics, statistics_made(transition, self.running))
            if k + 1 == self.stage.stop:
                self.at_stage_end = tree.norm(self.displacement)
                self.displacement = tree.clone(self.displacement)  # changed in place from here on
            return
        if not propagator.moves:
            return
        direction = {name: self.displacement[name] for name in local.params}
        there = self._forward(transition, local, direction) if self.statistics else local
        bent = propagator.gradient_difference(there, direction)
        if there is not local:
            bent = tree.add(bent, tree.subtract(local.grads, there.grads))
        bent = local.moving(bent)
        self._describe_slots(transition, local.once("affine", lambda: rules.affine(record.groups)))
        if probe:
            check(local, self.running)
            slots = self.slots
            if self.apart is not None:
                slots = difference(transition.before.slots, self.apart)
            self.independent = isinstance(propagator, Secant)
            self.note(rules, transition, there, slots, bent, probe)
        if self.apart is not None:
            linear = local.once("derivative", lambda: _derivative(rules, transition))
            self.displacement, self.apart = updates.carry(
                linear, local.params, self.displacement, self.apart, _clipped(transition, bent)
            )
            return
        modelled = local.once("increments", lambda: _increments(rules, transition))
        estimated = clip(tree.subtract(transition.grads, bent), record)
        moved = self._step(rules, transition, there.away(direction), estimated)
        for name, increment in moved.items():
            self.displacement[name].add_(modelled[name]).sub_(increment)

    def _describe_slots(self, transition: Transition, affine: bool) -> None:
        """Hold the slots as a displacement if the update is affine, else the counterfactual's."""
        observed = transition.before.slots
        if affine and self.apart is None:
            self.slots, self.apart = {}, difference(observed, self.slots)
        elif not affine and self.apart is not None:
            self.slots, self.apart = difference(observed, self.apart), None

    def _forward(self, transition: Transition, local: LocalLoss, direction: Tree) -> LocalLoss:
        """Move the statistics on; the loss at the counterfactual's, where it depends on them."""
        held = shifted(transition.before.buffers, self.statistics)
        moved = advance(local, tree.subtract(local.params, direction), held)
        after = transition.after.buffers
        self.statistics = {n: after[n] - moved.buffers[n] for n in held}
        return local.with_buffers(held) if moved.read & held.keys() else local

    def _step(self, rules: Rules, transition: Transition, params: Tree, grads: Tree) -> Tree:
        """The counterfactual's increment from ``params``; its slots move on."""
        groups = transition.record.groups
        moved, self.slots = updates.apply(rules, groups, params, self.slots, grads)
        return moved


def _derivative(rules: Rules, transition: Transition) -> list[tuple[str, updates.Linearised]]:
    """The derivative of the observed update: the same for every stage."""
    before, record = transition.before, transition.record
    grads = clip(transition.grads, record)
    return list(updates.linearised(rules, record.groups, before.params, before.slots, grads))


def _clipped(transition: Transition, bent: Tree) -> Tree:
    """The difference of the two gradients, from that before they were clipped."""
    record, grads = transition.record, transition.grads
    if record.clip_grad_norm is None and record.clip_grad_value is None:
        return bent
    return tree.subtract(clip(grads, record), clip(tree.subtract(grads, bent), record))


def _increments(rules: Rules, transition: Transition) -> Tree:
    """The observed update's increments as the rule computes them: the same for every stage."""
    before, record = transition.before, transition.record
    grads = clip(transition.grads, record)
    return updates.apply(rules, record.groups, before.params, before.slots, grads)[0]


class Additive(Carried):
    """One stage's displacement by Estimator 4.3: the sum of its updates' effects, each alone.

    Linear throughout: D <- M_k D, and D <- M_k D + Delta_k inside the stage.
    """

    def advance(
        self,
        rules: Rules,
        transition: Transition,
        local: LocalLoss,
        propagator: Propagator,
        probe: int,
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
            there = local
            if self.statistics:
                held = shifted(transition.before.buffers, self.statistics)
                there = local.with_buffers(held) if probe else local
                gained, self.statistics = pushforward(
                    local, self.running, direction, self.statistics
                )
                bent = tree.add(bent, gained)
            bent = local.moving(bent)
            if probe and k >= self.stage.stop:
                self.note(rules, transition, there, transition.before.slots, bent, probe)
            self.displacement, self.slots = updates.pushforward(
                rules,
                record.groups,
                transition.before.params,
                transition.before.slots,
                clip(transition.grads, record),
                self.displacement,
                self.slots,
                clip_derivative(transition.grads, record, bent),
            )
        if k in self.stage.updates:
            moved, slots = direct_effect(rules, transition, self.counterfactual)
            self.displacement = tree.add(self.displacement, moved)
            self.statistics = tree.add(self.statistics, statistics_made(transition, self.running))
            self.slots = {
                s: tree.add(self.slots.get(s, {}), slots.get(s, {}))
                for s in {**self.slots, **slots}
            }
            self.at_stage_end = tree.norm(self.displacement)


FORMS: dict[str, type[Carried]] = {"block": Block, "additive": Additive}

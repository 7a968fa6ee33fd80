"""The reverse sweep p <- M_k^T p through one update, for several behaviours, with its trust."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from culpa import tree
from culpa.dynamics import examples, statistics, updates
from culpa.dynamics.choice import Choice
from culpa.dynamics.clip import clip
from culpa.dynamics.clip import derivative as clip_derivative
from culpa.dynamics.curvature import hessian
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.propagator import CHOSEN, Exact
from culpa.dynamics.statistics import Pulled
from culpa.dynamics.updates import Rules
from culpa.estimators.effects import direct_effect, mismatch, slots_dot, statistics_made
from culpa.estimators.probes import Probes
from culpa.estimators.trust import GROWTH_DOUBTFUL, UPDATE_DOUBTFUL, Trust, grade_update
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.ranks.joined import sharing
from culpa.trajectory.run import Run
from culpa.trajectory.walk import Transition
from culpa.tree import Slots, Tree


@dataclass
class Adjoint:
    """p_{k+1}: the derivative of one behaviour with respect to the state after update k."""

    params: Tree
    slots: Slots = field(default_factory=dict[str, dict[str, Tensor]])
    statistics: Tree = field(default_factory=dict[str, Tensor])
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Remember the norm that growth is measured against."""
        self.initial = tree.norm(self.params)

    @property
    def growth(self) -> float:
        """||p|| over its norm at the end of training."""
        return tree.norm(self.params) / self.initial if self.initial > 0.0 else 1.0


@dataclass(frozen=True)
class Swept:
    """What one sweep along one trajectory found; see ``Scores``."""

    steps: Tensor
    examples: Tensor | None
    trust: tuple[Trust, ...]
    singular: int
    fallback: int | None


class Sweep:
    """Carries the adjoints backwards, update by update.

    Args:
        adjoints: those of the behaviours first.
        behaviours: how many adjoints are of behaviours; trust is about those.
        choice: what it multiplies by; its fallback, if any, for all earlier updates once the
            products are more than ``UPDATE_DOUBTFUL`` off or the adjoint has grown more than
            ``GROWTH_DOUBTFUL``-fold.
        running: the names of the running statistics that are part of the state.
    """

    def __init__(
        self,
        problem: Problem,
        adjoints: Sequence[Adjoint],
        behaviours: int,
        choice: Choice,
        num_steps: int,
        running: Sequence[str] = (),
    ) -> None:
        self.problem = problem
        self.adjoints = adjoints
        self.asked = adjoints[:behaviours]
        self.running = running
        self.choice = choice
        self.fallback: int | None = None
        self.probes = Probes(num_steps)
        self._growth, self._gap = 1.0, math.nan

    def along(
        self,
        way: Iterable[Transition],
        run: Run,
        rules: Rules,
        counterfactual: str,
        by_example: bool,
        watch: Progress,
    ) -> Swept:
        """Score every update of a trajectory of ``run``, given from the last to the first."""
        width = len(self.adjoints)
        steps = torch.zeros(run.num_steps, width, dtype=torch.float64)
        found = torch.zeros(run.num_examples, width, dtype=torch.float64) if by_example else None
        trust: list[Trust] = []
        singular = 0
        for transition in way:
            k = transition.index
            moved, slots = direct_effect(rules, transition, counterfactual)
            made = statistics_made(transition, self.running)
            for q, p in enumerate(self.adjoints):
                along = tree.dot(p.params, moved) + slots_dot(p.slots, slots)
                steps[k, q] = along + tree.dot(p.statistics, made)
            trust.append(self.trust(rules, transition, moved))
            singular += updates.singular(
                rules,
                transition.record.groups,
                transition.before.params,
                transition.before.slots,
                transition.grads,
                transition.after.slots,
            )
            self.pull(rules, transition, found, run.example_ids(k))
            watch.advance()
        return Swept(steps, found, tuple(reversed(trust)), singular, self.fallback)

    def trust(self, rules: Rules, transition: Transition, moved: Tree) -> Trust:
        """The trust in the scores of the update that the adjoints stand behind."""
        self._growth = max(p.growth for p in self.asked)
        start = tree.norm(transition.before.params)
        displacement = tree.norm(moved) / start if start > 0.0 else float("inf")
        closed = all(group.optimizer in updates.CLOSED for group in transition.record.groups)
        if not closed or transition.index % self.probes.every == 0 or math.isnan(self._gap):
            self._gap = mismatch(rules, transition)
        gap, residual = self._gap, self.probes.mean
        grade = grade_update(self._growth, residual, gap)
        return Trust(self._growth, displacement, residual, gap, grade)

    def pull(
        self, rules: Rules, transition: Transition, by_example: Tensor | None, ids: Sequence[int]
    ) -> None:
        """p <- M_k^T p for every behaviour, in place; example scores on the way.

        The optimizer's pullback gives the cotangent w of the gradient; then C_k w joins theta's,
        and what the cotangents of the running statistics pull back to.
        """
        record, before = transition.record, transition.before
        pulled = updates.pullback(
            rules,
            record.groups,
            before.params,
            before.slots,
            clip(transition.grads, record),
            [p.params for p in self.adjoints],
            [p.slots for p in self.adjoints],
        )
        local = LocalLoss(self.problem, transition)
        raw = [local.spread(clip_derivative(transition.grads, record, w)) for _, _, w in pulled]
        propagator, probing = self.choice.propagator, self.probes.due(transition.index)
        if by_example is None:
            curved, through = self._products(local, raw, probing)
        else:
            if math.isnan(self.probes.mean):
                examples.check_losses(local, len(ids))
            curved, through, slopes = self._with_examples(local, raw, probing, len(ids))
            by_example.index_add_(0, torch.tensor(ids), torch.stack(slopes, dim=1))
        curved = self.choice.confirmed(local, raw, curved)
        if probing:
            self._probe(local, raw, curved)
        self._fall_back(local, raw[0])
        if not propagator.moves:
            return
        for p, (params, slots, _), bent in zip(self.adjoints, pulled, curved, strict=True):
            p.params = tree.add(params, bent)
            p.slots = {} if record.reset else slots
        if self.running:
            through = through or statistics.pullback(local, self.running, raw, self._moved)
            for p, one in zip(self.adjoints, through, strict=True):
                p.params, p.statistics = tree.add(p.params, one.gained), one.before

    def _products(
        self, local: LocalLoss, raw: Sequence[Tree], probing: bool
    ) -> tuple[list[Tree], list[Pulled]]:
        """C_k w, and what the running statistics pull back to where that came in the same pass.

        C_k w is in the latter then, and empty, unless a probe wants it by itself.
        """
        if not self._together:
            return self.choice.propagator.products(local, raw), []
        how = "apart" if probing else "added"
        through = statistics.pullback(local, self.running, raw, self._moved, how)
        return [one.product or {} for one in through], through

    def _with_examples(
        self, local: LocalLoss, raw: Sequence[Tree], probing: bool, count: int
    ) -> tuple[list[Tree], list[Pulled], list[Tensor]]:
        """``_products``, and the slopes of the update's examples."""
        if not self._together:
            curved, slopes = examples.products(self.choice.propagator, local, raw, count)
            return curved, [], slopes
        how = "apart" if probing else "added"
        asked = self.running, raw, self._moved, how
        through, slopes = examples.with_statistics(local, *asked, count)
        return [one.product or {} for one in through], through, slopes

    @property
    def _moved(self) -> list[Tree]:
        """The cotangents of the running statistics."""
        return [p.statistics for p in self.adjoints]

    @property
    def _together(self) -> bool:
        """Whether the products come with what the running statistics pull back to, in one pass."""
        propagator = self.choice.propagator
        if not self.running or sharing() is not None:
            return False
        return isinstance(propagator, Exact) and propagator.hvp in (*CHOSEN, "reverse-over-reverse")

    def _probe(self, local: LocalLoss, raw: Sequence[Tree], curved: Sequence[Tree]) -> None:
        """Compare one product with the Hessian's one update later."""
        q = max(range(len(self.asked)), key=lambda q: tree.norm(raw[q]))
        later = local.around(local.transition.after.params)
        (truth,) = hessian.products(later, later.params, [raw[q]], self.choice.judge)
        size = tree.norm(truth)
        gap = tree.norm(tree.subtract(truth, curved[q]))
        residual = gap / size if size > 0.0 else float(gap > 0.0)
        self.probes.add(local.transition.index, residual)

    def _fall_back(self, local: LocalLoss, vector: Tree) -> None:
        """Take other products from the next update on, if these are no longer reliable."""
        rough = self.probes.settled and self.probes.mean > UPDATE_DOUBTFUL
        unreliable = rough or self._growth > GROWTH_DOUBTFUL
        if unreliable and self.choice.fall_back(local, vector):
            self.fallback = local.transition.index

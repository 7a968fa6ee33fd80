"""Exact execution of recorded updates on the user's module, by ``torch.optim`` and ``backward``.

Nothing here is differentiated or approximated: an update executed by this engine from the recorded
state gives the recorded bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from culpa import tree
from culpa.problem import Problem
from culpa.trajectory import passes, rng
from culpa.trajectory.blame import blamed, blamed_on_loss
from culpa.trajectory.borrowing import set_modes, write
from culpa.trajectory.fidelity import Fidelity
from culpa.trajectory.live import Live
from culpa.trajectory.optimizers import as_kept, gather_slots
from culpa.trajectory.ranks.execute import Part, accumulate, clip_grad_norm
from culpa.trajectory.ranks.joined import holders
from culpa.trajectory.ranks.lent import WholeDigests, digests_of
from culpa.trajectory.ranks.precision import computed, precision_of
from culpa.trajectory.ranks.shards import stepper
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import OptimizerSpec, StepRecord
from culpa.trajectory.state import State
from culpa.trajectory.taken import Taken
from culpa.trajectory.together import Stepper, members_of
from culpa.tree import Slots, Tree


@dataclass(frozen=True)
class Executed:
    """What one executed update gave besides the new state.

    ``grads`` are as ``backward`` left them, before clipping; ``randoms`` the generators before
    each micro-batch's forward, empty if the update draws nothing. Both are empty where they were
    not asked for.
    """

    loss: float
    grads: Tree
    randoms: tuple[RandomState, ...]


_READ_ONLY = frozenset({"SGD", "Adam", "AdamW"})
"""Optimizers that leave the gradients as they are; others, such as Adamax, compute in them."""


class Engine:
    """A training process in miniature: load a state, execute updates, read the state.

    Use it inside ``borrowed(problem.model)``. ``fidelity`` is what its results may claim.
    """

    def __init__(self, problem: Problem, fidelity: Fidelity | None = None) -> None:
        self.problem = problem
        self.fidelity = fidelity or Fidelity()
        self.params: Tree = dict(problem.model.named_parameters())
        self.buffers: Mapping[str, Tensor] = dict(problem.model.named_buffers())
        self._names = {p: name for name, p in self.params.items()}
        self._held: tuple[str, ...] = ()
        self._trained: tuple[tuple[str, ...], ...] | None = None
        self._slots: Slots = {}
        self._optimizer: Stepper | None = None
        self._built: OptimizerSpec | None = None
        self._looked_at: tuple[Any, Live | WholeDigests] | None = None

    def write(self, params: Tree, buffers: Tree) -> None:
        """Set tensors of the module."""
        write(self.params, params)
        write(self.buffers, buffers)

    def load(self, state: State) -> None:
        """Put the module and the (future) optimizer into ``state``."""
        self.write(state.params, state.buffers)
        self._held = tuple(state.params)
        self._trained = None
        self._slots = tree.clone_slots(state.placed(self.params, self.buffers).slots)
        self._optimizer = None

    def state(self) -> State:
        """A copy of the state as it stands."""
        return self.live().clone()

    def live(self) -> State:
        """The state itself, which the next update changes: for whoever only looks at it."""
        held = {name: self.params[name].detach() for name in self._held}
        return State(held, dict(self.buffers), self._live_slots())

    def looked_at(self, without: frozenset[str] = frozenset()) -> Live | WholeDigests:
        """Parameters and buffers of the state, but for those ``without``, to be hashed."""
        key = (self._held, without)
        if self._looked_at is None or self._looked_at[0] != key:
            named = {
                f"params/{name}": self.params[name] for name in self._held if name not in without
            }
            named |= {f"buffers/{name}": value for name, value in self.buffers.items()}
            self._looked_at = key, digests_of(self.problem.model, named)
        return self._looked_at[1]

    def reset_optimizer(self) -> None:
        """Forget the optimizer's state, as a new job does."""
        self._optimizer, self._slots = None, {}

    def execute(
        self,
        record: StepRecord,
        batches: Sequence[Any],
        randoms: Sequence[RandomState | None],
        *,
        keep: bool = True,
        taken: Taken | None = None,
    ) -> Executed:
        """One update, each micro-batch from its ``randoms`` or, if ``None``, as they stand.

        ``keep``: whether its gradients and generators are asked for. ``taken``: its gradients, if
        somebody has made them after ``prepare``; only the optimizer's part is executed then.
        """
        problem = self.problem.of(record.stage)
        if taken is None:
            self.prepare(record)
        for p in self.params.values():
            p.grad = None
        scaler = self._scaler(record)

        def backward(part: Part) -> tuple[float, list[RandomState]]:
            return passes.backward(problem, record, part, scaler, keep)

        if taken is None:
            total, used = accumulate(record, batches, randoms, self.params, self.buffers, backward)
        else:
            total = self._given(taken, self._let_alone(record))
            used = [r for r in randoms if r is not None] if record.drew_randomness else []
        if scaler is not None:
            for member in members_of(self._prepared_optimizer(record)):
                scaler.unscale_(member)
        live = self._gradients(record)
        grads = live if not keep or self._let_alone(record) else tree.clone(live)
        done = Executed(total, grads if keep else {}, tuple(used))
        if scaler is not None and not tree.is_finite(live):
            return done  # a scaler skips it; counterfactuals only
        self._clip(record)
        self._step(record)
        return done

    def tick(self, record: StepRecord) -> None:
        """One update with a gradient of zero: momentum coasts, weight decay acts."""
        for name in record.held:
            p = self.params[name]
            p.grad = None if name in record.without_gradient else torch.zeros_like(p)
        self._step(record)

    def advance_randomness(
        self, record: StepRecord, batches: Sequence[Any], randoms: Sequence[RandomState | None]
    ) -> None:
        """Draw what a skipped update would have drawn, so that later updates see the same masks."""
        problem = self.problem.of(record.stage)
        with blamed(record.index, "evaluating"):
            set_modes(self.problem.model, record.evaluating)
        problem = computed(problem, precision_of(record.optimizer.reduction))
        kept = tree.clone(self.buffers)
        with torch.no_grad(), blamed_on_loss(record.index):
            for batch, random in zip(batches, randoms, strict=True):
                if random is not None:
                    rng.restore(random)
                problem.loss(problem.model, batch)
        write(self.buffers, kept)

    def prepare(self, record: StepRecord) -> None:
        """Modes and gradients as the update's forward pass found them."""
        with blamed(record.index, "evaluating"):
            set_modes(self.problem.model, record.evaluating)
        self._require_gradients(record)

    def _given(self, taken: Taken, let_alone: bool) -> float:
        """Leave the gradients where ``backward`` would; they may be written into."""
        for name, grad in taken.grads.items():
            p = self.params[name]
            # A norm's last bit depends on the order in memory, which is the parameter's.
            alike = let_alone and grad.stride() == p.stride()
            p.grad = grad if alike else torch.empty_like(p).copy_(grad)
        write(self.buffers, taken.buffers)
        return taken.loss

    def _require_gradients(self, record: StepRecord) -> None:
        """Of what the optimizer holds, whatever the model was frozen to since, and of no others."""
        if self._trained != record.optimizer.groups:
            self._trained = record.optimizer.groups
            held = {*record.held}
            for name, p in self.params.items():
                p.requires_grad_(name in held and (p.is_floating_point() or p.is_complex()))

    def _scaler(self, record: StepRecord) -> GradScaler | None:
        """A ``GradScaler`` that multiplies by the recorded scale, if the loop had one."""
        if record.loss_scale is None:
            return None
        device = self.params[record.held[0]].device.type
        return GradScaler(device, init_scale=record.loss_scale)

    def _let_alone(self, record: StepRecord) -> bool:
        """Whether nothing writes into the gradients any more: the next update gets new ones."""
        clipped = record.clip_grad_norm is not None or record.clip_grad_value is not None
        return not clipped and record.optimizer.name in _READ_ONLY

    def _clip(self, record: StepRecord) -> None:
        if record.clip_grad_norm is None and record.clip_grad_value is None:
            return
        # In the model's order, as loops do it: the norm's last bit depends on it.
        names = {*record.held}
        held = [p for name, p in self.params.items() if name in names]
        if record.clip_grad_norm is not None:
            clip_grad_norm(record, held, record.clip_grad_norm)
        if record.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_(held, record.clip_grad_value)

    def _gradients(self, record: StepRecord) -> Tree:
        """Those of the held parameters, live; also those the loop left at zero, not ``None``."""
        grads: Tree = {}
        for name in record.held:
            p = self.params[name]
            if name in record.without_gradient:
                p.grad = None
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            grads[name] = p.grad.detach()
        return grads

    def _live_slots(self) -> Slots:
        return (
            self._slots if self._optimizer is None else gather_slots(self._optimizer, self._names)
        )

    def _step(self, record: StepRecord) -> None:
        optimizer = self._prepared_optimizer(record)
        with blamed(record.index, "hypers, or the slots of the kept state before it,"):
            optimizer.step()

    def _prepared_optimizer(self, record: StepRecord) -> Stepper:
        built = record.optimizer is self._built or record.optimizer == self._built
        if self._optimizer is None or not built:
            slots = self._live_slots()
            with blamed(record.index, "optimizer or hypers"):
                self._optimizer = stepper(
                    record.optimizer,
                    record.hypers,
                    self.params,
                    self.problem.optimizers,
                    whole=holders() is None,
                )
            beside = _counting_there(self._optimizer)
            with blamed(record.index, "slots of the kept state before it"):
                for slot, values in slots.items():
                    for name, value in values.items():
                        p, (key, kept) = self.params[name], as_kept(slot, value)
                        there = isinstance(kept, Tensor) and p in beside
                        self._optimizer.state[p][key] = kept.to(p.device) if there else kept
            self._built = record.optimizer
        for group, hyper in zip(self._optimizer.param_groups, record.hypers, strict=True):
            group.update(hyper)
        return self._optimizer


def _counting_there(optimizer: Stepper) -> set[Tensor]:
    """The parameters whose ``step`` is kept beside them: where it is fused or capturable."""
    return {
        p
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for p in group["params"]
    }

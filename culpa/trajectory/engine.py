"""Exact execution of recorded updates on the user's module, by ``torch.optim`` and ``backward``.

Nothing here is differentiated or approximated: an update executed by this engine from the recorded
state gives the recorded bits.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from culpa import tree
from culpa.problem import Problem
from culpa.trajectory import rng
from culpa.trajectory.blame import blamed, blamed_on_loss
from culpa.trajectory.fidelity import Fidelity
from culpa.trajectory.optimizers import as_kept, gather_slots
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import OptimizerSpec, StepRecord
from culpa.trajectory.state import State
from culpa.trajectory.together import Stepper, members_of, rebuilt
from culpa.tree import Slots, Tree


@contextmanager
def borrowed(model: nn.Module, fixed: Collection[str] = ()) -> Generator[None]:
    """Lend the module to the engine; afterwards it is as it was: tensors, gradients, modes, RNG.

    Parameters named ``fixed`` are never written to, so that no copy of them is made.
    """
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    values = tree.clone({name: p for name, p in params.items() if name not in fixed})
    statistics = tree.clone(buffers)
    gradients = {name: p.grad for name, p in params.items()}
    trained = {name: p.requires_grad for name, p in params.items()}
    modes = {module: module.training for module in model.modules()}
    try:
        with rng.preserved(), torch.enable_grad():
            for p in params.values():
                p.grad = None
            yield
    finally:
        _write(params, values)
        _write(buffers, statistics)
        for name, p in params.items():
            p.grad = gradients[name]
            p.requires_grad_(trained[name])
        for module, training in modes.items():
            module.training = training


def set_modes(model: nn.Module, evaluating: Sequence[str]) -> None:
    """Training mode everywhere but in the submodules named."""
    if {name for name, module in model.named_modules() if not module.training} == {*evaluating}:
        return  # train() takes ten times as long, as much as a tenth of a small model's gradient
    model.train()
    for name in evaluating:
        model.get_submodule(name).training = False


def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            into[name].copy_(value)


@dataclass(frozen=True)
class Executed:
    """What one executed update gave besides the new state.

    ``grads`` are as ``backward`` left them, before clipping; ``randoms`` the generators before
    each micro-batch's forward, empty if the update draws nothing.
    """

    loss: float
    grads: Tree
    randoms: tuple[RandomState, ...]


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

    def write(self, params: Tree, buffers: Tree) -> None:
        """Set tensors of the module."""
        _write(self.params, params)
        _write(self.buffers, buffers)

    def load(self, state: State) -> None:
        """Put the module and the (future) optimizer into ``state``."""
        self.write(state.params, state.buffers)
        self._held = tuple(state.params)
        self._trained = None
        self._slots = tree.clone_slots(state.slots)
        self._optimizer = None

    def state(self) -> State:
        """A copy of the state as it stands."""
        held = {name: self.params[name] for name in self._held}
        return State(held, dict(self.buffers), self._live_slots()).clone()

    def reset_optimizer(self) -> None:
        """Forget the optimizer's state, as a new job does."""
        self._optimizer, self._slots = None, {}

    def execute(
        self, record: StepRecord, batches: Sequence[Any], randoms: Sequence[RandomState | None]
    ) -> Executed:
        """One update, each micro-batch from its ``randoms`` or, if ``None``, as they stand."""
        problem = self.problem.of(record.stage)
        with blamed(record.index, "evaluating"):
            set_modes(self.problem.model, record.evaluating)
        self._require_gradients(record)
        for p in self.params.values():
            p.grad = None
        total, used = 0.0, list[RandomState]()
        scaler = self._scaler(record)
        for at, (batch, random) in enumerate(zip(batches, randoms, strict=True)):
            if random is not None:
                rng.restore(random)
            if at < record.discarded:
                with torch.no_grad(), blamed_on_loss(record.index):
                    problem.loss(problem.model, batch)
                continue
            if record.drew_randomness:
                used.append(rng.capture())
            with blamed_on_loss(record.index):
                loss = _weighted(problem.evaluate(batch), record, at - record.discarded)
                scaler.scale(loss).backward()
            total += float(loss.detach())
        if scaler.is_enabled():
            for member in members_of(self._prepared_optimizer(record)):
                scaler.unscale_(member)
        grads = self._gradients(record)
        if scaler.is_enabled() and not tree.is_finite(grads):
            return Executed(total, grads, tuple(used))  # a scaler skips it; counterfactuals only
        # In the model's order, as loops do it: the norm's last bit depends on it.
        names = {*record.held}
        held = [p for name, p in self.params.items() if name in names]
        if record.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(held, record.clip_grad_norm)
        if record.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_(held, record.clip_grad_value)
        self._step(record)
        return Executed(total, grads, tuple(used))

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
        kept = tree.clone(self.buffers)
        with torch.no_grad(), blamed_on_loss(record.index):
            for batch, random in zip(batches, randoms, strict=True):
                if random is not None:
                    rng.restore(random)
                problem.loss(problem.model, batch)
        _write(self.buffers, kept)

    def _require_gradients(self, record: StepRecord) -> None:
        """Of what the optimizer holds, whatever the model was frozen to since, and of no others."""
        if self._trained != record.optimizer.groups:
            self._trained = record.optimizer.groups
            held = {*record.held}
            for name, p in self.params.items():
                p.requires_grad_(name in held and (p.is_floating_point() or p.is_complex()))

    def _scaler(self, record: StepRecord) -> GradScaler:
        """A ``GradScaler`` that multiplies by the recorded scale, or by nothing."""
        device = self.params[record.held[0]].device.type
        scale = record.loss_scale
        return GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)

    def _gradients(self, record: StepRecord) -> Tree:
        """Gradients of the held parameters; also those the loop left at zero, not ``None``."""
        grads: Tree = {}
        for name in record.held:
            p = self.params[name]
            if name in record.without_gradient:
                p.grad = None
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            grads[name] = p.grad.detach().clone()
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
        if self._optimizer is None or record.optimizer != self._built:
            slots = self._live_slots()
            with blamed(record.index, "optimizer or hypers"):
                self._optimizer = rebuilt(
                    record.optimizer, record.hypers, self.params, self.problem.optimizers
                )
            with blamed(record.index, "slots of the kept state before it"):
                for slot, values in slots.items():
                    for name, value in values.items():
                        key, kept = as_kept(slot, value)
                        self._optimizer.state[self.params[name]][key] = kept
            self._built = record.optimizer
        for group, hyper in zip(self._optimizer.param_groups, record.hypers, strict=True):
            group.update(hyper)
        return self._optimizer


def _weighted(loss: Tensor, record: StepRecord, at: int) -> Tensor:
    """The micro-batch's share, computed as loops do: divided by n, or multiplied by its weight."""
    if record.weights is not None:
        return loss * record.weights[at]
    return loss / len(record.contributing) if len(record.contributing) > 1 else loss

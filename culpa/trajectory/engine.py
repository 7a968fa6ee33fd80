"""Exact execution of recorded updates on the user's module, by ``torch.optim`` and ``backward``.

Nothing here is differentiated or approximated: an update executed by this engine from the recorded
state gives the recorded bits.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from culpa import tree
from culpa.errors import UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import rng
from culpa.trajectory.fidelity import Fidelity
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Group, StepRecord
from culpa.trajectory.state import State
from culpa.tree import Slots, Tree

REFUSED = {
    "LBFGS": "it evaluates the loss an unknown number of times inside one step",
    "SparseAdam": "its sparse gradients have no dense state",
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of ``torch.optim`` by that name; names from a run folder execute nothing else.

    Raises:
        UnsupportedError: for a class outside of ``torch.optim`` and for those refused by name.
    """
    found = getattr(torch.optim, name, None)
    if name in REFUSED:
        raise UnsupportedError(f"torch.optim.{name} cannot be recorded: {REFUSED[name]}.")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)) or (
        found is torch.optim.Optimizer
    ):
        raise UnsupportedError(
            f"the optimizer {name!r} is not a class of torch.optim, so a replay could not build it "
            "again. Use the class of torch.optim itself (not a subclass)."
        )
    return found


def gather_slots(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Slots:
    """The live tensors of an optimizer's state by slot and parameter name.

    Raises:
        UnsupportedError: if the state holds something other than tensors and ``None``.
    """
    slots: Slots = {}
    for param, state in optimizer.state.items():
        for slot, value in state.items():
            if isinstance(value, Tensor):
                slots.setdefault(slot, {})[names[param]] = value
            elif value is not None:
                raise UnsupportedError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} in its state slot "
                    f"{slot!r}; only tensors can be recorded."
                )
    return slots


@contextmanager
def borrowed(model: nn.Module) -> Generator[None]:
    """Lend the module to the engine; afterwards it is as it was: tensors, gradients, modes, RNG."""
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    values, statistics = tree.clone(params), tree.clone(buffers)
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
        self._slots: Slots = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._built: tuple[str, tuple[tuple[str, ...], ...]] | None = None

    def write(self, params: Tree, buffers: Tree) -> None:
        """Set tensors of the module."""
        _write(self.params, params)
        _write(self.buffers, buffers)

    def load(self, state: State) -> None:
        """Put the module and the (future) optimizer into ``state``."""
        self.write(state.params, state.buffers)
        self._held = tuple(state.params)
        for name in self._held:  # a model frozen after training still trained when it was recorded
            self.params[name].requires_grad_()
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
        set_modes(self.problem.model, record.evaluating)
        for p in self.params.values():
            p.grad = None
        total, used = 0.0, list[RandomState]()
        for at, (batch, random) in enumerate(zip(batches, randoms, strict=True)):
            if random is not None:
                rng.restore(random)
            if record.drew_randomness:
                used.append(rng.capture())
            loss = _weighted(self.problem.evaluate(batch), record, at)
            loss.backward()
            total += float(loss.detach())
        grads = self._gradients(record)
        if record.clip_grad_norm is not None:
            # In the model's order, as loops do it: the norm's last bit depends on it.
            held = [p for name, p in self.params.items() if name in record.held]
            torch.nn.utils.clip_grad_norm_(held, record.clip_grad_norm)
        self._prepared_optimizer(record).step()
        return Executed(total, grads, tuple(used))

    def tick(self, record: StepRecord) -> None:
        """One update with a gradient of zero: momentum coasts, weight decay acts."""
        for name in record.held:
            p = self.params[name]
            p.grad = None if name in record.without_gradient else torch.zeros_like(p)
        self._prepared_optimizer(record).step()

    def advance_randomness(
        self, record: StepRecord, batches: Sequence[Any], randoms: Sequence[RandomState | None]
    ) -> None:
        """Draw what a skipped update would have drawn, so that later updates see the same masks."""
        set_modes(self.problem.model, record.evaluating)
        kept = tree.clone(self.buffers)
        with torch.no_grad():
            for batch, random in zip(batches, randoms, strict=True):
                if random is not None:
                    rng.restore(random)
                self.problem.loss(self.problem.model, batch)
        _write(self.buffers, kept)

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

    def _prepared_optimizer(self, record: StepRecord) -> torch.optim.Optimizer:
        spec = (record.optimizer.name, record.optimizer.groups)
        if self._optimizer is None or spec != self._built:
            slots = self._live_slots()
            self._optimizer = self._build(record.optimizer.name, record.groups)
            for slot, values in slots.items():
                for name, value in values.items():
                    self._optimizer.state[self.params[name]][slot] = value
            self._built = spec
        for group, hyper in zip(self._optimizer.param_groups, record.hypers, strict=True):
            group.update(hyper)
        return self._optimizer

    def _build(self, name: str, groups: Sequence[Group]) -> torch.optim.Optimizer:
        members = [{"params": [self.params[n] for n in g.names], **g.hyper} for g in groups]
        return optimizer_class(name)(members)  # pyright: ignore[reportCallIssue]


def _weighted(loss: Tensor, record: StepRecord, at: int) -> Tensor:
    """The micro-batch's share, computed as loops do: divided by n, or multiplied by its weight."""
    if record.weights is not None:
        return loss * record.weights[at]
    return loss / len(record.micro_batches) if len(record.micro_batches) > 1 else loss

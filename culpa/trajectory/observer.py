"""What a recorder reads off a live optimizer and module at one update."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from culpa import tree
from culpa.errors import ProblemError, RecordError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory.engine import gather_slots, optimizer_class
from culpa.trajectory.schema import OptimizerSpec
from culpa.trajectory.state import State, largest_difference
from culpa.tree import Slots, Tree


class Observer:
    """Binds a problem's module to the optimizer that trains it.

    Raises:
        ProblemError: if the optimizer holds a parameter that the problem's model does not have.
        UnsupportedError: if the optimizer cannot be built again by a replay.
    """

    def __init__(self, problem: Problem, optimizer: torch.optim.Optimizer) -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.params: Mapping[str, nn.Parameter] = dict(problem.model.named_parameters())
        self.buffers: Mapping[str, Tensor] = dict(problem.model.named_buffers())
        names: dict[Tensor, str] = {p: name for name, p in self.params.items()}
        known = type(optimizer).__name__
        if optimizer_class(known) is not type(optimizer):
            optimizer_class(f"{type(optimizer).__module__}.{known}")  # refuses, naming the class
        unknown = [p for g in optimizer.param_groups for p in g["params"] if p not in names]
        if unknown:
            shapes = ", ".join(str(tuple(p.shape)) for p in unknown[:4])
            raise ProblemError(
                f"the optimizer holds {len(unknown)} parameter(s) that Problem(model=...) does not "
                f"know, of shapes {shapes}. Give Problem the module that owns every parameter the "
                "optimizer updates, and build the optimizer after the model is final."
            )
        self.names = names
        groups = tuple(tuple(names[p] for p in g["params"]) for g in optimizer.param_groups)
        self.spec = OptimizerSpec(known, groups)
        self.held = {name: self.params[name] for group in groups for name in group}

    def hypers(self) -> tuple[dict[str, Any], ...]:
        """The hyperparameters of every group as plain numbers, with what the optimizer resolved."""
        return tuple(
            {name: _plain(name, value) for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        )

    def slots(self) -> Slots:
        """The live optimizer state."""
        return gather_slots(self.optimizer, self.names)

    def state(self, held: Mapping[str, Tensor], *, slots: bool) -> State:
        """A copy on the CPU of the parameters in ``held``, all buffers and, if asked, the slots."""
        state = State(dict(held), dict(self.buffers), self.slots() if slots else {}).clone()
        if all(t.device.type == "cpu" for t in held.values()):
            return state
        return State(
            tree.map_values(Tensor.cpu, state.params),
            tree.map_values(Tensor.cpu, state.buffers),
            {slot: tree.map_values(Tensor.cpu, values) for slot, values in state.slots.items()},
        )

    def write(self, state: State, frozen: Tree) -> None:
        """Put the module into a state, in place; a parameter it has not stays as it is."""
        with torch.no_grad():
            for name, value in (frozen | state.params).items():
                self.params[name].copy_(value)
            for name, value in state.buffers.items():
                self.buffers[name].copy_(value)

    def require_unchanged(self, last: State, name: str) -> None:
        """Raise ``RecordError`` unless parameters and buffers are those of ``last``."""
        live = self.state({n: self.params[n] for n in last.params}, slots=False)
        where, size = largest_difference(live.flat(), last.flat())
        if where:
            raise RecordError(
                f"before stage {name!r} the tensor {where} differs by up to {size:.3g} from what it"
                " was after the last update: something changed the model outside of"
                " optimizer.step(). A replay could not repeat that; record such jobs as runs of"
                " their own."
            )

    def followed_by(self, optimizer: torch.optim.Optimizer, held: Collection[str]) -> Observer:
        """The observer of an optimizer that takes over."""
        observer = Observer(self.problem, optimizer)
        outside = sorted(observer.held.keys() - {*held})
        if outside:
            raise UnsupportedError(
                f"the new optimizer trains {outside[0]!r}, which no optimizer held when recording "
                "began; this version needs every trained parameter in the first optimizer."
            )
        if observer.slots():
            raise RecordError("the new optimizer has state already; pass it before its first step.")
        return observer

    def versions(self) -> dict[str, int]:
        """By held parameter a number that grows with every change in place."""
        return {name: p._version for name, p in self.held.items()}

    def evaluating(self) -> tuple[str, ...]:
        """The names of the submodules in evaluation mode."""
        return tuple(
            name for name, module in self.problem.model.named_modules() if not module.training
        )

    def without_gradient(self) -> tuple[str, ...]:
        """The names of held parameters without a gradient."""
        return tuple(name for name, p in self.held.items() if p.grad is None)

    def gradients(self) -> Tree:
        """Copies of the live gradients."""
        return tree.clone({name: p.grad for name, p in self.held.items() if p.grad is not None})


def _plain(name: str, value: Any) -> Any:
    """A hyperparameter as something JSON holds exactly."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(name, v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise RecordError(
        f"the optimizer's hyperparameter {name}={value!r} is not a finite number, bool, string or "
        "None, so the record could not hold it exactly."
    )


def encode_hypers(hypers: tuple[dict[str, Any], ...]) -> bytes:
    """Canonical JSON of all groups' hyperparameters."""
    return msgspec.json.encode(hypers, order="sorted")

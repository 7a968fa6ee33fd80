"""What a recorder reads off a live optimizer and module at one update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from operator import is_
from types import NoneType
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from culpa import tree
from culpa.errors import ProblemError, RecordError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory.optimizers import gather_slots, optimizer_class, qualified_name
from culpa.trajectory.schema import OptimizerSpec
from culpa.trajectory.snapshot import Camera
from culpa.trajectory.state import State, largest_difference
from culpa.trajectory.together import Stepper, members_of
from culpa.tree import Slots, Tree


class Observer:
    """Binds a problem's module to the optimizer that trains it.

    Raises:
        ProblemError: if the optimizer holds a parameter that the problem's model does not have.
        UnsupportedError: if the optimizer cannot be built again by a replay.
    """

    def __init__(self, problem: Problem, optimizer: Stepper) -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.members = members_of(optimizer)
        self.params: Mapping[str, nn.Parameter] = dict(problem.model.named_parameters())
        self.buffers: Mapping[str, Tensor] = dict(problem.model.named_buffers())
        names: dict[Tensor, str] = {p: name for name, p in self.params.items()}
        for member in self.members:
            known = qualified_name(type(member))
            if optimizer_class(known, problem.optimizers) is not type(member):
                raise UnsupportedError(
                    f"Problem(optimizers=...) has another class that is called {known!r}; pass the"
                    " very class of the optimizer."
                )
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
        classes = [qualified_name(type(member)) for member in self.members]
        counts = [len(member.param_groups) for member in self.members]
        together = tuple(zip(classes, counts, strict=True)) if len(classes) > 1 else ()
        self.specify(OptimizerSpec(" + ".join(classes), groups, together))
        self.held = {name: self.params[name] for group in groups for name in group}
        self._moving = {**self.held, **self.buffers}
        self._walked: list[tuple[str, nn.Module, dict[str, Any]]] | None = None
        self._hypers: tuple[list[Any], tuple[dict[str, Any], ...], bytes] | None = None

    def specify(self, spec: OptimizerSpec) -> None:
        """Say what makes the updates from here on."""
        self.spec, self.spec_json = spec, msgspec.json.encode(spec)

    def hypers(self) -> tuple[dict[str, Any], ...]:
        """The hyperparameters of every group as plain numbers, with what the optimizer resolved."""
        groups = self.optimizer.param_groups
        if [len(g["params"]) for g in groups] != [len(names) for names in self.spec.groups]:
            raise RecordError(
                f"the optimizer's {len(groups)} parameter groups are not those that it had when its"
                " stage began. Add groups and parameters before a stage begins: with"
                " recorder.stage(name)."
            )
        return tuple(
            {name: _plain(name, value) for name, value in group.items() if name != "params"}
            for group in groups
        )

    def hypers_and_json(self) -> tuple[tuple[dict[str, Any], ...], bytes]:
        """``hypers``, and their canonical JSON; worked out anew only where a value is another.

        The same object is the same value, as long as it is of a type that cannot change.
        """
        groups = self.optimizer.param_groups
        facts: list[Any] = []
        for group in groups:
            facts.append(len(group["params"]))
            facts += group
            facts += group.values()
        known = self._hypers
        if known is None or len(known[0]) != len(facts) or not all(map(is_, known[0], facts)):
            hypers = self.hypers()
            known = facts, hypers, encode_hypers(hypers)
            fixed = all(_is_fixed(v) for g in groups for n, v in g.items() if n != "params")
            self._hypers = known if fixed else None
        return known[1], known[2]

    def slots(self) -> Slots:
        """The live optimizer state."""
        return self.live_slots()

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

    def live_state(self, names: Iterable[str]) -> State:
        """Parameters of these names, buffers and the optimizer's state, themselves."""
        held: Tree = {name: self.params[name] for name in names}
        return State(held, dict(self.buffers), self.live_slots())

    def live_slots(self) -> Slots:
        """The live optimizer state, of which this process may have parts."""
        return gather_slots(self.optimizer, self.names)

    def placed(self, name: str, value: Tensor) -> Tensor:
        """A slot of a parameter as its optimizer keeps it."""
        return value.to(self.held[name].device)

    def gathered(self) -> Observer:
        """An observer that a rank may ask without the others; as long as nothing changes."""
        return self

    def frozen(self) -> Tree:
        """The parameters that no optimizer holds; not copies."""
        return {name: p for name, p in self.params.items() if name not in self.held}

    def before(self, last: State, joining: Tree) -> State:
        """The state before an update, ``last`` being that after the one before it, without slots.

        As much of it as this process needs to execute the update again.
        """
        slots = self.state({}, slots=True).slots
        return State({**last.params, **joining}, last.buffers, slots)

    def after(self, copied: State) -> State:
        """As much of the state after an update, of which there is a copy."""
        return copied

    def comparable(self, state: State) -> State:
        """What of such a state this process can answer for."""
        return state

    def camera(self, held: Mapping[str, Tensor]) -> Camera:
        """What takes copies of the parameters in ``held``, and of all buffers."""
        return Camera(held, self.buffers)

    def live(self, name: str) -> Tensor:
        """What this process has of a parameter."""
        return self.params[name]

    def copied_slots(self) -> Slots:
        """A copy of the optimizer state on the CPU."""
        return {
            slot: {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
            for slot, values in self.slots().items()
        }

    def write(self, state: State, frozen: Tree) -> None:
        """Put the module into a state, in place; a parameter it has not stays as it is."""
        with torch.no_grad():
            for name, value in (frozen | state.params).items():
                self.params[name].copy_(value)
            for name, value in state.buffers.items():
                self.buffers[name].copy_(value)

    def require_unchanged(self, last: State, name: str) -> None:
        """Raise ``RecordError`` unless parameters and buffers are those of ``last``."""
        live = State(
            {name: self.live(name).cpu() for name in last.params},
            {name: self.buffers[name].cpu() for name in last.buffers},
        )
        where, size = largest_difference(live.flat(), last.flat())
        if where:
            raise RecordError(
                f"before {name} the tensor {where} differs by up to {size:.3g} from what it was"
                " after the last update: something changed the model outside of optimizer.step()"
                " (an average of weights swapped in, clamping, a forward pass in training mode"
                " between updates). A replay could not repeat that; record such jobs as runs of"
                " their own. Adapters can be merged by an update: culpa.integrations.adapters."
            )

    def followed_by(self, optimizer: Stepper) -> Observer:
        """The observer of an optimizer that takes over."""
        observer = type(self)(self.problem, optimizer)
        if optimizer is not self.optimizer and observer.live_slots():
            raise RecordError("the new optimizer has state already; pass it before its first step.")
        return observer

    def regrouped(self) -> bool:
        """Whether the optimizer's groups hold other parameters than they did."""
        groups = self.optimizer.param_groups
        return tuple(tuple(self.names.get(p) for p in g["params"]) for g in groups) != (
            self.spec.groups
        )

    def versions(self) -> dict[str, tuple[int, int]]:
        """By held parameter and buffer a number that grows with changes in place, and its address.

        Neither tells of changes in place through ``.data`` or a NumPy view (guard.py).
        """
        return {name: (v._version, v.data_ptr()) for name, v in self._moving.items()}

    def edited_since(self, versions: Mapping[str, tuple[int, int]], *, forward: bool) -> list[str]:
        """The names of what has another version; ``forward``: a forward pass may move buffers."""
        now = self.versions()
        if now == versions:
            return []
        return [
            name
            for name, version in now.items()
            if version != versions[name] and (name in self.held or not forward)
        ]

    def evaluating(self) -> tuple[str, ...]:
        """The names of the submodules in evaluation mode."""
        found: list[str] = []
        for name, module, children in self._modules():
            if not module.training:
                found.append(name)
            if module.__dict__["_modules"] != children:
                self._walked = None
        return tuple(found) if self._walked is not None else self.evaluating()

    def _modules(self) -> list[tuple[str, nn.Module, dict[str, Any]]]:
        """``named_modules()`` and their children; walked again where ``_walked`` was forgotten."""
        if self._walked is None:
            walked = self.problem.model.named_modules()
            self._walked = [(n, m, dict(m.__dict__["_modules"])) for n, m in walked]
        return self._walked

    def without_gradient(self, member: Optimizer) -> set[str]:
        """The names of the parameters of one optimizer that have no gradient."""
        every = (p for group in member.param_groups for p in group["params"])
        return {self.names[p] for p in every if p.grad is None}

    def gradients(self) -> Tree:
        """Copies of the live gradients."""
        return tree.clone({name: p.grad for name, p in self.held.items() if p.grad is not None})


def _is_fixed(value: Any) -> bool:
    """Whether a value can never become another."""
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    return type(value) in (bool, int, float, str, NoneType)


def _plain(name: str, value: Any) -> Any:
    """A hyperparameter as something JSON holds exactly."""
    if type(value) in (bool, int, str, NoneType) or (type(value) is float and math.isfinite(value)):
        return value
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

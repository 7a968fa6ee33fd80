"""Several states of one training run side by side: each tensor with a first dimension of lanes.

An update is made of all of them at once: gradients by ``vmap`` over the stacked parameters, and the
optimizer's own map on the stacked tensors, which is elementwise for SGD, Adam and AdamW. ``vmap``
computes in another order than one model alone does, so nothing here is bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap  # pyright: ignore[reportPrivateImportUsage]

from culpa import tree
from culpa.dynamics.clip import clip
from culpa.dynamics.updates import Rules, in_place
from culpa.errors import ProblemError
from culpa.problem import Problem
from culpa.trajectory.borrowing import set_modes
from culpa.trajectory.schema import StepRecord
from culpa.trajectory.state import State
from culpa.tree import Slots, Tree


class Lanes:
    """Up to ``most`` states that advance together; the first is there from the beginning.

    For use inside a ``session``, which lends the module. What an optimizer counts (Adam's step,
    whether SGD has a momentum yet) is kept for each lane and parameter; lanes with the same count
    are updated by one call. Lanes that advance lie before those that stand still, so that no copy
    of them is made to be worked on.
    """

    def __init__(self, problem: Problem, state: State, most: int) -> None:
        self.count = 1
        self._problem = problem
        self._rules = Rules(problem.optimizers)
        self._params = _stacked(state.params, most)
        self._buffers = _stacked(state.buffers, most)
        self._slots: Slots = {
            slot: _stacked(values, most) for slot, values in state.slots.items() if slot != "step"
        }
        counted = {name for values in state.slots.values() for name in values}
        steps = state.slots.get("step", {})
        self._clocks = [{n: float(steps[n]) if n in steps else 1.0 for n in counted}]
        self._places = [0]
        """Where each lane lies in the stack."""

    def join(self) -> int:
        """A further lane, which begins where the first one is; its number."""
        for value in self._all():
            value[self.count] = value[self._places[0]]
        self._clocks.append(dict(self._clocks[0]))
        self._places.append(self.count)
        self.count += 1
        return self.count - 1

    def state(self, lane: int) -> State:
        """A copy of a lane's parameters and buffers."""
        return State(
            {name: value[self._places[lane]].clone() for name, value in self._params.items()},
            {name: value[self._places[lane]].clone() for name, value in self._buffers.items()},
        )

    def reset(self, lanes: Sequence[int]) -> None:
        """Forget their optimizers' state."""
        for lane in lanes:
            self._clocks[lane] = {}

    def advance(self, record: StepRecord, batches: Sequence[Any], lanes: Sequence[int]) -> None:
        """One update of ``lanes``; the others stand still.

        Raises:
            ProblemError: if a loss is not finite.
            RuntimeError: torch's, of a loss that ``vmap`` cannot take.
        """
        self._arrange(lanes)
        count = len(lanes)
        grads, held = self._gradients(record, batches, count)
        if record.clip_grad_norm is not None or record.clip_grad_value is not None:
            for at in range(count):
                clipped = clip({name: value[at] for name, value in grads.items()}, record)
                for name, value in clipped.items():
                    grads[name][at] = value
        for name, value in held.items():
            self._buffers[name][:count] = value
        self._step(record, grads, lanes)

    def tick(self, record: StepRecord, lanes: Sequence[int]) -> None:
        """One update of ``lanes`` with a gradient of zero."""
        self._arrange(lanes)
        zeros = {n: torch.zeros_like(self._params[n][: len(lanes)]) for n in moving(record)}
        self._step(record, zeros, lanes)

    def _gradients(
        self, record: StepRecord, batches: Sequence[Any], count: int
    ) -> tuple[Tree, Tree]:
        """Of the losses of the first ``count``, and their buffers after the forward passes."""
        problem, names = self._problem.of(record.stage), {*moving(record)}
        leaves = {
            name: value[:count].detach().requires_grad_(name in names)
            for name, value in self._params.items()
        }
        wanted = [name for name in leaves if name in names]
        held = {name: value[:count] for name, value in self._buffers.items()}
        body = batches[record.discarded :]
        total: Tree = {}
        set_modes(problem.model, record.evaluating)
        for at, batch in enumerate(body):
            with torch.enable_grad():
                losses, held = _losses(problem, leaves, held, batch)
                # Lanes share nothing: the gradient of their sum is that of each.
                found = torch.autograd.grad(
                    losses.sum(),
                    [leaves[name] for name in wanted],
                    allow_unused=True,
                    materialize_grads=True,
                )
            _require_finite(losses.detach(), record)
            weight = 1.0 / len(body) if record.weights is None else record.weights[at]
            grads = dict(zip(wanted, found, strict=True))
            grads = tree.scale(weight, grads) if weight != 1.0 else grads
            total = tree.add(total, grads) if total else grads
        return total, held

    def _step(self, record: StepRecord, grads: Tree, lanes: Sequence[int]) -> None:
        for group in record.groups:
            hyper = {**self._rules.of(group).defaults, **group.hyper}
            alike: dict[tuple[float, tuple[int, ...]], list[str]] = {}
            for name in group.names:
                if name not in grads:
                    continue
                counted: dict[float, list[int]] = {}
                for lane in lanes:
                    counted.setdefault(self._clocks[lane].get(name, 0.0), []).append(lane)
                for count, mine in counted.items():
                    alike.setdefault((count, (*mine,)), []).append(name)
            for (count, mine), names in alike.items():
                whole = len(mine) == len(lanes)
                at = slice(len(lanes)) if whole else [self._places[lane] for lane in mine]
                after = self._move(group.optimizer, names, grads, hyper, at, count)
                for lane in mine:
                    self._clocks[lane] |= dict.fromkeys(names, after)

    def _move(
        self,
        optimizer: str,
        names: Sequence[str],
        grads: Tree,
        hyper: Mapping[str, Any],
        at: slice | list[int],
        count: float,
    ) -> float:
        """Parameters of lanes that have counted the same; how far they have counted then."""
        slots = in_place.slots_of(optimizer, hyper)
        stacks = [[self._params[n] for n in names], *(self._slot(s, names) for s in slots)]
        # A slice is the stack itself; of single lanes there are copies, to be put back.
        parts = [[value[at] for value in stack] for stack in stacks]
        moments = dict(zip(slots, parts[1:], strict=True))
        given = [grads[n][at] for n in names]
        after = in_place.step(optimizer, parts[0], given, moments, hyper, count)
        if not isinstance(at, slice):
            for stack, part in zip(stacks, parts, strict=True):
                for value, made in zip(stack, part, strict=True):
                    value[at] = made
        return after

    def _slot(self, slot: str, names: Sequence[str]) -> list[Tensor]:
        """The stacks of a slot, empty ones where no lane had it yet."""
        held = self._slots.setdefault(slot, {})
        for name in names:
            if name not in held:
                held[name] = torch.zeros_like(self._params[name])
        return [held[name] for name in names]

    def _arrange(self, lanes: Sequence[int]) -> None:
        """Let ``lanes`` lie at the beginning of the stack."""
        outside = [lane for lane in lanes if self._places[lane] >= len(lanes)]
        chosen = {*lanes}
        inside = [
            lane
            for lane, place in enumerate(self._places)
            if place < len(lanes) and lane not in chosen
        ]
        for coming, going in zip(outside, inside, strict=True):
            one, other = self._places[coming], self._places[going]
            for value in self._all():
                value[[one, other]] = value[[other, one]]
            self._places[coming], self._places[going] = other, one

    def _all(self) -> list[Tensor]:
        trees = (self._params, self._buffers, *self._slots.values())
        return [value for values in trees for value in values.values()]


def _losses(
    problem: Problem, params: Tree, buffers: Tree, batch: Any
) -> tuple[Float[Tensor, " lanes"], Tree]:
    """The loss of every lane, differentiable; and its buffers after the forward pass."""
    names = (*params, *buffers)

    def loss(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, tensors, strict=True))
        after = {name: named.pop(name).clone() for name in buffers}
        return problem.call_in(problem.loss, named, after, batch), *after.values()

    # One flat list of tensors: vmap spends longer on a dictionary than a small model on its loss.
    losses, *after = vmap(loss)(*params.values(), *buffers.values())
    return losses, {n: v.detach() for n, v in zip(buffers, after, strict=True)}


def moving(record: StepRecord) -> list[str]:
    """The parameters that an update's optimizer sees a gradient of."""
    return [name for name in record.held if name not in record.without_gradient]


def _stacked(values: Tree, most: int) -> Tree:
    """Each tensor as the first of ``most`` lanes; the others are empty."""
    found: Tree = {}
    for name, value in values.items():
        found[name] = value.new_empty((most, *value.shape))
        found[name][0] = value
    return found


def _require_finite(losses: Float[Tensor, " lanes"], record: StepRecord) -> None:
    if not bool(torch.isfinite(losses).all()):
        raise ProblemError(
            f"update {record.index}: a counterfactual's loss is not finite: it diverged. Replay it"
            " alone (culpa.replay), to see which."
        )

"""A replay whose gradients are differentiable: its graphs wait for the sweep that comes back.

A sweep over a thinned record goes through every update twice. The replay makes a forward and a
backward pass to have the next state, and lets go of their graph; on the way back the product with
the Hessian makes both passes again, to differentiate them. Kept from the replay, a product costs
its last pass alone: docs/performance.md has the figures.

Graphs hold activations, so they are kept up to a number of bytes (``culpa.InMemory(graphs=)``); for
the updates beyond that both are done as ever. An update executed this way must give the recorded
bits, or it is executed the plain way, and so are all further ones of its manner: of the same loss,
parameters and modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from culpa.dynamics import statistics
from culpa.dynamics.curvature.apart import Slopes, apart
from culpa.dynamics.curvature.kept import Graph
from culpa.dynamics.examples import CLOSE, Weighted
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.dynamics.statistics import Traced
from culpa.problem import Problem
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import StepRecord
from culpa.trajectory.state import State
from culpa.trajectory.taken import Taken
from culpa.trajectory.walk import Transition
from culpa.tree import Tree

_Manner = tuple[Problem, tuple[tuple[str, ...], ...], tuple[str, ...], tuple[str, ...]]
"""What a gradient is made by and of, besides the batch: loss, parameters held, modes, and the
parameters that get none."""


class Graphs:
    """Takes gradients of replayed updates and keeps their graphs; a ``trajectory.taken.Taker``.

    Args:
        problem: whose losses are differentiated.
        budget: bytes of graphs that wait, at most.
        wanted: whether whoever comes back will multiply by the Hessian at all.
        examples: the number of examples of an update, where their slopes are wanted with the
            products (dynamics/examples.py).
        running: running statistics that the sweep carries.
    """

    def __init__(
        self,
        problem: Problem,
        budget: int,
        wanted: Callable[[], bool],
        examples: Callable[[int], int] | None = None,
        running: Sequence[str] = (),
    ) -> None:
        self._problem, self._budget, self._running = problem, budget, running
        self._wanted, self._examples = wanted, examples
        self._refused, self._proved = set[_Manner](), set[tuple[_Manner, Any]]()
        self._sizes = dict[tuple[_Manner, Any], int]()
        self._seen = dict[str, set[_Manner]]()
        self._waiting = WeakSet[Graph]()

    def take(
        self,
        record: StepRecord,
        before: State,
        batch: Any,
        random: RandomState | None,
        untouched: frozenset[str],
    ) -> Taken | None:
        """See ``Taker``."""
        manner = self._manner(record)
        if manner in self._refused or not self._wanted():
            return None
        self._seen.setdefault(record.stage, set()).add(manner)
        kind = manner, _shapes(batch)
        waiting = self.waiting
        if waiting + self._sizes.get(kind, 0) > self._budget:
            return None
        grads = {name: before.params[name] for name in record.held}
        for name in record.without_gradient:
            grads.pop(name, None)
        randoms = () if random is None else (random,)
        began = Transition(record, before, before, grads, math.nan, [batch], randoms, untouched)
        try:
            local = LocalLoss(self._problem, began, observed=False)
            if self._examples is not None:
                local = _weighted(local, self._examples(record.index), kind not in self._sizes)
            measured, proved = kind not in self._sizes, kind in self._proved
            found, graph = _taken(local, self._running, measured, proved)
        except Exception:  # noqa: BLE001 (whatever it is, the plain way will say it, or do without)
            self._refused.add(manner)
            return None
        graph.size = self._sizes.setdefault(kind, graph.size)
        if waiting + graph.size > self._budget:
            return None
        self._waiting.add(graph)
        self._proved.add(kind)
        return found

    @property
    def waiting(self) -> int:
        """Bytes of the graphs that wait now."""
        return sum(graph.size for graph in self._waiting)

    def refuse(self, stage: str) -> None:
        """See ``Taker``: all that is like anything of the stage is left to the engine."""
        self._refused |= self._seen.get(stage, set())

    def _manner(self, record: StepRecord) -> _Manner:
        held, problem = record.optimizer.groups, self._problem.of(record.stage)
        return problem, held, record.evaluating, record.without_gradient


def _weighted(local: LocalLoss, examples: int, unknown: bool) -> LocalLoss:
    """The loss as that of its examples; the first of a kind is compared with the loss itself."""
    weighted = Weighted(local, examples)
    if unknown:
        with torch.no_grad():
            loss, mean = local.value(local.params), weighted.value(weighted.params)
        if not math.isclose(float(mean), float(loss), rel_tol=CLOSE, abs_tol=1e-6):
            raise ArithmeticError
    return weighted


def _taken(
    local: LocalLoss, running: Sequence[str], measured: bool, proved: bool
) -> tuple[Taken, Graph]:
    leaves, moving = statistics.leaves(local, running)
    size = _Size(leaves) if measured else None
    hooks = nullcontext() if size is None else saved_tensors_hooks(size.pack, _as_it_is)
    traced: Traced | None = None
    with torch.enable_grad(), differentiable_twice(), hooks:
        if running:
            traced, mode = apart(lambda: statistics.trace(local, leaves, moving), leaves, True)
            value = traced.loss
        else:
            value, mode = apart(lambda: local.value(leaves), leaves, True)
        loss = float(value.detach())
        if not math.isfinite(loss):
            raise ArithmeticError
        slopes = Slopes(value, leaves, mode)
    grads = {name: slopes.gradient[name] for name in local.grads if name in slopes.gradient}
    graph = Graph(slopes, leaves, 0 if size is None else size.bytes, (traced, moving))
    buffers = local.transition.before.buffers if traced is None else traced.held
    return Taken(loss, grads, buffers, graph, proved), graph


class _Size:
    """Adds up the memory of what a graph saves, each piece once."""

    def __init__(self, known: Tree) -> None:
        self.bytes = 0
        self._seen = {value.untyped_storage().data_ptr() for value in known.values()}

    def pack(self, saved: Tensor) -> Tensor:
        """Note it."""
        if saved.layout is torch.strided:
            memory = saved.untyped_storage()
            if memory.data_ptr() not in self._seen:
                self._seen.add(memory.data_ptr())
                self.bytes += memory.nbytes()
        return saved.detach()


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _shapes(batch: Any) -> Any:
    """Of the tensors in a batch, on which the size of a graph depends."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    if isinstance(batch, Mapping):
        return tuple(_shapes(value) for value in batch.values())
    if isinstance(batch, (list, tuple)):
        return tuple(map(_shapes, batch))
    return None

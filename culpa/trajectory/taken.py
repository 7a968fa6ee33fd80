"""An update's loss and gradient, taken by somebody else than the engine: offered, and proved.

A reverse sweep needs second derivatives at every recomputed state. Whoever makes them goes through
the same forward and backward pass as the replay that recomputes the states; so it may make that
pass itself, keep its graph, and leave the gradient to the engine.

It must be the gradient of the loop, to the last bit. The first of every kind is compared with that
of ``backward``; parameters and buffers with their digests after every update; and at the next kept
state all of it, slots included (walk.segment). Where that fails, updates are executed as always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import StepRecord
from culpa.trajectory.state import State
from culpa.tree import Tree


@dataclass(frozen=True)
class Taken:
    """The loss, the gradients of all held parameters that have one, and the buffers moved on.

    ``graph`` is whatever its maker wants to find again in the transition; ``proved``: whether one
    of this kind was compared before.
    """

    loss: float
    grads: Tree
    buffers: Tree
    graph: Any
    proved: bool


@runtime_checkable
class Taker(Protocol):
    """Makes gradients of updates, of those it wants to."""

    def take(
        self,
        record: StepRecord,
        before: State,
        batch: Any,
        random: RandomState | None,
        untouched: frozenset[str],
    ) -> Taken | None:
        """The gradient at ``before``; ``None`` where it is left to the engine.

        Args:
            record: an update of one micro-batch by one process, nothing scaled.
            before: the state it starts from, which stays as it is.
            batch: its micro-batch.
            random: the generators before the forward pass, if it draws from them.
            untouched: see ``walk.Transition``.
        """
        ...

    def refuse(self, stage: str) -> None:
        """What was taken in this stage did not give the recorded bits."""
        ...


def may_take(record: StepRecord, batches: Sequence[Any]) -> bool:
    """Whether the update is one that a ``Taker`` is asked for."""
    plain = record.loss_scale is None and record.optimizer.reduction is None
    return plain and len(batches) == 1 and not record.discarded


def is_that_of(taken: Taken, grads: Tree, buffers: Mapping[str, Tensor]) -> bool:
    """Whether ``taken`` has the gradients and buffers of an executed update, bit for bit.

    A parameter that the loss does not depend on may have a gradient of zero.
    """
    if taken.grads.keys() - grads.keys():
        return False
    for name, grad in grads.items():
        found = taken.grads.get(name)
        if bool(grad.any()) if found is None else not torch.equal(found, grad):
            return False
    return all(torch.equal(value, buffers[name]) for name, value in taken.buffers.items())

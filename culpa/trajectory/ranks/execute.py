"""One update that several ranks made: executed by as many processes, or by one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from culpa.errors import IntegrityError
from culpa.trajectory.ranks import reduce
from culpa.trajectory.ranks.group import FIRST, Ranks, ranks, synchronised
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Reduction, StepRecord
from culpa.tree import Tree, clone

Weights = tuple[float, ...] | None


@dataclass(frozen=True)
class Part:
    """The micro-batches of one rank; ``weights`` as its loop had them, ``None``: 1/n each."""

    batches: Sequence[Any]
    randoms: Sequence[RandomState | None]
    weights: Weights


Backward = Callable[[Part], tuple[float, list[RandomState]]]
"""Accumulates the gradients of a part; its loss, and the generators where it drew from them."""


@dataclass(frozen=True)
class _Together:
    """The job whose processes execute updates together; ``live``: each knows its own part only."""

    ranks: Ranks
    live: bool


_together: ContextVar[_Together | None] = ContextVar("culpa processes", default=None)


@contextmanager
def across_ranks() -> Generator[Ranks]:
    """Inside, every rank of a torch.distributed job calls the same functions, and shares the work.

    ``culpa.replay`` executes the updates of a run that was recorded on as many ranks as those
    ranks did; ``culpa.attribute`` and ``culpa.embed`` besides split the batches of every update
    over the ranks, whatever the run was recorded on, and sum the products. Every rank gets the
    whole result, and must make the same calls in the same order. Outside every process works for
    itself; call all other functions there. (``culpa.audit`` decides by the clock what to do next:
    inside, the ranks would part and wait for each other.)

    Raises:
        OptionError: if this process is not one of several.
    """
    group = ranks()
    token = _together.set(_Together(group, live=False))
    try:
        with synchronised(group):
            yield group
    finally:
        _together.reset(token)


@contextmanager
def live(group: Ranks | None) -> Generator[None]:
    """Inside, updates are executed as they are being recorded: each rank has its own part only."""
    token = _together.set(None if group is None else _Together(group, live=True))
    try:
        yield
    finally:
        _together.reset(token)


def alone() -> AbstractContextManager[None]:
    """Inside, this process works for itself, on its part of what all ranks share."""
    return live(None)


def sharing() -> Ranks | None:
    """The ranks of ``across_ranks``, where they share work."""
    together = _together.get()
    return None if together is None or together.live else together.ranks


def verdict(name: str, size: float) -> tuple[str, float]:
    """What differed on the first rank, whose buffers are those of the record."""
    together = _together.get()
    if together is None or not together.live:
        return name, size
    said = together.ranks.from_first(msgspec.msgpack.encode((name, size)))
    return msgspec.msgpack.decode(said, type=tuple[str, float])


def accumulate(
    record: StepRecord,
    batches: Sequence[Any],
    randoms: Sequence[RandomState | None],
    params: Tree,
    buffers: Mapping[str, Tensor],
    backward: Backward,
) -> tuple[float, list[RandomState]]:
    """Leave the gradients of an update at the parameters; its loss and generators, as ``Backward``.

    Args:
        record: the update; one that ranks made has a ``Reduction``.
        batches, randoms: of its micro-batches.
        params, buffers: the live ones.
        backward: of one rank.
    """
    reduction = record.optimizer.reduction
    if reduction is None:
        return backward(Part(batches, randoms, record.weights))
    together = _together.get()
    if together is not None and together.live:
        return _jointly(together.ranks, reduction, Part(batches, randoms, record.weights),
                        params, buffers, backward, synchronise=True)  # fmt: skip
    parts = _parts(record, reduction, batches, randoms)
    if together is None or together.ranks.size != reduction.ranks:
        return _alone(reduction, parts, params, buffers, backward)
    own = parts[together.ranks.rank]
    loss, used = _jointly(together.ranks, reduction, own, params, buffers, backward)
    return loss, _generators(together.ranks, record, randoms, used)


def _jointly(
    group: Ranks,
    reduction: Reduction,
    own: Part,
    params: Tree,
    buffers: Mapping[str, Tensor],
    backward: Backward,
    *,
    synchronise: bool = False,
) -> tuple[float, list[RandomState]]:
    """This rank's part, and the mean over all; buffers are the first rank's before and after."""
    if synchronise:
        _broadcast(buffers)
    loss, used = backward(own)
    _put(params, reduce.across_ranks(_taken(params), reduction, params))
    _broadcast(buffers)
    (total,) = group.total([loss / group.size])
    return total, used


def _alone(
    reduction: Reduction,
    parts: Sequence[Part],
    params: Tree,
    buffers: Mapping[str, Tensor],
    backward: Backward,
) -> tuple[float, list[RandomState]]:
    """Every rank's part in turn, each from the buffers before the update."""
    before, after = clone(buffers), dict[str, Tensor]()
    losses, used, grads = list[float](), list[RandomState](), list[Tree]()
    for at, part in enumerate(parts):
        if at:
            _write(buffers, before)
        loss, drawn = backward(part)
        after = after or clone(buffers)
        losses.append(loss / len(parts))
        used += drawn
        grads.append(_taken(params))
    _write(buffers, after)
    _put(params, reduce.in_one_process(grads, reduction, params))
    return sum(losses), used


def _parts(
    record: StepRecord,
    reduction: Reduction,
    batches: Sequence[Any],
    randoms: Sequence[RandomState | None],
) -> list[Part]:
    count, odd = divmod(len(batches), reduction.ranks)
    if odd or not count or record.discarded:
        raise IntegrityError(
            f"update {record.index} has {len(batches)} micro-batches of {reduction.ranks} ranks; it"
            " must be as many of each. The folder was changed."
        )
    parts: list[Part] = []
    for rank in range(reduction.ranks):
        at = slice(rank * count, (rank + 1) * count)
        weights = record.weights and tuple(w * reduction.ranks for w in record.weights[at])
        parts.append(Part(batches[at], randoms[at], weights))
    return parts


def _generators(
    group: Ranks,
    record: StepRecord,
    recorded: Sequence[RandomState | None],
    own: Sequence[RandomState],
) -> list[RandomState]:
    """Those before every micro-batch of the update, also of the other ranks."""
    if not record.drew_randomness:
        return []
    if all(random is not None for random in recorded):
        return [random for random in recorded if random is not None]
    found = group.everywhere(msgspec.msgpack.encode(own))
    return [r for one in found for r in msgspec.msgpack.decode(one, type=list[RandomState])]


def _taken(params: Tree) -> Tree:
    """The gradients, taken away from the parameters."""
    found: Tree = {}
    for name, p in params.items():
        if p.grad is not None:
            found[name], p.grad = p.grad, None
    return found


def _put(params: Tree, grads: Tree) -> None:
    for name, grad in grads.items():
        if params[name].requires_grad:
            params[name].grad = grad


def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            into[name].copy_(value)


def _broadcast(buffers: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for value in buffers.values():
            whole = value.contiguous()
            dist.broadcast(whole, FIRST)
            value.copy_(whole)

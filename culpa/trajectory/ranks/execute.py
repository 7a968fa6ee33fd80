"""One update that several ranks made: executed by as many processes, or by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from culpa.errors import IntegrityError
from culpa.trajectory.ranks import reduce, shards
from culpa.trajectory.ranks.gathered import Collector, Piece, collecting
from culpa.trajectory.ranks.group import FIRST, Ranks
from culpa.trajectory.ranks.joined import joined
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Reduction, StepRecord
from culpa.tree import Tree, clone

Weights = tuple[float, ...] | None


@dataclass(frozen=True)
class Part:
    """Micro-batches of one rank; ``weights`` as its loop had them, ``None``: 1/``count`` each."""

    batches: Sequence[Any]
    randoms: Sequence[RandomState | None]
    weights: Weights
    count: int
    """The rank's micro-batches in the update, of which these may be some."""


Backward = Callable[[Part], tuple[float, list[RandomState]]]
"""Accumulates the gradients of a part; its loss, and the generators where it drew from them."""


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
    together = joined()
    apart = together if together is not None and together.shard else None
    if apart is not None and (reduction is None or reduction.ranks != apart.ranks.size):
        raise IntegrityError(
            f"update {record.index} was not made by the ranks that its stage began with. The folder"
            " was changed."
        )
    own = Part(batches, randoms, record.weights, len(batches) - record.discarded)
    if reduction is None:
        return backward(own)
    how = (_Reducing if apart is None else _Scattering)(reduction, record.held, params)
    if together is not None and together.live:
        return _jointly(together.ranks, how, own, buffers, backward, synchronise=True)
    parts = _parts(record, reduction, batches, randoms, params)
    if together is None or together.ranks.size != reduction.ranks:
        return _alone(how, parts, buffers, backward)
    own = parts[together.ranks.rank]
    loss, used = _jointly(together.ranks, how, own, buffers, backward)
    return loss, _generators(together.ranks, record, randoms, used)


def clip_grad_norm(record: StepRecord, params: Sequence[Tensor], bound: float) -> None:
    """``torch.nn.utils.clip_grad_norm_``, which takes the norm of sharded gradients otherwise."""
    reduction, grads = record.optimizer.reduction, [p.grad for p in params if p.grad is not None]
    if reduction is None or not reduction.sharded or not grads:
        torch.nn.utils.clip_grad_norm_(params, bound)
        return
    together, count = joined(), reduction.ranks
    if together is not None and together.ranks.size == count:
        rank = together.ranks.rank
        squares = shards.norms(grads if together.shard else _cut(grads, rank, count))
        dist.all_reduce(squares)
    else:
        each = [shards.norms(_cut(grads, rank, count)) for rank in range(count)]
        squares = reduce.summed(each, reduction)
    norm = torch.linalg.vector_norm(squares**0.5, 2.0)
    torch.nn.utils.clip_grads_with_norm_(params, bound, norm)


def _singles(part: Part) -> list[Part]:
    """Each micro-batch of a rank by itself."""
    return [
        Part([b], [r], part.weights and (part.weights[at],), part.count)
        for at, (b, r) in enumerate(zip(part.batches, part.randoms, strict=True))
    ]


def _cut(grads: Sequence[Tensor], rank: int, count: int) -> list[Tensor]:
    return [shards.shard(grad, rank, count) for grad in grads]


@dataclass(frozen=True)
class _Reducing:
    """How gradients are reduced, of which live parameters; the optimizer's are ``held``."""

    reduction: Reduction
    held: Collection[str]
    params: Tree

    def rounds(self, part: Part) -> list[Part]:
        """What of a rank's part is reduced at once: all of it, or each micro-batch."""
        return _singles(part) if self.reduction.each else [part]

    def passed(
        self, group: Ranks, backward: Backward, part: Part
    ) -> tuple[float, list[RandomState], Tree]:
        """A backward pass of this rank, and the mean over all."""
        loss, drawn, own = self.gradients(backward, part)
        return loss, drawn, reduce.across_ranks(own, self.reduction, self.params, self.held)

    def gradients(self, backward: Backward, part: Part) -> tuple[float, list[RandomState], Tree]:
        """A backward pass of one rank, and its gradients, taken away from the parameters.

        Those of several micro-batches are added in the dtype that they are summed in.
        """
        if not self.reduction.precision:
            return *backward(part), _taken(self.params)
        total, used, own = 0.0, list[RandomState](), dict[str, Tensor]()
        for single in _singles(part):
            loss, drawn = backward(single)
            total += loss
            used += drawn
            for name, grad in _taken(self.params).items():
                dtype = reduce.summed_in(self.reduction, name) or grad.dtype
                own[name] = (own[name] + grad if name in own else grad).to(dtype)
        return total, used, own

    def put(self, means: Sequence[Tree]) -> None:
        """Leave the sum of all rounds at the parameters."""
        for name, p in self.params.items():
            found = [mean[name] for mean in means if name in mean]
            if found and p.requires_grad:
                p.grad = found[0]
                for other in found[1:]:
                    p.grad += other


class _Scattering(_Reducing):
    """The same where parameters are shards: whole gradients come from what gathered them."""

    def passed(
        self, group: Ranks, backward: Backward, part: Part
    ) -> tuple[float, list[RandomState], Tree]:
        """See ``_Reducing``."""

        def onto_shards(own: Tree, pieces: Mapping[str, Piece]) -> Tree:
            # What the optimizer does not hold has no gradient here, and had one in the loop.
            used = {n: p for n, p in pieces.items() if n in own or n not in self.held}
            return reduce.onto_shards(own, used, self.reduction)

        singles, total, used = _singles(part), 0.0, list[RandomState]()
        collector = Collector(self.reduction.buckets, onto_shards, early=len(singles) == 1)
        for single in singles:
            with collecting(collector):
                loss, drawn = backward(single)
            collector.micro_batch_is_over(lambda name: reduce.summed_in(self.reduction, name))
            total += loss
            used += drawn
        found = collector.finish()
        return total, used, {name: mean.to(self.params[name].dtype) for name, mean in found.items()}


def _jointly(
    group: Ranks,
    how: _Reducing,
    own: Part,
    buffers: Mapping[str, Tensor],
    backward: Backward,
    *,
    synchronise: bool = False,
) -> tuple[float, list[RandomState]]:
    """This rank's part, and the mean over all; buffers are the first rank's before and after."""
    if synchronise:
        _broadcast(buffers)
    losses, used, means = list[float](), list[RandomState](), list[Tree]()
    for part in how.rounds(own):
        loss, drawn, mean = how.passed(group, backward, part)
        losses.append(loss)
        used += drawn
        means.append(mean)
    how.put(means)
    _broadcast(buffers)
    (total,) = group.total([sum(losses) / group.size])
    return total, used


def _alone(
    how: _Reducing,
    parts: Sequence[Part],
    buffers: Mapping[str, Tensor],
    backward: Backward,
) -> tuple[float, list[RandomState]]:
    """Every rank's part in turn, each from the buffers before the update."""
    before, after = clone(buffers), dict[str, Tensor]()
    total, used, grads = 0.0, list[RandomState](), list[list[Tree]]()
    for at, own in enumerate(parts):
        if at:
            _write(buffers, before)
        taken = list[Tree]()
        for part in how.rounds(own):
            loss, drawn, own_grads = how.gradients(backward, part)
            total += loss / len(parts)
            used += drawn
            taken.append(own_grads)
        after = after or clone(buffers)
        grads.append(taken)
    _write(buffers, after)
    how.put(
        [
            reduce.in_one_process(of_ranks, how.reduction, how.params, how.held)
            for of_ranks in zip(*grads, strict=True)
        ]
    )
    return total, used


def _parts(
    record: StepRecord,
    reduction: Reduction,
    batches: Sequence[Any],
    randoms: Sequence[RandomState | None],
    params: Tree,
) -> list[Part]:
    count, odd = divmod(len(batches), reduction.ranks)
    if odd or not count or record.discarded:
        raise IntegrityError(
            f"update {record.index} has {len(batches)} micro-batches of {reduction.ranks} ranks; it"
            " must be as many of each. The folder was changed."
        )
    if reduction.sharded and not all(params[n].ndim for names in reduction.buckets for n in names):
        raise IntegrityError(
            f"update {record.index} has a parameter without dimensions among those sharded. The"
            " folder was changed."
        )
    parts: list[Part] = []
    for rank in range(reduction.ranks):
        at = slice(rank * count, (rank + 1) * count)
        weights = record.weights and tuple(w * reduction.ranks for w in record.weights[at])
        parts.append(Part(batches[at], randoms[at], weights, count))
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

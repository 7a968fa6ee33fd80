"""Gradients of several ranks made one, bit for bit as DDP or FSDP2 does it.

DDP lays the gradients of a bucket end to end, multiplies by 1/N and lets the backend sum over the
ranks. In which order the ranks' numbers are added is up to the backend: gloo's ring adds those of
chunk c of a bucket in the order of ranks c-1, c-2, ..., c (modulo N), the chunks being those that
``_chunk`` computes (gloo/allreduce.cc). So one process can add as N did. Other backends' orders
are not known; there one process adds in the order of ranks, and the drift is measured.

FSDP2 lays the gradients of a group as ``shards.packed`` does, without parameters that got none, and
lets the backend reduce-scatter their mean in float32 and bfloat16. In other types it divides by a
power of two, lets the backend sum, and divides by the rest of N. Gloo reduces and scatters by the
same ring, over all of the group, and divides the sum by N.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from culpa.trajectory.ranks.gathered import Piece, reduce_scatter
from culpa.trajectory.ranks.shards import packed, rows_of, unpacked
from culpa.trajectory.schema import Reduction
from culpa.tree import Tree

SEGMENT = 2**20
"""Bytes that gloo's ring sends at once, at most."""


def across_ranks(
    own: Mapping[str, Tensor], reduction: Reduction, params: Tree, held: Collection[str]
) -> Tree:
    """The mean over the processes of this job, of each of which ``own`` are the gradients.

    Args:
        own: by parameter; missing is zero.
        reduction: as recorded.
        params: the live parameters, for shapes and strides.
        held: what the optimizer holds.
    """
    found: Tree = {}
    for names in _together(own, reduction, held):
        if reduction.sharded:
            rows, before, after = _shards(own, names, params, reduction)
            found |= _unsharded(_everyone(_scattered(rows.div_(before), after)), names, params)
        else:
            bucket, views = _filled(own, names, params, reduction.ranks)
            dist.all_reduce(bucket)
            found |= _taken(views, params)
    return found


def onto_shards(own: Tree, pieces: Mapping[str, Piece], reduction: Reduction) -> Tree:
    """``across_ranks`` for gradients of one group, of which this rank gets its shards.

    Args:
        own: this rank's, whole; missing is zero.
        pieces: this rank's, of what the update reduces in the group.
        reduction: as recorded.
    """
    like = next(iter(own.values()))
    wholes = {n: own[n] if n in own else like.new_zeros(p.shape) for n, p in pieces.items()}
    rows, before, after = _shards(wholes, [*wholes], wholes, reduction)
    row, found, at = _scattered(rows.div_(before), after), dict[str, Tensor](), 0
    for name in pieces:
        held = pieces[name].of(wholes[name]).shape
        width = rows_of(wholes[name], reduction.ranks) * math.prod(held[1:])
        found[name] = row[at : at + math.prod(held)].reshape(held).clone()
        at += width
    return found


def in_one_process(
    parts: Sequence[Mapping[str, Tensor]],
    reduction: Reduction,
    params: Tree,
    held: Collection[str],
) -> Tree:
    """The same mean of the gradients of all ranks, which are all here; as ``across_ranks``."""
    found: Tree = {}
    for names in _together(parts[0], reduction, held):
        if reduction.sharded:
            filled = [_shards(part, names, params, reduction) for part in parts]
            rows, before, after = filled[0]
            total = summed([one.div_(before).reshape(-1) for one, _, _ in filled], reduction)
            divided = total.div_(reduction.ranks if after is None else after)
            found |= _unsharded(divided.reshape(rows.shape), names, params)
        else:
            buckets = [_filled(part, names, params, reduction.ranks) for part in parts]
            bucket, views = buckets[0]
            bucket.copy_(summed([bucket for bucket, _ in buckets], reduction))
            found |= _taken(views, params)
    return found


def summed_in(reduction: Reduction, name: str) -> torch.dtype | None:
    """The dtype that a parameter's gradients are summed in; ``None``: its own."""
    for one in reduction.precision:
        if name in one.names:
            dtype = one.reduce or one.params
            return getattr(torch, dtype) if dtype else None
    return None


def _together(
    own: Mapping[str, Tensor], reduction: Reduction, held: Collection[str]
) -> Iterator[Sequence[str]]:
    """The parameters of each collective."""
    for names in reduction.buckets:
        # What the optimizer does not hold has no gradient here, and had one in the loop.
        present = [name for name in names if name in own or name not in held]
        if not reduction.sharded:
            yield names
        elif present:
            yield present


def _shards(
    grads: Mapping[str, Tensor], names: Sequence[str], params: Tree, reduction: Reduction
) -> tuple[Tensor, float, float | None]:
    """The gradients as they are scattered, what divides them before, and after; ``None``: N."""
    wholes = [grads[n] if n in grads else torch.zeros_like(params[n]) for n in names]
    dtype, ranks = summed_in(reduction, names[0]), reduction.ranks
    wholes = wholes if dtype is None else [whole.to(dtype) for whole in wholes]
    rows, before = packed(wholes, ranks), 1
    if rows.dtype in (torch.float32, torch.bfloat16):
        return rows, 1.0, None
    while ranks % before == 0 and ranks / before > before:
        before *= 2
    return rows, float(before), ranks / before


def _scattered(rows: Tensor, after: float | None) -> Tensor:
    """Reduce-scattered and divided: this rank's row."""
    own = torch.empty_like(rows[0])
    op = dist.ReduceOp.AVG if after is None else dist.ReduceOp.SUM
    reduce_scatter(own, rows.reshape(-1), op)
    return own.div_(1.0 if after is None else after)


def _everyone(own: Tensor) -> Tensor:
    """The rows of all ranks."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.stack(gathered)


def _unsharded(rows: Tensor, names: Sequence[str], params: Tree) -> Tree:
    wholes = unpacked(rows, [params[name] for name in names])
    return {n: whole.to(params[n].dtype) for n, whole in zip(names, wholes, strict=True)}


def summed(parts: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """The sum of the ranks' flat tensors as the backend adds them, as far as that is known."""
    return ring_sum(parts) if reduction.backend == "gloo" else _in_order(parts)


def ring_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' flat tensors in the order of gloo's ring."""
    total, count = torch.empty_like(parts[0]), len(parts)
    chunk = _chunk(total.numel(), total.element_size(), count)
    for c in range(count):
        at = slice(c * chunk, (c + 1) * chunk)
        total[at] = _in_order([parts[(c - 1 - j) % count][at] for j in range(count)])
    return total


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total = total.add_(part)
    return total


def _chunk(elements: int, size: int, ranks: int) -> int:
    """Elements of the piece of a tensor that each rank begins to pass on."""
    most = size * (SEGMENT // size)
    segments = _up(max(-(-elements * size // most), 2 * ranks), ranks)
    segment = _up(-(-elements * size // segments), size)
    return segments // ranks * segment // size


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _filled(
    grads: Mapping[str, Tensor], names: Sequence[str], params: Tree, ranks: int
) -> tuple[Tensor, Tree]:
    """A bucket with the gradients in it, times 1/N, and where in it each of them lies."""
    first = params[names[0]]
    bucket = first.new_zeros(sum(params[name].numel() for name in names))
    views: Tree = {}
    at = 0
    for name in names:
        p = params[name]
        strides = p.stride() if _dense(p) else p.contiguous().stride()
        views[name] = bucket.as_strided(p.shape, strides, at)
        at += p.numel()
        if name in grads:
            torch.mul(grads[name], 1.0 / ranks, out=views[name])
    return bucket, views


def _taken(views: Tree, params: Tree) -> Tree:
    return {name: torch.empty_like(params[name]).copy_(v) for name, v in views.items()}


def _dense(p: Tensor) -> bool:
    """Whether it fills its memory without gaps or overlaps; DDP keeps such strides."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(p)

"""Gradients of several ranks made one, bit for bit as ``DistributedDataParallel`` does it.

DDP lays the gradients of a bucket end to end, multiplies by 1/N and lets the backend sum over the
ranks. In which order the ranks' numbers are added is up to the backend: gloo's ring adds those of
chunk c of a bucket in the order of ranks c-1, c-2, ..., c (modulo N), the chunks being those that
``_chunk`` computes (gloo/allreduce.cc). So one process can add as N did. Other backends' orders
are not known; there one process adds in the order of ranks, and the drift is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from culpa.trajectory.schema import Reduction
from culpa.tree import Tree

SEGMENT = 2**20
"""Bytes that gloo's ring sends at once, at most."""


def across_ranks(own: Mapping[str, Tensor], reduction: Reduction, params: Tree) -> Tree:
    """The mean over the processes of this job, of each of which ``own`` are the gradients.

    Args:
        own: by parameter; missing is zero.
        reduction: as recorded.
        params: the live parameters, for shapes and strides.
    """
    found: Tree = {}
    for names in reduction.buckets:
        bucket, views = _filled(own, names, params, reduction.ranks)
        dist.all_reduce(bucket)
        found |= _taken(views, params)
    return found


def in_one_process(parts: Sequence[Mapping[str, Tensor]], reduction: Reduction, p: Tree) -> Tree:
    """The same mean of the gradients of all ranks, which are all here; as ``across_ranks``."""
    found: Tree = {}
    for names in reduction.buckets:
        buckets = [_filled(part, names, p, reduction.ranks) for part in parts]
        flat = [bucket for bucket, _ in buckets]
        total = ring_sum(flat) if reduction.backend == "gloo" else _in_order(flat)
        bucket, views = buckets[0]
        bucket.copy_(total)
        found |= _taken(views, p)
    return found


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

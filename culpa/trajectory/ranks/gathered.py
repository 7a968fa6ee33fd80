"""Parameters of which every rank holds a shard, gathered one at a time where they are used.

``Gather`` gives the whole tensor to whoever computes with it, and sums over the ranks what comes
back to each shard. Both directions can be differentiated again, so that products with the Hessian
of a loss that the ranks share need nothing else. No whole tensor stays: what autograd would keep of
one for its backward passes is kept as the shard, and gathered again (as FSDP2 does by hooks on
modules, whose backward pass cannot be differentiated).

All ranks must compute the same things in the same order, since every use is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from culpa.trajectory.ranks.shards import shard
from culpa.tree import Tree

_MARK = "_culpa_shard"


@dataclass(frozen=True)
class Piece:
    """This rank's piece of a parameter: a shard as FSDP2 cuts it (shards.py).

    Attributes:
        name: the parameter's.
        shape: of the whole.
        rank, ranks: whose piece, of how many.
        dtype: that it is gathered in; ``None``: as it is.
    """

    name: str
    shape: torch.Size
    rank: int
    ranks: int
    dtype: torch.dtype | None = None

    def of(self, whole: Tensor) -> Tensor:
        """The piece of a whole tensor of this shape; a view."""
        return shard(whole, self.rank, self.ranks)

    def whole(self, own: Tensor) -> Tensor:
        """The tensor that all ranks hold together; collective."""
        mine = own.detach().to(self.dtype or own.dtype)
        every = mine.new_empty((self.ranks * self._rows, *self.shape[1:]))
        _newer("all_gather_single", "all_gather_into_tensor")(every, self._padded(mine))
        _mark(every, own, self)
        return every[: self.shape[0]]

    def summed(self, whole: Tensor) -> Tensor:
        """This rank's piece of the sum over the ranks; collective."""
        rows = whole.new_zeros((self.ranks * self._rows, *self.shape[1:]))
        rows[: self.shape[0]] = whole
        own = rows.new_empty((self._rows, *self.shape[1:]))
        reduce_scatter(own, rows, dist.ReduceOp.SUM)
        return own[: self.of(whole).shape[0]]

    @property
    def held(self) -> torch.Size:
        """The shape of the piece."""
        return self.of(torch.empty(self.shape, device="meta")).shape

    @property
    def _rows(self) -> int:
        return -(-self.shape[0] // self.ranks)

    def _padded(self, own: Tensor) -> Tensor:
        if own.shape[0] == self._rows:
            return own.contiguous()
        padded = own.new_zeros((self._rows, *self.shape[1:]))
        padded[: own.shape[0]] = own
        return padded


def reduce_scatter(own: Tensor, rows: Tensor, op: Any) -> None:
    """``own`` becomes this rank's part of the ranks' ``rows``, reduced."""
    _newer("reduce_scatter_single", "reduce_scatter_tensor")(own, rows, op=op)


def _newer(name: str, before: str) -> Any:
    """A collective by its name since PyTorch 2.13, or by the one it had before."""
    return getattr(dist, name if hasattr(dist, name) else before)


class Gather(torch.autograd.Function):
    """A shard -> the whole; its transpose sums over the ranks, or hands over to a ``Collector``."""

    @staticmethod
    def forward(own: Tensor, piece: Piece) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See ``Piece.whole``."""
        return piece.whole(own)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Note the piece, and who collects."""
        own, ctx.piece = inputs
        ctx.dtype, ctx.collector = own.dtype, _collecting.get()
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of this rank's part of the loss, to be summed."""
        if grad is None:
            return None, None
        if ctx.collector is not None:
            ctx.collector.add(ctx.piece.name, grad)
            return None, None
        return Scatter.apply(grad.to(ctx.dtype), replace(ctx.piece, dtype=None)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, _: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """It is linear."""
        return None if tangent is None else Gather.apply(tangent, ctx.piece)


def gathered(own: Tensor, piece: Piece) -> Tensor:
    """The whole parameter of which ``own`` is this rank's shard, differentiable; collective."""
    collector = _collecting.get()
    if collector is not None:
        collector.expect(piece, own.requires_grad and torch.is_grad_enabled())
    return Gather.apply(own, piece)  # pyright: ignore[reportReturnType]


class Scatter(torch.autograd.Function):
    """Whole tensors of the ranks -> this rank's shard of their sum; the transpose of ``Gather``."""

    @staticmethod
    def forward(whole: Tensor, piece: Piece) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See ``Piece.summed``."""
        return piece.summed(whole)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Note the piece."""
        ctx.piece = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A sum hands its cotangent to every summand."""
        return None if grad is None else Gather.apply(grad, ctx.piece), None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, _: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """It is linear."""
        return None if tangent is None else Scatter.apply(tangent, ctx.piece)


@dataclass(frozen=True)
class _Kept:
    """A view of a whole tensor, as long as autograd keeps it: the shard, and which view it was."""

    own: Tensor
    piece: Piece
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def again(self) -> Tensor:
        return self.piece.whole(self.own).as_strided(self.size, self.stride, self.offset)


def _mark(every: Tensor, own: Tensor, piece: Piece) -> None:
    """Let the memory of a gathered tensor say what it was gathered from."""
    setattr(every.untyped_storage(), _MARK, (own.detach(), piece, every.dtype, every._version))


def _pack(value: Tensor) -> Tensor | _Kept:
    try:
        mark = getattr(value.untyped_storage(), _MARK, None)
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
        return value
    if mark is None or (value.dtype, value._version) != mark[2:]:  # written to since
        return value
    own, piece = mark[:2]
    return _Kept(own, piece, value.size(), value.stride(), int(value.storage_offset()))


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.again()


@contextmanager
def nothing_whole_kept() -> Generator[None]:
    """Inside, autograd keeps shards where it would keep whole parameters."""
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


class Collector:
    """Takes this rank's gradients, whole, and has those of a group reduced when it is complete.

    Args:
        groups: the parameters whose gradients are reduced in one collective.
        reduce: of some of one group, and the pieces of those of the group that were used; gives
            the gradients of this rank's shards.
        early: whether a group is complete as soon as each of its uses has come back; else all of
            them wait for ``finish``, as gradients of several micro-batches do. In any case
            ``micro_batch_is_over`` comes first.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        reduce: Callable[[Tree, Mapping[str, Piece]], Tree],
        early: bool,
    ) -> None:
        self._groups = [tuple(group) for group in groups]
        self._group_of = {name: group for group in self._groups for name in group}
        self._reduce, self._early = reduce, early
        self._pieces: dict[str, Piece] = {}
        self._uses: dict[str, int] = {}
        self._whole: Tree = {}
        self._sums: Tree = {}
        self._found: Tree = {}

    def expect(self, piece: Piece, counted: bool) -> None:
        """A parameter is used; ``counted``: a gradient will come of it."""
        self._pieces[piece.name] = piece
        self._uses[piece.name] = self._uses.get(piece.name, 0) + counted

    def add(self, name: str, grad: Tensor) -> None:
        """The gradient by one use of a parameter; they come in the same order on every rank."""
        self._whole[name] = self._whole[name] + grad if name in self._whole else grad
        self._uses[name] -= 1
        group = self._group_of.get(name, ())
        if self._early and all(n in self._whole and not self._uses[n] for n in group):
            self._pass_on(self._whole, group)

    def micro_batch_is_over(self, dtype_of: Callable[[str], torch.dtype | None]) -> None:
        """Its gradients are added to those of the ones before, in these dtypes."""
        for name, grad in self._whole.items():
            added = self._sums[name] + grad if name in self._sums else grad
            self._sums[name] = added.to(dtype_of(name) or grad.dtype)
        self._whole = {}

    def finish(self) -> Tree:
        """All gradients of this rank's shards; collective."""
        for group in self._groups:
            self._pass_on(self._sums, group)
        return self._found

    def _pass_on(self, held: Tree, group: Sequence[str]) -> None:
        own = {name: held.pop(name) for name in group if name in held}
        if not own:
            return
        pieces = {name: self._pieces[name] for name in group if name in self._pieces}
        for name, grad in self._reduce(own, pieces).items():
            # Twice only where a use came after all others were back (a block run again).
            self._found[name] = self._found[name] + grad if name in self._found else grad


_collecting: ContextVar[Collector | None] = ContextVar("collecting", default=None)


@contextmanager
def collecting(collector: Collector) -> Generator[None]:
    """Inside, gradients by what is gathered go to ``collector``."""
    token = _collecting.set(collector)
    try:
        yield
    finally:
        _collecting.reset(token)

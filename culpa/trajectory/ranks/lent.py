"""A model whose modules hold shards, and find whole parameters when they look for one by name."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from culpa.errors import UnsupportedError
from culpa.swap import lending
from culpa.trajectory import digest
from culpa.trajectory.live import Live
from culpa.trajectory.ranks.gathered import Piece, gathered, nothing_whole_kept
from culpa.trajectory.ranks.group import Ranks
from culpa.trajectory.state import device_of
from culpa.tree import Tree, parts_of_a_whole

Cut = Callable[[str, torch.Size], Piece]
"""This rank's piece of a parameter, by its name and shape."""


class Gathering(dict[str, Any]):
    """What a module holds of parameters: ``module.weight`` is gathered, all else is as it lies.

    Where a module has other tensors than its own, those are shards.
    """

    def __init__(self, own: Mapping[str, Any], pieces: Mapping[str, Piece]) -> None:
        super().__init__(own)
        self._own, self._pieces = dict(own), dict(pieces)

    def pieces(self) -> dict[int, Piece]:
        """By the identity of what is held in place of the module's own parameters."""
        return {
            id(held): self._pieces[key]
            for key, held in self.items()
            if held is not None and held is not self._own[key]
        }

    def __getitem__(self, key: str) -> Any:
        """The whole parameter; collective."""
        held = super().__getitem__(key)
        if held is None or held is self._own.get(key):
            return held
        piece = self._pieces[key]
        dtype = _computed_in.get().get(piece.name)
        return gathered(held, piece if dtype is None else replace(piece, dtype=dtype))


_EVERYTHING_AS_IT_IS: Mapping[str, torch.dtype] = MappingProxyType({})
_computed_in: ContextVar[Mapping[str, torch.dtype]] = ContextVar(
    "dtypes", default=_EVERYTHING_AS_IT_IS
)


@contextmanager
def computed_in(dtypes: Mapping[str, torch.dtype]) -> Generator[None]:
    """Inside, parameters of these names are gathered in these dtypes."""
    token = _computed_in.set(dtypes)
    try:
        yield
    finally:
        _computed_in.reset(token)


def pieces_of(group: Ranks) -> Cut:
    """How parameters are cut over the ranks of a job."""

    def cut(name: str, shape: torch.Size) -> Piece:
        return Piece(name, shape, group.rank, group.size)

    return cut


@contextmanager
def gathering(model: nn.Module, cut: Cut) -> Generator[None]:
    """Inside, the model's modules gather what they are given instead of their own parameters.

    Raises:
        UnsupportedError: for a model that cannot be computed with shards.
    """
    before = [(module, _params(module)) for module in model.modules()]
    if any(isinstance(own, Gathering) for _, own in before):
        yield  # it is lent already
        return
    _require_gatherable(model)
    pieces = {id(p): cut(name, p.shape) for name, p in model.named_parameters()}
    try:
        for module, own in before:
            mine = {key: pieces[id(p)] for key, p in own.items() if p is not None}
            module.__dict__["_parameters"] = Gathering(own, mine)
        yield
    finally:
        for module, own in before:
            module.__dict__["_parameters"] = own


@contextmanager
def in_shards(group: Ranks) -> Generator[None]:
    """Inside, trees of parameters are this rank's shards, whoever computes with them."""

    def total(number: float) -> float:
        return group.total([number])[0]

    def most(number: float) -> float:
        return group.most(number)

    def lent(model: nn.Module) -> AbstractContextManager[None]:
        return gathering(model, pieces_of(group))

    with parts_of_a_whole(total, most), lending(lent), nothing_whole_kept():
        yield


@contextmanager
def held_in_shards(
    model: nn.Module, cut: Cut, own: Mapping[str, Tensor] | None = None
) -> Generator[None]:
    """Inside, the model holds shards: ``own`` or, so that it may be on the meta device, new ones.

    New ones have no value yet. They and new buffers, which are whole, are where the model is or, if
    that is nowhere, on the device that tensors are made on.
    """
    stand_ins: dict[int, Any] = {}
    for name, p in model.named_parameters():
        mine = _empty(cut(name, p.shape).held, p) if own is None else own[name]
        stand_ins[id(p)] = nn.Parameter(mine, p.requires_grad)
    for b in model.buffers():
        stand_ins[id(b)] = _empty(b.shape, b) if own is None else b
    with gathering(model, cut):
        held: list[tuple[dict[str, Any], str, Any]] = [
            (place, key, tensor)
            for module in model.modules()
            for place in (_params(module), module.__dict__["_buffers"])
            for key, tensor in place.items()
            if tensor is not None
        ]
        try:
            for place, key, tensor in held:
                place[key] = stand_ins[id(tensor)]
            yield
        finally:
            for place, key, tensor in held:
                place[key] = tensor


def _params(module: nn.Module) -> dict[str, Any]:
    return module.__dict__["_parameters"]


def _empty(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=device_of(like))


def _require_gatherable(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if not p.ndim:
            raise UnsupportedError(
                f"the parameter {name!r} has no dimension along which ranks could hold parts of it."
                " Leave out shard=True, or give it the shape [1]."
            )


def digests_of(model: nn.Module, named: Mapping[str, Tensor]) -> Live | WholeDigests:
    """What hashes tensors of a model, by their paths in a state, as they are at the time."""
    pieces: dict[int, Piece] = {}
    for module in model.modules():
        held = _params(module)
        pieces |= held.pieces() if isinstance(held, Gathering) else {}
    return WholeDigests(named, pieces) if pieces else Live(named)


class WholeDigests:
    """The digests of tensors of which some are held in shards: what ``Live`` is for whole ones.

    Each is gathered, and hashed by every rank.
    """

    def __init__(self, named: Mapping[str, Tensor], pieces: Mapping[int, Piece]) -> None:
        self.names = sorted(named)
        self._tensors: Tree = dict(named)
        self._pieces = {n: pieces[id(v)] for n, v in named.items() if id(v) in pieces}

    def digests(self) -> list[bytes]:
        """In the order of ``names``; collective."""
        return [digest.tensor_digest(name, self._whole(name)) for name in self.names]

    def _whole(self, name: str) -> Tensor:
        held = self._tensors[name].detach()
        return self._pieces[name].whole(held) if name in self._pieces else held

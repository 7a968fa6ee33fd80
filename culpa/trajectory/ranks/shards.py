"""Whole tensors as FSDP2 shards them: along dim 0, one chunk for each rank, padded to one length.

An optimizer steps on every rank's shard. Its arithmetic is element by element, but a kernel treats
the last few elements of a tensor by other instructions than the rest (seen in bfloat16, and in
fused optimizers, by PyTorch 2.13 on a CPU), so that a step on whole tensors gives other bits. So a
process that holds whole tensors steps on the shards of all ranks, which are views of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from culpa.trajectory.schema import OptimizerSpec
from culpa.trajectory.together import Stepper, rebuilt
from culpa.tree import Tree


def rows_of(whole: Tensor, ranks: int) -> int:
    """The rows of a shard, padded."""
    return -(-whole.shape[0] // ranks)


def shard(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """The view of ``whole`` that a rank holds; of a short tensor the last ranks hold nothing."""
    rows = rows_of(whole, ranks)
    return whole[rank * rows : (rank + 1) * rows]


def packed(wholes: Sequence[Tensor], ranks: int) -> Tensor:
    """``[ranks, elements]``: in row r the shards of rank r end to end, padded with zeros."""
    columns: list[Tensor] = []
    for whole in wholes:
        rows = rows_of(whole, ranks) * ranks
        padded = whole.new_zeros((rows, *whole.shape[1:]))
        padded[: whole.shape[0]] = whole
        columns.append(padded.reshape(ranks, -1))
    return torch.cat(columns, 1)


def unpacked(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of ``packed``; ``like`` have the shapes."""
    ranks, found, at = rows.shape[0], list[Tensor](), 0
    for whole in like:
        row_size = whole.numel() // max(1, whole.shape[0])
        width = rows_of(whole, ranks) * row_size
        flat = rows[:, at : at + width].reshape(-1)[: whole.numel()]
        found.append(flat.reshape(whole.shape).clone())
        at += width
    return found


def norms(shards: Sequence[Tensor]) -> Tensor:
    """The squared norms of a rank's shards, ``[len(shards)]``, as DTensor sums them over ranks."""
    return torch.stack([torch.linalg.vector_norm(one, 2.0) for one in shards]) ** 2


def stepper(
    spec: OptimizerSpec,
    hypers: Sequence[Mapping[str, Any]],
    params: Tree,
    given: Sequence[type[Optimizer]],
    whole: bool,
) -> Stepper:
    """``rebuilt``; over the shards of all ranks, if the update was one of such and ``params`` not.

    Args:
        spec, hypers, params, given: as there.
        whole: whether ``params`` are whole, and not one rank's shards.
    """
    if spec.reduction is None or not spec.reduction.sharded or not whole:
        return rebuilt(spec, hypers, params, given)
    return ShardStepper(spec, hypers, params, given, spec.reduction.ranks)


class ShardStepper:
    """A record's optimizers over the shards of all ranks; to an engine, over whole parameters.

    Args:
        spec, hypers: of the update.
        params: the live parameters by name.
        given: the user's own classes.
        ranks: how many hold the shards.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        hypers: Sequence[Mapping[str, Any]],
        params: Tree,
        given: Sequence[type[Optimizer]],
        ranks: int,
    ) -> None:
        self._ranks = ranks
        self._wholes = {name: params[name] for names in spec.groups for name in names}
        self.shards: dict[Tensor, list[nn.Parameter]] = {}
        named: Tree = {}
        for name, whole in self._wholes.items():
            views = [shard(whole.detach(), rank, ranks) for rank in range(ranks)]
            self.shards[whole] = [nn.Parameter(v) for v in views if v.shape[0] or not len(whole)]
            named |= {f"{name}/{r}": one for r, one in enumerate(self.shards[whole])}
        groups = tuple(
            tuple(f"{name}/{r}" for name in names for r in range(len(self.shards[params[name]])))
            for names in spec.groups
        )
        self._inner = rebuilt(msgspec.structs.replace(spec, groups=groups), hypers, named, given)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizers, with shards for parameters."""
        return self._inner.param_groups

    @property
    def state(self) -> ShardStates:
        """By whole parameter."""
        return ShardStates(self._inner, self.shards, self._ranks)

    def step(self) -> None:
        """One update, by the gradients at the whole parameters."""
        for whole, shards in self.shards.items():
            for rank, one in enumerate(shards):
                one.grad = None if whole.grad is None else shard(whole.grad, rank, self._ranks)
        self._inner.step()


class ShardStates:
    """The state of an optimizer over shards, as if it was one over whole parameters."""

    def __init__(self, inner: Any, shards: Mapping[Tensor, list[nn.Parameter]], n: int) -> None:
        self._inner, self._shards, self._ranks = inner, shards, n

    def __bool__(self) -> bool:
        return bool(self._inner.state)

    def __getitem__(self, whole: Tensor) -> ShardState:
        states = [self._inner.state[one] for one in self._shards[whole]]
        return ShardState(states, whole, self._ranks)

    def items(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """By whole parameter its slots, put together anew."""
        known = {id(one): state for one, state in self._inner.state.items()}
        for whole, shards in self._shards.items():
            states = [known.get(id(one), {}) for one in shards]
            slots = {slot: [state[slot] for state in states] for slot in states[0]}
            yield whole, {slot: _whole(values, shards) for slot, values in slots.items()}

    def clear(self) -> None:
        """Forget all of it."""
        self._inner.state.clear()


class ShardState:
    """The slots of one parameter, to be set."""

    def __init__(self, states: Sequence[dict[str, Any]], whole: Tensor, ranks: int) -> None:
        self._states, self._whole, self._ranks = states, whole, ranks

    def __setitem__(self, slot: str, value: Any) -> None:
        for rank, state in enumerate(self._states):
            if not isinstance(value, Tensor):
                state[slot] = value
            elif value.ndim and value.shape == self._whole.shape:
                state[slot] = shard(value, rank, self._ranks).clone()
            else:
                state[slot] = value.clone()


def _whole(values: Sequence[Any], shards: Sequence[Tensor]) -> Any:
    """One slot of a parameter, from those of its shards: elementwise, or one number of all."""
    first = values[0]
    if isinstance(first, Tensor) and first.ndim and first.shape == shards[0].shape:
        return torch.cat([*values])
    return first

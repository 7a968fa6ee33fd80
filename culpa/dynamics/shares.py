"""Work on one update's loss, split over the ranks of a job and summed.

The loss is a weighted sum over micro-batches, so gradients and products with its curvature are sums
of those of its parts. With at least as many micro-batches as ranks each rank takes whole ones. With
fewer it takes rows of each, if the loss is a mean over rows: that is measured at every update, and
where it is not so, or the forward pass draws random numbers or normalises by the batch, whole
micro-batches are dealt out all the same, and some ranks have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec
import torch
from torch import Tensor

from culpa import tree
from culpa.errors import UnsupportedError
from culpa.trajectory import batches
from culpa.trajectory.ranks.group import Ranks, ranks, sum_over_ranks
from culpa.trajectory.ranks.joined import alone, holders, sharing
from culpa.trajectory.walk import Transition
from culpa.tree import Tree

CLOSE = 1e-5
"""Relative difference of the loss from that of its rows that is put down to rounding."""


@runtime_checkable
class Shared(Protocol):
    """What of a ``LocalLoss`` is needed here."""

    transition: Transition
    params: Tree
    by_rows: bool | None

    @property
    def normalises_by_batch(self) -> bool:
        """Whether a layer normalises by the batch."""
        ...

    def value(self, params: Tree) -> Tensor:
        """The loss."""
        ...

    def of(self, transition: Transition) -> Any:
        """The same loss on other batches."""
        ...

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returned at the first call."""
        ...


Local = TypeVar("Local", bound=Shared)


def over_ranks(
    local: Local, work: Callable[[Local], list[Tree]], like: Sequence[Tree]
) -> list[Tree]:
    """What ``work`` returns for the update's loss; inside of ``across_ranks`` the ranks share it.

    Args:
        local: the loss.
        work: linear in the loss.
        like: trees of the shapes that it returns.

    Raises:
        UnsupportedError: on the ranks where it works, if it fails on others.
    """
    group = sharing()
    if group is None:
        return work(local)
    if holders() is not None:  # what comes back to shards is summed where they were gathered
        part = local.once("part", lambda: _taken(local, group, by_rows=False))
        with alone():
            return work(part)
    decide(local)
    failure, found = None, [tree.zeros_like(one) for one in like]
    try:
        part = local.once("part", lambda: _taken(local, group, local.by_rows is True))
        if part is not None:
            with alone():
                found = work(part)
    except Exception as error:  # noqa: BLE001 (raised below, once the others know)
        failure = error
    (failures,) = group.total([float(failure is not None)])
    if failure is not None:
        raise failure
    if failures:
        raise UnsupportedError(f"{int(failures)} of {group.size} ranks could not do their part.")
    return sum_over_ranks(found)


def over_rows(
    local: Local,
    work: Callable[[Local, int], tuple[list[Tree], list[Tensor]]],
    like: Sequence[Tree],
    examples: int,
) -> tuple[list[Tree], list[Tensor]]:
    """``over_ranks`` for work that returns a number for each row of the loss as well.

    Args:
        local, like: as there.
        work: of a loss and its rows: for each tree of ``like`` one, and float64 ``[rows]``.
        examples: rows of the whole update.
    """

    def spread(part: Local) -> list[Tree]:
        own = torch.tensor(_places(local))
        found, numbers = work(part, len(own))
        whole = [torch.zeros_like(row).index_copy_(0, own, n) for n in numbers]
        return [*found, *({"rows": one} for one in whole)]

    row = torch.zeros(examples, dtype=torch.float64)
    found = over_ranks(local, spread, [*like, *({"rows": row} for _ in like)])
    rows = found[len(like) :] if holders() is None else sum_over_ranks(found[len(like) :])
    return found[: len(like)], [one["rows"] for one in rows]


def decide(local: Shared) -> None:
    """Find out whether the ranks may split the loss by rows, for it and all made from it."""
    group = sharing()
    if group is not None and local.by_rows is None:
        local.by_rows = holders() is None and _splits(local, group)


def _places(local: Shared) -> list[int]:
    """The places of this rank's rows among those of the whole update."""
    group, found, start = ranks(), list[int](), 0
    for at, count in enumerate(_rows(local)):
        chosen = range(start, start + count)
        if local.by_rows:
            found += chosen[group.rank :: group.size]
        elif at % group.size == group.rank:
            found += chosen
        start += count
    return found


def _splits(local: Shared, group: Ranks) -> bool:
    """Whether the loss is a mean over rows of which every rank can have some."""
    transition = local.transition
    if len(transition.batches) >= group.size or transition.randoms or local.normalises_by_batch:
        return False
    if min(_rows(local)) < group.size:
        return False
    with torch.no_grad(), alone():
        whole = transition.loss
        if math.isnan(whole):
            whole = float(local.value(local.params))
        try:
            own = float(_taken(local, group, by_rows=True).value(local.params))
        except Exception:  # noqa: BLE001 (whatever it is, the rows of a rank are no batch)
            own = math.nan
    (summed,) = group.total([own])
    return abs(summed - whole) <= CLOSE * abs(whole)


def _rows(local: Shared) -> list[int]:
    return [batches.row_count(batch) for batch in local.transition.batches]


def _taken(local: Any, group: Ranks, by_rows: bool) -> Any:
    """What this rank works on; ``None``: nothing."""
    transition: Transition = local.transition
    size = group.size
    weights = transition.record.weights or (1 / len(transition.batches),) * len(transition.batches)
    chosen: list[Any] = []
    shares: list[float] = []
    at = range(len(transition.batches)) if by_rows else range(group.rank, len(weights), size)
    for i in at:
        batch, weight = transition.batches[i], weights[i]
        if by_rows:
            count = batches.row_count(batch)
            rows = torch.arange(group.rank, count, size)
            if len(rows) == 0:
                continue
            batch, weight = batches.take_rows(batch, rows), weight * len(rows) / count
        chosen.append(batch)
        shares.append(weight)
    if not chosen:
        return None
    moved = replace(
        transition,
        record=msgspec.structs.replace(transition.record, weights=tuple(shares)),
        batches=chosen,
        randoms=[transition.randoms[i] for i in at] if transition.randoms else (),
    )
    return local.of(moved)

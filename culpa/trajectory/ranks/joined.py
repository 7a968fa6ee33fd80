"""What the processes of a job do together, for the time of a block: walk a run, or record one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import msgspec

from culpa.trajectory.ranks.group import Ranks, ranks, synchronised
from culpa.trajectory.ranks.lent import in_shards


@dataclass(frozen=True)
class Together:
    """The job whose processes execute updates together; ``live``: each knows its own part only."""

    ranks: Ranks
    live: bool
    shard: bool = False
    """Whether parameters are this rank's shards (lent.py)."""


_joined: ContextVar[Together | None] = ContextVar("culpa processes", default=None)


@contextmanager
def across_ranks(*, shard: bool = False) -> Generator[Ranks]:
    """Inside, every rank of a torch.distributed job calls the same functions, and shares the work.

    ``culpa.replay`` executes the updates of a run that was recorded on as many ranks as those
    ranks did; ``culpa.attribute`` and ``culpa.embed`` besides split the batches of every update
    over the ranks, whatever the run was recorded on, and sum the products. Every rank gets the
    whole result, and must make the same calls in the same order. Outside every process works for
    itself; call all other functions there. (``culpa.audit`` decides by the clock what to do next:
    inside, the ranks would part and wait for each other.)

    Args:
        shard: hold parameters, optimizer states, adjoints and displacements in shards, for runs
            that ``fully_shard`` was recorded on with as many ranks. Then no rank holds a whole
            model: the one that is given, which nothing shards, may be on the meta device, and
            parameters in results (``Counterfactual.state``, ``StageEmbeddings``) are this rank's
            shards. Whatever evaluates such a result is to be called inside, too, on every rank.

    Raises:
        OptionError: if this process is not one of several.
    """
    group = ranks()
    token = _joined.set(Together(group, live=False, shard=shard))
    try:
        with synchronised(group), in_shards(group) if shard else nullcontext():
            yield group
    finally:
        _joined.reset(token)


@contextmanager
def live(group: Ranks | None, *, shard: bool = False) -> Generator[None]:
    """Inside, updates are executed as they are being recorded: each rank has its own part only."""
    token = _joined.set(None if group is None else Together(group, live=True, shard=shard))
    try:
        with nullcontext() if group is None or not shard else in_shards(group):
            yield
    finally:
        _joined.reset(token)


def alone() -> AbstractContextManager[None]:
    """Inside, this process works for itself, on its part of what all ranks share."""
    return live(None)


def joined() -> Together | None:
    """The job whose processes execute updates together, if they do."""
    return _joined.get()


def sharing() -> Ranks | None:
    """The ranks of ``across_ranks``, where they share work."""
    together = _joined.get()
    return None if together is None or together.live else together.ranks


def holders() -> Ranks | None:
    """The ranks of which each holds shards of all parameters, where they do."""
    together = _joined.get()
    return together.ranks if together is not None and together.shard else None


def verdict(name: str, size: float) -> tuple[str, float]:
    """What differed on the first rank, whose buffers are recorded, or most of all shards.

    The same on every rank.
    """
    together, said = _joined.get(), msgspec.msgpack.encode((name, size))
    if together is None or not together.live:
        return name, size
    ranks = together.ranks
    every = ranks.everywhere(said) if together.shard else [ranks.from_first(said)]
    found = [msgspec.msgpack.decode(one, type=tuple[str, float]) for one in every]
    return max((one for one in found if one[0]), key=lambda one: one[1], default=("", 0.0))

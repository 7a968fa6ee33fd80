"""The writer of a recording that several ranks make: the first one writes what all have.

Every rank gathers its parts of a few updates, then all of them send theirs to the first rank, which
makes whole updates of them. How many are gathered the first rank says each time. All exchanges are
made by all ranks after the same update; a rank that is gone ends the recording as a failing disk
does: what was exchanged is kept, as a truncated run.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import msgspec

from culpa.errors import CulpaError, RecordError, RecordingStopped
from culpa.trajectory import digest
from culpa.trajectory.beside import GROUP
from culpa.trajectory.checkpoints import CheckpointPolicy
from culpa.trajectory.commits import Commit, Item, ended
from culpa.trajectory.items import Noted
from culpa.trajectory.point import LoopEnd
from culpa.trajectory.ranks.group import Ranks
from culpa.trajectory.ranks.parts import Message, Part, Reply, joined, part_of
from culpa.trajectory.state import State
from culpa.trajectory.writer import Writer

GATHERED = GROUP
"""At most so many updates are gathered before they are exchanged."""
GATHERING = 0.5
"""Seconds for which they are, at most, as far as can be foreseen."""
PATIENCE = 600.0
"""Seconds that a rank waits for the others to end their recording."""


class Exchange:
    """Takes a recorder's items as a ``Writer`` does.

    Args:
        group: the ranks.
        folder: of the run.
        policy: which states to keep.
        writer: on the first rank.
        replicated: whether every rank holds all parameters.
    """

    def __init__(
        self,
        group: Ranks,
        folder: Path,
        policy: CheckpointPolicy,
        writer: Writer | None,
        *,
        replicated: bool = True,
    ) -> None:
        self.folder = folder
        self.arena = None  # updates are gathered here: copies have memory of their own
        self.kept = frozenset[int]() if writer is None else writer.kept
        self._policy = policy
        self._group = group
        self._writer = writer
        self._replicated = replicated
        self._alive = True
        self._items: list[Item] = []
        self._parts: list[Part] = []
        self._ended: list[Noted] = []
        self._after = 1
        self._since = time.monotonic()

    @property
    def policy(self) -> CheckpointPolicy:
        """Which states to keep."""
        return self._policy

    @policy.setter
    def policy(self, policy: CheckpointPolicy) -> None:
        self._policy = policy
        if self._writer is not None:
            self._writer.policy = policy

    def alive(self) -> bool:
        """Whether the recording goes on, as all ranks know since the last exchange."""
        return self._alive

    def due(self, index: int) -> bool:
        """Whether a point to go on from is to be taken at update ``index``: of all ranks at one.

        It is for the first update of every exchange.
        """
        return not self._parts

    def submit(self, item: Item) -> None:
        """Hand something over; every so many updates all ranks wait for each other here.

        Raises:
            RecordError: on all ranks, if their parts are not of one update.
        """
        if not self._alive:
            return
        if self._writer is not None:
            self._items.append(item)
        elif isinstance(item, LoopEnd):
            self._ended += ended(item)
        if isinstance(item, Commit):
            self._parts.append(part_of(item, self._ended))
            self._ended = []
        if len(self._parts) >= self._after:
            self._exchange(b"")

    def close(self, final: State | None, status: str, reason: str, seconds: float) -> None:
        """End the recording; the ranks leave together, once it is complete.

        Raises:
            RecordError: if the ranks made other numbers of updates, or ended with other parameters.
        """
        writer = self._writer
        if status == "complete" and self._alive:
            self._group.meet(PATIENCE)
            compared = final.params if final is not None and self._replicated else {}
            self._exchange(digest.combine(digest.tensor_digests(compared)))
        left = len([item for item in self._items if isinstance(item, Commit)])
        if writer is not None and (left or not self._alive):
            writer.give_up(f"{reason or status}; {left} updates were not exchanged between ranks")
        elif writer is not None:
            for item in self._items:
                writer.submit(item)
            writer.close(final, status, reason, seconds)
        if status == "complete" and self._alive:
            self._group.from_first(b"")  # the run is there

    def _exchange(self, state: bytes) -> None:
        """Send the parts gathered, or take them."""
        sent = msgspec.msgpack.encode(Message(self._parts, state))
        try:
            arrived = self._group.to_first(sent)
            reply = self._answer(arrived, state)
            reply = msgspec.msgpack.decode(
                self._group.from_first(msgspec.msgpack.encode(reply)), type=Reply
            )
        except RuntimeError as error:  # a rank is gone
            self._alive = False
            warnings.warn(
                f"recording to {self.folder} stopped: another rank is gone ({error}).",
                RecordingStopped,
                stacklevel=2,
            )
            return
        self._parts, self._items = [], []
        self._after, self._alive = reply.after, reply.alive
        self._since = time.monotonic()
        if reply.error:
            self._alive = False
            raise RecordError(reply.error)

    def _answer(self, arrived: list[bytes], state: bytes) -> Reply:
        """What the first rank says, once it has handed the whole updates to the writer."""
        writer = self._writer
        if writer is None:
            return Reply("", True, 1)  # nobody reads it
        others = [msgspec.msgpack.decode(data, type=Message) for data in arrived[1:]]
        try:
            self._require_same(others, state)
            for item in self._items:
                whole = item
                if isinstance(item, Commit):
                    whole = joined(item, [other.parts.pop(0) for other in others])
                writer.submit(whole)
            alive = writer.alive()
        except CulpaError as error:
            return Reply(str(error), False, 1)
        pace = (time.monotonic() - self._since) / max(1, len(self._parts))
        return Reply("", alive, max(1, min(GATHERED, int(GATHERING / max(pace, 1e-6)))))

    def _require_same(self, others: list[Message], state: bytes) -> None:
        for rank, other in enumerate(others, 1):
            if len(other.parts) != len(self._parts) or bool(other.state) != bool(state):
                raise RecordError(
                    f"rank {rank} made {len(other.parts)} updates since the last exchange, and rank"
                    f" 0 {len(self._parts)}. Every rank must make as many: give them loaders of the"
                    " same length (DistributedSampler)."
                )
            if other.state != state:
                raise RecordError(
                    f"rank {rank} ended with other parameters than rank 0. Something changed them"
                    " on one rank only."
                )

"""Going on with what was recorded: with its last job after a crash, or by a further job.

On several ranks each finds in the folder what it was itself at the point, and they recompute the
state together, as they made it; the first one alone writes to the folder, once the others have read
it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from culpa.errors import RecordError, StoreError
from culpa.problem import Problem
from culpa.trajectory import digest, environment, jobs, unfinished
from culpa.trajectory.jobs import Begun
from culpa.trajectory.observer import Observer
from culpa.trajectory.ranks.joined import across_ranks
from culpa.trajectory.ranks.recording import Partners
from culpa.trajectory.resume import Resumption
from culpa.trajectory.run import Run
from culpa.trajectory.schema import MANIFEST, Manifest
from culpa.trajectory.state import State


class Job(msgspec.Struct, frozen=True):
    """What the first rank says of a job that begins: what it stands on, and what it takes over."""

    index: int
    names: list[str]
    losses: int
    fresh: bool
    held: list[str]
    manifest: bytes
    slots: bytes
    """The digest of the optimizer's state."""


def begun(others: Partners, observer: Observer, begin: Callable[[], Begun | None]) -> Begun | None:
    """``jobs.begin`` on the first rank, for all of them.

    Raises:
        RecordError: if the optimizer has another state on a rank.
    """
    group, own = others.group, list[Begun | None]()
    slots = digest.combine(digest.tensor_digests(State({}, {}, observer.slots()).flat()))
    group.on_first(lambda: own.append(begin()))
    said = b""
    if group.first and (found := own[0]) is not None:
        base, held = found.base, [*found.initial.params]
        facts = (base.index, sorted(base.names), base.losses, base.fresh, held)
        said = msgspec.msgpack.encode(Job(*facts, found.manifest.encode(), slots))
    said = group.from_first(said)
    if not said:
        return None
    job = msgspec.msgpack.decode(said, type=Job)
    same = group.total([float(slots == job.slots)])[0] == group.size
    if not same:
        raise RecordError(
            "the optimizer given to culpa.record(append=True) has another state on one rank than on"
            " rank 0. Pass a new one on every rank, or load the same state_dict on all."
        )
    if group.first:
        return own[0]
    base = jobs.Base(job.index, frozenset(job.names), job.losses, job.fresh)
    live = observer.state({name: observer.params[name] for name in job.held}, slots=False)
    return Begun(base, live, msgspec.json.decode(job.manifest, type=Manifest))


def ahead(
    others: Partners | None,
    folder: Path,
    problem: Problem,
    observer: Observer,
    scheduler: Any,
    *,
    append: bool,
) -> Resumption | None:
    """What the script must pass through before it records; ``None`` if nothing was committed yet.

    Raises:
        StoreError, OptionError, UnsupportedError, IntegrityError: as ``unfinished``; on every rank.
        EnvironmentDifference: if this process differs from the one that recorded.
    """

    def load(rank: int, ranks: int) -> tuple[Resumption, Run]:
        found, run = unfinished.load(
            folder, scheduler, observer.optimizer, append=append, rank=rank, ranks=ranks
        )
        here = environment.capture(observer.params.values())
        environment.require_same(found.manifest.environment, here, str(folder))
        return found, run

    def prepare() -> bool:
        return (folder / MANIFEST).is_file() and unfinished.prepare(folder)

    if others is not None:
        return _together(others, folder, problem, prepare, load)
    if not prepare():
        return None
    found, run = load(0, 1)
    found.recompute(run, problem)
    return found


def _together(
    others: Partners,
    folder: Path,
    problem: Problem,
    prepare: Callable[[], bool],
    load: Callable[[int, int], tuple[Resumption, Run]],
) -> Resumption | None:
    others.require_resumable()
    group, there = others.group, list[bool]()
    group.on_first(lambda: there.append(prepare()))
    if not group.from_first(b"updates" if any(there) else b""):
        return None
    found, run = group.agreed(lambda: load(group.rank, group.size))  # each reads the folder
    last = run.step(run.num_steps - 1).digest
    seen = msgspec.msgpack.encode([found.num_steps, found.point.index, last])
    for rank, elsewhere in enumerate(group.everywhere(seen)):
        if elsewhere != seen:
            raise StoreError(
                f"rank {rank} and rank {group.rank} do not find the same in {folder}. To resume,"
                " every rank reads the folder that the first one writes: put it where all of them"
                " see it."
            )
    with others.bare(), across_ranks():
        found.recompute(run, problem)
    del run
    group.total([0.0])  # before the first one writes there again
    return found

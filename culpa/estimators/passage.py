"""The observed updates from the last to the first, read where the record has what it takes.

An update between two kept states, whose gradient the optimizer's moments tell (recovered.py), need
not be executed again: the states are in the record, and the sweep makes its own derivatives. All
others are executed, and so are, to prove that the problem is the one that was recorded, the last
update of every stage and ``PROVED`` spread over the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from culpa.dynamics.choice import Choice
from culpa.dynamics.graphs import Graphs
from culpa.dynamics.recovered import recovered
from culpa.errors import IntegrityError
from culpa.problem import Problem
from culpa.trajectory import digest
from culpa.trajectory.engine import Engine
from culpa.trajectory.hold import Hold, InMemory, backward
from culpa.trajectory.ranks.joined import sharing
from culpa.trajectory.rng import RandomState
from culpa.trajectory.run import Run
from culpa.trajectory.state import State
from culpa.trajectory.taken import Taker
from culpa.trajectory.walk import Transition, segment

PROVED = 8
"""So many updates of a run are executed and compared bit for bit, whatever could be read."""


def passage(
    run: Run, engine: Engine, hold: Hold | None = None, taker: Taker | None = None
) -> Iterator[Transition]:
    """``backward`` for a run of which states next to each other may be kept.

    A transition that was read has no loss (nan) and no graph. Cost: nothing but reading where
    states are kept, else one replay of the updates; memory as for ``backward``.

    Raises:
        IntegrityError: if a state is not the recorded one, or an executed update does not give it.
    """
    kept = frozenset(run.kept_states)
    pairs = sum(k + 1 in kept for k in kept)
    # Ranks that share the work share an executed update's loss too, which they need.
    executed = engine.fidelity.allow_drift or sharing() is not None
    if executed or pairs <= PROVED + len(run.stages):
        yield from backward(run, engine, hold=hold, taker=taker)
        return
    hold = hold or InMemory()
    stride = max(1, run.num_steps // PROVED)
    proved = {run.num_steps - 1, *(s.stop - 1 for s in run.stages)}
    proved |= {*range(0, run.num_steps, stride)}
    bounds = [*(k for k in run.kept_states if k < run.num_steps), run.num_steps]
    after: State | None = None
    for low, high in zip(reversed(bounds[:-1]), reversed(bounds[1:]), strict=True):
        if high == low + 1 and low not in proved:
            start = run.state(low).placed(engine.params, engine.buffers)
            end = after or run.state(high).placed(engine.params, engine.buffers)
            found = _read(run, low, start, end)
            if found is not None:
                yield found
                after = start
                continue
        after = None
        yield from hold.backwards(segment(run, engine, low, high, taker))


def graphs(
    run: Run,
    problem: Problem,
    choice: Choice,
    running: Sequence[str],
    by_example: bool,
    hold: Hold | None = None,
) -> Graphs | None:
    """Keeps graphs of the replay, if updates wait in memory and products differentiate twice."""
    hold = hold or InMemory()
    if not isinstance(hold, InMemory) or hold.dtype is not None:
        return None
    if sharing() is not None:
        return None

    def count(k: int) -> int:
        return len(run.example_ids(k))

    examples = count if by_example else None
    return Graphs(problem, hold.graphs, lambda: choice.differentiates, examples, running)


def _read(run: Run, k: int, before: State, after: State) -> Transition | None:
    """Update k by the states around it, or ``None`` if it must be executed to be known."""
    record = run.step(k)
    randoms = _randoms(run, k)
    if randoms is None:
        return None
    seen = run.held_before(after, k + 1)
    if digest.combine(seen.step_digests()) != record.digest:
        raise IntegrityError(
            f"the kept state {k + 1} of {run.path} is not what the record says followed update {k}."
            " The file was changed, or the log was: run.verify() says which."
        )
    start = State(before.params, before.buffers) if record.reset else before
    grads = recovered(record, start, after)
    if grads is None:
        return None
    untouched = run.tables.frozen_before(k + 1) if run.tables.joined else frozenset[str]()
    body = run.batches_of(k)[record.discarded :]
    return Transition(record, start, after, grads, math.nan, body, randoms, untouched)


def _randoms(run: Run, k: int) -> Sequence[RandomState] | None:
    """The generators before each micro-batch; ``None`` if they follow from an earlier update."""
    record = run.step(k)
    if not record.drew_randomness:
        return ()
    states = run.randoms_of(k)[record.discarded :]
    return [s for s in states if s is not None] if all(s is not None for s in states) else None

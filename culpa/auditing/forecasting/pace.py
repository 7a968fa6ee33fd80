"""The pace of every job on a run, measured on a few of its updates, as the job itself does them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from culpa.auditing.forecasting.stopwatch import Clock, is_enough, typical, watched
from culpa.auditing.tasks import Bench, Task
from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Exact, Propagator
from culpa.estimators import remainder
from culpa.estimators.adjoint import attribute
from culpa.estimators.embed import embed
from culpa.estimators.probes import PROBES
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.hold import Hold
from culpa.trajectory.run import Run
from culpa.trajectory.schema import Stage
from culpa.trajectory.walk import forward, session

LOOKED_AT = 12
"""Updates of a sweep that are timed at least."""
STRETCH = 5
"""Updates of a stage that are executed at least to find its pace."""
STAGES = 12
"""Stages whose pace is measured; the others have that of the nearest."""
BEHIND = 10
"""Updates behind the stages by which ``embed`` is timed: it carries them all along the last 8."""
WHOLE = 24
"""Runs of fewer updates are embedded whole."""
TRUST = 3.0
"""Gradients by which an update is dearer at which ``attribute`` measures its trust."""
MOST_REMAINDERS = 6
"""``embed`` measures the remainder so often for each stage."""


@dataclass(frozen=True)
class Paces:
    """Seconds of one executed update, by stage; ``start``: before the first one of a replay."""

    by_stage: dict[str, float]
    start: float

    def executed(self, lengths: Mapping[str, int]) -> float:
        """Seconds of the updates of these stages."""
        last = list(self.by_stage.values())[-1]
        return sum(count * self.by_stage.get(name, last) for name, count in lengths.items())

    def relative(self, name: str) -> float:
        """A stage's pace over that of the last, where the sweeps are timed."""
        last = list(self.by_stage.values())[-1]
        return self.by_stage.get(name, last) / last if last > 0.0 else 1.0


@dataclass(frozen=True)
class Sweep:
    """Seconds of a sweep besides the updates that it executes.

    ``start`` once; ``each`` for every update (of ``embed``: and stage behind) at the pace of the
    last stage; ``probe`` more at an update where it measures how good it is.
    """

    start: float
    each: float
    probe: float


def paces(run: Run, problem: Problem, clock: Clock, *, allow_drift: bool) -> Paces:
    """Execute some updates of every stage, from the state kept in it."""
    chosen = [s for s in run.stages if len(s)][:: max(1, -(-len(run.stages) // STAGES))]
    chosen = chosen or [Stage("", 0, run.num_steps)]
    found: dict[str, float] = {}
    began = clock()
    with session(run, problem, allow_drift) as engine:
        start = clock() - began
        for stage in chosen:
            kept = [k for k in run.kept_states if stage.start <= k < stage.stop]
            at = kept[len(kept) // 4] if kept else stage.start
            seconds: list[float] = []
            last = clock()
            for transition in forward(run, engine, at, stage.stop):
                now = clock()
                if transition.index >= stage.start:
                    seconds.append(now - last)
                last = now
                if is_enough(seconds, STRETCH):
                    break
            found[stage.name] = typical(seconds[1:] or seconds)
    every: dict[str, float] = {}
    for stage in run.stages or chosen:
        near = min(chosen, key=lambda s: abs(s.start - stage.start))
        every[stage.name] = found[near.name]
    return Paces(every, start)


def attributing(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    pace: Paces,
    clock: Clock,
    *,
    propagator: Propagator | None,
    examples: bool,
    hold: Hold | None,
    allow_drift: bool,
) -> Sweep:
    """Time ``culpa.attribute`` from the last update on; its first segment is executed whole."""
    count = run.num_steps

    def job(progress: Progress) -> None:
        attribute(
            run,
            problem,
            behaviours,
            propagator=propagator,
            examples=examples,
            hold=hold,
            allow_drift=allow_drift,
            progress=progress,
        )

    seconds = watched(clock, LOOKED_AT, job)
    bounds = [*run.kept_states]
    first, plain, probed = 0.0, list[float](), list[float]()
    for i, took in enumerate(seconds):
        k = count - 1 - i
        if k + 1 in bounds:  # the segment that ends here was executed first
            took -= (k + 1 - run.kept_before(k)) * _pace_at(run, pace, k)
        if i == 0:
            first = took
        else:
            (probed if i % math.ceil(count / PROBES) == 0 else plain).append(took)
    each = max(0.0, typical(plain or probed or [0.0]))
    gradient = _pace_at(run, pace, count - 1)
    more = max(0.0, typical(probed) - each) if plain and probed else TRUST * gradient
    more = more if plain else 0.0
    return Sweep(max(0.0, first - each - more), each, more)


def embedding(
    run: Run,
    problem: Problem,
    pace: Paces,
    clock: Clock,
    *,
    propagator: Propagator | None,
    allow_drift: bool,
) -> Sweep:
    """Time ``culpa.embed`` on two single updates near the end; short runs whole."""
    count = run.num_steps
    whole = count < WHOLE
    alone = [] if whole else [count - BEHIND - 1, count - BEHIND + 1]
    asked = propagator or Exact(at="gauss")

    def job(progress: Progress) -> None:
        embed(
            run,
            problem,
            updates=alone,
            propagator=asked,
            allow_drift=allow_drift,
            progress=progress,
        )

    began = clock()
    seconds = watched(clock, None, job)
    if whole:
        lengths = {s.name: len(s) for s in run.stages}
        return Sweep(max(0.0, clock() - began - pace.executed(lengths)), 0.0, 0.0)
    where = remainder.probes([Stage(str(k), k, k + 1) for k in alone], count)
    first, gradient = alone[0], _pace_at(run, pace, count - 1)
    plain, probed = list[float](), list[float]()
    for k, took in enumerate(seconds, first):
        if k > alone[-1]:
            at = sum(k in places for places in where.values())
            (probed if at else plain).append(took - gradient)
    both = max(0.0, typical(plain or probed))
    more = max(0.0, typical(probed) - both) / len(alone) if plain and probed else 0.0
    walked = first + 1 - run.kept_before(first)
    return Sweep(max(0.0, seconds[0] - walked * gradient), both / len(alone), more)


def attributed(sweep: Sweep, pace: Paces, lengths: Mapping[str, int]) -> float:
    """Seconds of ``culpa.attribute`` on stages of these lengths."""
    count = sum(lengths.values())
    probes = len(range(0, count, math.ceil(count / PROBES)))  # at most: settled ones are sparse
    swept = sum(n * pace.relative(name) for name, n in lengths.items()) * sweep.each
    return sweep.start + pace.executed(lengths) + swept + probes * sweep.probe


def embedded(sweep: Sweep, pace: Paces, lengths: Mapping[str, int]) -> float:
    """Seconds of ``culpa.embed`` of all stages of these lengths by a sweep."""
    names = list(lengths)
    behind = sum(number * lengths[name] * pace.relative(name) for number, name in enumerate(names))
    probes = MOST_REMAINDERS * (len(names) - 1)
    return sweep.start + pace.executed(lengths) + behind * sweep.each + probes * sweep.probe


def judging(bench: Bench, pace: Paces, clock: Clock) -> Sweep:
    """Time what a replay in an audit takes besides its updates: behaviours, layers, states."""
    run = bench.run
    last = run.num_steps - 1
    began = clock()
    outcome = bench(Task(start=last, stop=last + 1, drill=True))
    took = clock() - began - outcome.updates * _pace_at(run, pace, last)
    return Sweep(max(0.0, took), 0.0, 0.0)


def _pace_at(run: Run, pace: Paces, k: int) -> float:
    stage = run.stage_at(k)
    return list(pace.by_stage.values())[-1] if stage is None else pace.by_stage[stage.name]

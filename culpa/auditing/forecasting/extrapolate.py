"""From a few updates to the whole run: seconds, memory and disk of every job.

For K updates:

    replay       start + sum over stages of (updates x pace of the stage)
    attribute    replay + start + K each + 16 probes, by how many graphs of the replay there are
    embed        replay + start + (updates behind each stage, summed) each + 6 probes a stage
    record       start + K each + one more at every stage + states written x the cost of one
    audit        attribute + replays within the budget (+ embed, unless all stages are replayed)

Memory is the peak of the whole process while the job was begun, and what the job will hold beyond
that: recomputed states with their gradients and batches (``attribute``, by where they wait:
waiting.py), displacements and optimizer states (``embed``). Pages of the run's files, which the
system may drop, count only where they were read. Processes that share the work hold the model, the
states and the adjoints each, and of a batch only their part: at most as much as one alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from culpa.auditing.forecasting import pace
from culpa.auditing.forecasting.job import Job, Jobs
from culpa.auditing.forecasting.pace import Paces, Sweep
from culpa.auditing.forecasting.plan import Plan, Planned, Rehearsal, history
from culpa.auditing.forecasting.resources import Peak, peak
from culpa.auditing.forecasting.stopwatch import Clock
from culpa.auditing.forecasting.waiting import Graphed, Waiting
from culpa.auditing.prices import History, price, replaying_costs_less
from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Propagator
from culpa.errors import OptionError, UnsupportedError
from culpa.estimators.by_replay import REPLAYED_UP_TO
from culpa.trajectory.hold import Hold
from culpa.trajectory.run import Run
from culpa.trajectory.schema import FROZEN_NAME, Stage

ROW_IN_LOG = 90
"""Bytes of the log for every distinct training example: its digest, its place, their index."""
SURVEY, SURVEYED_FROM = 60.0, 200
"""Gradients of the survey of strategies, and the length of a sweep from which on there is one."""
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What a forecast was asked for, besides the run or the plan."""

    behaviours: Sequence[Behaviour]
    budget: float
    propagator: Propagator | None
    allow_drift: bool
    clock: Clock
    hold: Hold | None = None
    processes: int = 1


@dataclass
class Measured:
    """Everything that was measured; ``peaks`` by job, ``graphs`` of the sweeps."""

    paces: Paces
    sweeps: dict[str, Sweep] = field(default_factory=dict[str, Sweep])
    peaks: dict[str, Peak] = field(default_factory=dict[str, Peak])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    graphs: Graphed = field(default_factory=Graphed)

    def watch(self, job: str, work: Callable[[], T]) -> T:
        """Do ``work``, note what memory it took."""
        with peak() as found:
            result = work()
        self.peaks[job] = found
        return result

    def sweep(self, job: str, work: Callable[[], Sweep]) -> None:
        """Measure a sweep, or note why it is refused."""
        try:
            self.sweeps[job] = self.watch(job, work)
        except (OptionError, UnsupportedError) as error:
            self.refused[job] = str(error)


@dataclass(frozen=True)
class Shape:
    """The run that is forecast: its stages' lengths, its kept states, sizes of what it holds.

    ``longest``: updates of the longest stretch between two kept states. ``state``: bytes of a
    state; ``waiting``: of a recomputed update, held as asked, and ``beside``, where the model is.
    """

    lengths: Mapping[str, int]
    history: History
    longest: int
    state: int
    waiting: Waiting
    beside: Waiting

    @property
    def stages(self) -> list[Stage]:
        """Those that are not empty, in order."""
        found: list[Stage] = []
        start = 0
        for name, length in self.lengths.items():
            found += [Stage(name, start, start + length)] if length else []
            start += length
        return found


def jobs_of(
    found: Measured, shape: Shape, run: Run, asked: Asked, before: int, jobs: dict[str, Job]
) -> Jobs:
    """All jobs: what was measured on ``run`` extrapolated to ``shape``."""
    paces, lengths, stages = found.paces, shape.lengths, shape.stages
    count = shape.history.num_steps
    swept_here = run.num_steps - run.kept_before(run.num_steps - 1)
    executing = paces.executed(lengths)
    mean = executing / count
    further = max(0, shape.longest - swept_here)
    graphs = found.graphs.memory(shape.longest, swept_here)
    held = {
        "attribute": shape.waiting.times(further).and_beside(graphs),
        "screen": shape.beside.times(further).and_beside(graphs),
        "embed": Waiting(max(0, len(stages) - 2) * shape.state),
    }
    shared = {"replay", "attribute", "embed"} if asked.processes > 1 else set[str]()
    on_device = next(iter(run.manifest.environment.get("device", "cpu").split(", "))) != "cpu"

    def job(name: str, seconds: float, *, at_most: bool = False, of: str = "") -> Job:
        at, more = found.peaks[of or name], held.get(of or name, Waiting(0))
        memory = at.process + more.machine + (0 if on_device else more.beside)
        count = asked.processes if name in shared else 1
        return Job(
            seconds=seconds,
            memory=memory,
            more=max(0, memory - before) + (count - 1) * memory,
            device_memory=at.device + (more.beside if on_device else 0),
            disk=count * shape.longest * shape.waiting.disk if name == "attribute" else 0,
            at_most=at_most,
            processes=count,
        )

    jobs["replay"] = job("replay", paces.start + executing)
    surveying = SURVEY * mean if run.num_steps < SURVEYED_FROM <= count else 0.0
    for name in ("attribute", "screen"):
        if name in found.sweeps:
            seconds = surveying + pace.attributed(found.sweeps[name], paces, lengths)
            seconds += count * found.graphs.dearer(shape.longest, swept_here)
            jobs[name] = job(name, max(0.0, seconds))
    prices = {s.name: price(shape.history, s.start, s.stop) for s in stages}
    if "embed" in found.sweeps:
        behind = count - stages[0].stop if stages else 0
        surveying = SURVEY * mean if behind >= SURVEYED_FROM else 0.0
        embedding = surveying + pace.embedded(found.sweeps["embed"], paces, lengths)
        jobs["embed"] = job("embed", embedding)
        if len(stages) <= REPLAYED_UP_TO and asked.propagator is None:
            replays = sum(prices.values()) * executing + len(stages) * paces.start
            jobs["embed"] = job("embed", replays, of="replay")
    screen = jobs.pop("screen", jobs.get("attribute"))
    if "audit" in found.sweeps:
        jobs["audit"] = _auditing(found, shape, asked, prices, jobs, screen)
    return Jobs(jobs=jobs, refused=found.refused, updates=count, update_seconds=mean)


def _auditing(
    found: Measured,
    shape: Shape,
    asked: Asked,
    prices: Mapping[str, float],
    jobs: Mapping[str, Job],
    screen: Job | None,
) -> Job:
    """An audit; what the sweeps refuse is judged by replays alone."""
    stages, replays = shape.stages, sum(prices.values())
    all_of_them = replays <= asked.budget and replaying_costs_less(
        shape.history, [s.stop for s in stages], replays, asked.propagator
    )
    embedded = None if all_of_them else jobs.get("embed")
    first = min((s.stop for s in stages if s.stop < shape.history.num_steps), default=0)
    placebo = price(shape.history, first, first) if first else 0.0
    spent = min(asked.budget, replays + placebo)
    made = len(stages) if all_of_them else min(len(stages), math.ceil(spent * len(stages)))
    parts = [jobs["replay"], *(job for job in (screen, embedded) if job is not None)]
    judged = found.peaks["audit"]
    return Job(
        seconds=sum(job.seconds for job in parts[1:])
        + spent * jobs["replay"].seconds
        + made * found.sweeps["audit"].start,
        memory=max(judged.process, *(p.memory for p in parts)),
        more=max(p.more - (p.processes - 1) * p.memory for p in parts),
        device_memory=max(judged.device, *(p.device_memory for p in parts)),
        at_most=not all_of_them,
    )


def recording(plan: Plan, few: Rehearsal, enough: Rehearsal, kept: int, written: int) -> float:
    """Seconds: an update's share is that of the rehearsal which keeps next to no states."""
    each = few.each
    begun = [stage[0] for stage in enough.updates[1:]] or [2.0 * each]
    again = max(0.0, min(begun) - each)
    count = sum(map(len, enough.updates))
    keeping = sum(map(sum, enough.updates)) - count * each - len(enough.updates) * again
    one = max(0.0, keeping) / max(1, kept - 1)
    edges = enough.opening + enough.closing
    return edges + plan.updates * each + len(plan.lengths) * again + written * one


def disk(plan: Plan, runs: Sequence[Run], state: int, planned: Planned, written: int) -> int:
    """Bytes: the log by what the rehearsals differ in, all but the last of which keep two states.

    Of a model that draws random numbers a state that is written leaves its generators in the log,
    also if it is dropped again.
    """
    least, few, enough = runs
    logs = [r.bytes_by_part()["log"] - ROW_IN_LOG * r.num_examples for r in runs]
    update = max(0.0, (logs[1] - logs[0]) / (few.num_steps - least.num_steps))
    more = logs[2] - logs[1] - update * (enough.num_steps - few.num_steps)
    short = replace(plan, stages={"": enough.num_steps})
    one = max(0.0, more) / max(1, history(short, state)[1] - len(few.kept_states))
    opening = logs[1] - few.num_steps * update - len(few.kept_states) * one
    parts = enough.bytes_by_part()
    row = parts["examples"] / max(1, enough.num_examples)
    seen = sum(len(enough.example_ids(k)) for k in range(enough.num_steps)) / enough.num_steps
    rows = round(seen * plan.updates)
    rows = rows if plan.examples is None else min(rows, plan.examples)
    return round(
        parts["manifest"]
        + len(planned.kept_states) * state
        + enough.source.files().get(FROZEN_NAME, 0)
        + rows * (row + ROW_IN_LOG)
        + max(0.0, opening)
        + plan.updates * update
        + written * one
    )

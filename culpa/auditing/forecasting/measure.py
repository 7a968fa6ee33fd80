"""What the jobs will take, measured on a few updates of the user's own model.

Every job is begun as it is and stopped after some updates (stopwatch.py): on the run itself or,
where there is none yet, on a short rehearsal in a temporary folder (plan.py). What a whole run
takes follows from that (extrapolate.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from culpa.auditing.forecasting import pace
from culpa.auditing.forecasting.extrapolate import (
    Asked,
    Measured,
    Shape,
    disk,
    jobs_of,
    recording,
)
from culpa.auditing.forecasting.job import Job, Jobs
from culpa.auditing.forecasting.pace import Sweep
from culpa.auditing.forecasting.plan import ENOUGH, FEW, LEAST, Plan, history, rehearse
from culpa.auditing.forecasting.resources import give_back, peak, resident
from culpa.auditing.forecasting.waiting import graphed, waiting
from culpa.auditing.prices import History
from culpa.auditing.tasks import Bench
from culpa.problem import Problem
from culpa.trajectory.hold import Hold
from culpa.trajectory.run import Run, open_run
from culpa.trajectory.schema import state_name


def of_run(run: Run, problem: Problem, asked: Asked) -> Jobs:
    """What the jobs on a recorded run will take."""
    before = _settled()
    found = _measured(run, problem, asked)
    lengths = {s.name: len(s) for s in run.stages} or {"": run.num_steps}
    shape = _shape(run, lengths, run, run.kept_states, asked.hold)
    return jobs_of(found, shape, run, asked, before, {})


def of_plan(plan: Plan, asked: Asked) -> Jobs:
    """What recording a plan, and the jobs on it, will take."""
    before = _settled()
    with tempfile.TemporaryDirectory(prefix="culpa-forecast-") as temporary:
        folders = [Path(temporary, str(length)) for length in (LEAST, FEW, ENOUGH)]
        rehearse(plan, folders[0], LEAST, asked.clock)
        few = rehearse(plan, folders[1], FEW, asked.clock)
        with peak() as of_record:
            enough = rehearse(plan, folders[2], ENOUGH, asked.clock)
        runs = [open_run(folder) for folder in folders]
        short = runs[-1]
        found = _measured(short, plan.problem, asked)
        state = short.source.files()[state_name(short.num_steps)]
        planned, written = history(plan, state)
        shape = _shape(short, plan.lengths, planned, planned.kept_states, asked.hold)
        record = Job(
            seconds=recording(plan, few, enough, len(short.kept_states), written),
            memory=of_record.process,
            more=max(0, of_record.process - before),
            device_memory=of_record.device,
            disk=disk(plan, runs, state, planned, written),
        )
        return jobs_of(found, shape, short, asked, before, {"record": record})


def _settled() -> int:
    give_back()
    return resident()


def _measured(run: Run, problem: Problem, asked: Asked) -> Measured:
    clock, drift, propagator = asked.clock, asked.allow_drift, asked.propagator
    with peak() as replayed:
        found = Measured(pace.paces(run, problem, clock, allow_drift=drift))
    found.peaks["replay"] = replayed

    def attributing(examples: bool, hold: Hold | None = None) -> Sweep:
        return pace.attributing(
            run,
            problem,
            asked.behaviours,
            found.paces,
            clock,
            propagator=propagator,
            examples=examples,
            hold=hold,
            allow_drift=drift,
        )

    found.sweep(
        "embed",
        lambda: pace.embedding(
            run, problem, found.paces, clock, propagator=propagator, allow_drift=drift
        ),
    )
    if asked.behaviours:
        found.sweep("attribute", lambda: attributing(False, asked.hold))
        by_example = problem.example_losses is not None
        if by_example or asked.hold is not None:  # an audit lets nothing wait elsewhere
            found.sweep("screen", lambda: attributing(by_example))
        if "attribute" in found.sweeps and not drift:
            last = list(found.paces.by_stage.values())[-1]
            found.graphs = graphed(run, problem, asked.hold, propagator, clock, last)
        bench = Bench(
            run,
            problem,
            asked.behaviours,
            counterfactual="skip",
            allow_drift=drift,
            progress=None,
        )
        found.sweep("audit", lambda: pace.judging(bench, found.paces, clock))
    return found


def _shape(
    run: Run, lengths: Mapping[str, int], of: History, kept: Sequence[int], hold: Hold | None
) -> Shape:
    """Sizes are those of ``run``, the measured one; the rest is of the one that is forecast."""
    last = run.state(run.num_steps)
    state = sum(t.nbytes for t in last.flat().values())
    rows = len(run.example_ids(run.num_steps - 1))
    batch = run.bytes_by_part()["examples"] // max(1, run.num_examples) * rows
    longest = max(b - a for a, b in pairwise(kept)) if len(kept) > 1 else of.num_steps
    held = waiting(hold, last, batch), waiting(None, last, batch)
    return Shape(lengths, of, longest, state, *held)

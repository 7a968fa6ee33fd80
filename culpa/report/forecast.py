"""``culpa.forecast``: what every job will take, and whether there is that much."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from culpa.auditing.forecasting.job import Job, Jobs
from culpa.auditing.forecasting.measure import Asked, of_plan, of_run
from culpa.auditing.forecasting.plan import Plan
from culpa.auditing.forecasting.resources import device_memory_left, disk_left, memory_left
from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Propagator
from culpa.errors import OptionError, ResourceError
from culpa.problem import Problem
from culpa.report.numbers import data_size, duration
from culpa.trajectory.hold import Hold
from culpa.trajectory.ranks.joined import sharing
from culpa.trajectory.run import Run

COLUMNS = ("job", "seconds", "peak memory", "writes")
INSTEAD = {
    "attribute": (
        "attribute fewer behaviours at a time, let updates wait elsewhere or in half the bytes"
        " (hold=culpa.OnDisk(folder, dtype=torch.bfloat16)), or record with more checkpoints:"
        " culpa.Every(n) for a smaller n"
    ),
    "embed": "embed fewer stages at a time",
    "audit": "audit fewer behaviours at a time",
}
"""What needs less memory, by job."""


@dataclass(frozen=True)
class Forecast:
    """What jobs will take.

    Attributes:
        found: as plain data: ``found.jobs`` by name, ``found.refused`` by name why not.
        took: seconds that the forecast itself took.
    """

    found: Jobs
    took: float

    @property
    def jobs(self) -> Mapping[str, Job]:
        """By name: replay, attribute, embed, audit, and of a plan record.

        Without behaviours there is no attribute and no audit.
        """
        return self.found.jobs

    def __getitem__(self, job: str) -> Job:
        """A job by its name; raises ``OptionError`` listing those that there are."""
        if job in self.jobs:
            return self.jobs[job]
        why = self.found.refused.get(job, f"it has {', '.join(self.jobs)}")
        raise OptionError(f"the forecast has no job {job!r}: {why}.")

    def missing(self, job: str, folder: str | Path = ".") -> str:
        """What there is too little of for a job that writes into ``folder``; empty: of nothing."""
        wanted = self[job]
        instead = INSTEAD.get(job, "use smaller micro-batches, or a machine that has more")
        for what, need, left, advice in (
            ("memory", wanted.more, memory_left(), instead),
            ("memory of the device", wanted.device_memory, device_memory_left(), instead),
            (
                "disk",
                wanted.disk,
                disk_left(Path(folder)),
                "take another folder, or keep fewer states (checkpoints=culpa.Budget(bytes))",
            ),
        ):
            if need > left:
                return (
                    f"{job} would take {data_size(need)} more of {what}, and {data_size(left)} are"
                    f" left. To need less, {advice}."
                )
        return ""

    def require(self, job: str, folder: str | Path = ".") -> None:
        """Raise ``ResourceError`` if memory or disk would not suffice for a job.

        Nothing else in the library refuses for want of memory: who goes on all the same does not
        call this.
        """
        missing = self.missing(job, folder)
        if missing:
            raise ResourceError(missing)

    def table(self) -> str:
        """One line a job, at 80 columns."""
        rows = [(name, *cells(job)) for name, job in self.jobs.items()]
        widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (COLUMNS, tuple("-" * w for w in widths), *rows)
        ]
        lines += [f"No {name}: {why}" for name, why in self.found.refused.items()]
        return "\n".join(lines) + "\n"


def cells(job: Job) -> tuple[str, str, str]:
    """Time, memory and disk as a person reads them."""
    device = f", device {data_size(job.device_memory)}" if job.device_memory else ""
    several = f"{job.processes} x " if job.processes > 1 else ""
    return (
        f"{'up to ' if job.at_most else ''}{duration(job.seconds)}",
        f"{several}{data_size(job.memory)}{device}" if job.memory else f"unknown{device}",
        data_size(job.disk) if job.disk else "-",
    )


def forecast(
    of: Run | Plan,
    problem: Problem | None = None,
    behaviours: Sequence[Behaviour] = (),
    *,
    budget: float = 1.0,
    propagator: Propagator | None = None,
    hold: Hold | None = None,
    processes: int = 1,
    allow_drift: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Forecast:
    """Say what the jobs will take in seconds, memory and disk, before any of them runs.

    Every job is begun as it is, on the user's own model, and stopped after some updates.

    Args:
        of: a recorded run; or a ``culpa.Plan`` of one, of which a few updates are then trained and
            recorded in a temporary folder. Model, optimizer and generators are afterwards as they
            were, bit for bit.
        problem: of a run, the problem it was recorded with. A plan has its own.
        behaviours: those to attribute; without any, neither ``attribute`` nor ``audit`` is
            forecast.
        budget: of the audit, as for ``culpa.audit``.
        propagator, hold, allow_drift: as for ``culpa.attribute``.
        processes: how many will share replay, attribute and embed on this machine (inside of
            ``culpa.across_ranks()``): each of them holds the model, the states and the adjoints.
            Measured is one alone, whose memory is at least that of each of several.
        clock: tells seconds. ``time.process_time`` forecasts processor time instead.

    Returns:
        The forecast; ``Forecast.require("audit")`` refuses what does not fit this machine. Its
        cost, however long the run: a dozen updates of every sweep (at least a second or two), and
        of a plan fifty updates of training; for runs of a few dozen updates that is more than the
        jobs themselves. What it cannot know: how a sweep behaves that explodes and falls back to
        other products, batches much larger than those it saw, and what other programs will take
        of the machine.

    Raises:
        OptionError: for a run without its problem, a plan with one, a negative budget, or on
            several ranks that share their work.
        and whatever recording or replaying a few updates raises.
    """
    began = time.perf_counter()
    asked = Asked(behaviours, budget, propagator, allow_drift, clock, hold, processes)
    if not budget >= 0:
        raise OptionError(f"budget is a number of trainings, >= 0; got {budget}.")
    if processes < 1:
        raise OptionError(f"processes is how many share the work, at least 1; got {processes}.")
    if sharing() is not None:
        raise OptionError(
            "forecast measures one process, by its own clock: call it outside of across_ranks(),"
            " with processes=... for the memory of several."
        )
    if isinstance(of, Plan):
        if problem is not None:
            raise OptionError("forecast(plan, ...) takes no problem: the plan has one.")
        found = of_plan(of, asked)
    elif problem is None:
        raise OptionError("forecast(run, problem, ...) needs the problem of the run.")
    else:
        found = of_run(of, problem, asked)
    return Forecast(found, time.perf_counter() - began)

"""``culpa inspect`` as a person reads it: one screen of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from culpa.cli.summary import StageLine, Summary
from culpa.report.numbers import count, data_size, duration, moment, plural, visible

STATUS = {
    "complete": "closed",
    "recording": "NOT CLOSED: still recording, or the process was killed",
    "interrupted": "closed early",
    "truncated": "TRUNCATED: training went on without being recorded",
}
SHOWN = 4
"""Differences listed before the rest is counted."""


def inspection(summary: Summary) -> Iterator[RenderableType]:
    """The parts of the screen, a blank line between them."""
    yield _facts(summary)
    yield ""
    yield _stages(summary.stages)
    yield ""
    yield _jobs(summary)
    for why in dict.fromkeys(job.why for job in summary.jobs if not job.possible):
        yield ""
        yield Text(f"Not possible: {visible(why)}")


def _facts(s: Summary) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    status = STATUS.get(s.status, s.status) + (f" ({s.reason})" if s.reason else "")
    rows = (
        ("Run", s.run),
        ("Recorded", f"{moment(s.created)} by culpa {s.culpa_version}, format {s.format}"),
        ("Integrity", f"{status}; not checked here: culpa verify RUN"),
        ("Root digest", s.root_digest or "none yet: it is made when the run is closed"),
        ("Model", _model(s)),
        ("Training", _training(s)),
        ("On disk", _bytes(s)),
        ("Environment", _environment(s)),
    )
    for name, value in rows:
        grid.add_row(name, Text("\n".join(visible(line) for line in value.split("\n"))))
    return grid


def _model(s: Summary) -> str:
    frozen = f", {s.frozen_tensors} of them never trained" if s.frozen_tensors else ""
    buffers = f"; {plural(s.buffers, 'buffer')}" if s.buffers else ""
    return (
        f"{plural(s.parameters, 'parameter')} in {plural(s.parameter_tensors, 'tensor')}"
        f"{frozen}{buffers}"
    )


def _training(s: Summary) -> str:
    took = f"; {duration(s.training_seconds)}" if s.training_seconds else ""
    return (
        f"{plural(s.updates, 'update')} in {plural(len(s.stages), 'stage')} over"
        f" {plural(s.examples, 'distinct example')}{took}"
    )


def _bytes(s: Summary) -> str:
    parts = ", ".join(f"{name} {data_size(size)}" for name, size in s.bytes.items() if size)
    total = data_size(sum(s.bytes.values()))
    return f"{total} ({parts}); {count(s.kept_states)} of {count(s.states_in_all)} states kept"


def _environment(s: Summary) -> str:
    facts = s.environment
    recorded = (
        f"torch {facts.get('torch', '?')}, Python {facts.get('python', '?')},"
        f" {facts.get('gpu', facts.get('device', '?'))},"
        f" {plural(int(facts['threads']), 'thread') if 'threads' in facts else 'threads unknown'}"
    )
    if s.differences:
        more = len(s.differences) - SHOWN
        listed = "\n".join(f"  {d}" for d in s.differences[:SHOWN])
        rest = f"\n  and {more} more" if more > 0 else ""
        return f"{recorded}\nDIFFERENT HERE, so replays need --allow-drift:\n{listed}{rest}"
    if not s.harmless_differences:
        return f"{recorded}; the same here, so replays are bitwise"
    fine = "\n".join(f"  {d}" for d in s.harmless_differences[:SHOWN])
    return f"{recorded}; replays are bitwise here. Set by culpa, or harmless:\n{fine}"


def _stages(stages: list[StageLine]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("Stage", overflow="fold", max_width=32)
    table.add_column("Updates", justify="right")
    table.add_column("Optimizer", overflow="fold")
    table.add_column("Learning rate", justify="right")
    for s in stages:
        low, high = _rate(s.lowest_rate), _rate(s.highest_rate)
        table.add_row(
            Text(visible(s.name)),
            f"{s.start} to {s.stop - 1}",
            Text(f"{s.optimizer}{' (fresh)' if s.fresh_optimizer and s.start else ''}"),
            low if low == high else f"{low} to {high}",
        )
    return table


def _jobs(s: Summary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("What can be done")
    table.add_column("Gives", overflow="fold")
    table.add_column("About, in\ntrainings", justify="right")
    table.add_column("in time\n(recorder's)", justify="right")
    for job in s.jobs:
        if job.trainings is None or job.seconds is None:
            table.add_row(job.name, "not possible, see below", "-", "-")
        else:
            time = duration(job.seconds) if s.training_seconds else "unknown"
            table.add_row(job.name, job.why, f"{job.trainings:.1f}", time)
    return table


def _rate(value: float) -> str:
    return f"{value:.3g}"

"""``culpa forecast``, and what ``culpa audit`` says of its cost before it begins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

import culpa
from culpa.behaviour import Behaviour
from culpa.cli.options import AllowDrift, AsJson, ProblemName
from culpa.cli.problem import load_plan, load_problem
from culpa.cli.summary import trainings
from culpa.errors import ResourceError
from culpa.problem import Problem
from culpa.report.forecast import cells
from culpa.report.numbers import duration, plural
from culpa.trajectory.run import Run

out, err = Console(highlight=False), Console(stderr=True, highlight=False)
WORTH = 60.0
"""Seconds of an audit from which on its forecast is measured; below, the recorder's clock tells."""


def forecast(
    path: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A recorded run; none: --problem returns a plan."),
    ] = None,
    problem: ProblemName = "",
    budget: Annotated[float, typer.Option(help="Of the audit, in trainings.")] = 1.0,
    allow_drift: AllowDrift = False,
    json: AsJson = False,
) -> None:
    """Say what the jobs will take in time, memory and disk, measured on a few updates.

    Of a recorded run: replay, attribute, embed and audit. Of one to come also record: then
    --problem names a function that returns a culpa.Plan, or (plan, behaviours).

    Example: culpa forecast culpa-demo/run --problem culpa.experiments.demo:problem
    """
    if not problem:
        raise typer.BadParameter("is needed: MODULE:FUNCTION", param_hint="--problem")
    if path is None:
        plan, behaviours = load_plan(problem)
        found = culpa.forecast(plan, behaviours=behaviours, budget=budget)
    else:
        task, behaviours = load_problem(problem)
        run = culpa.open_run(path)
        found = culpa.forecast(run, task, behaviours, budget=budget, allow_drift=allow_drift)
    short = {name: said for name in found.jobs if (said := found.missing(name))}
    if json:
        facts = {**msgspec.to_builtins(found.found), "missing": short, "took": found.took}
        typer.echo(msgspec.json.format(msgspec.json.encode(facts), indent=1).decode())
        return
    out.print(escape(found.table()), end="")
    out.print(
        f"[dim]{plural(found.found.updates, 'update')} of {duration(found.found.update_seconds)};"
        f" measured in {duration(found.took)}. Memory is that of the whole process."
    )
    for said in short.values():
        out.print(f"[bold]Too little:[/] {escape(said)}")


def announce(
    console: Console,
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    budget: float,
    folder: Path,
    anyway: bool,
) -> None:
    """Say what an audit will take, and stop where memory or disk would not suffice.

    A person at a terminal is asked whether to go on all the same.

    Raises:
        ResourceError: if there is too little, nobody to ask, and no ``anyway``.
    """
    plain = run.manifest.plain_seconds
    rough = plain * (trainings(run, "attribute") + trainings(run, "replay") * budget)
    if 0.0 < rough < WORTH:
        console.print(f"[dim]About {duration(rough)}, by the recorder's clock.")
        return
    told = culpa.forecast(run, problem, behaviours, budget=budget)
    if "audit" not in told.jobs:
        return  # the audit itself says why, or judges by replays alone
    time, memory, _ = cells(told["audit"])
    console.print(
        f"[dim]The audit will take {time} and {memory} of memory at its peak (measured in"
        f" {duration(told.took)})."
    )
    missing = told.missing("audit", folder)
    if not missing or anyway:
        return
    if not (console.is_terminal and sys.stdin.isatty()):
        raise ResourceError(f"{missing} Or go on all the same with --anyway.")
    console.print(escape(missing))
    if not typer.confirm("Go on all the same?", err=True):
        raise typer.Exit(1)

"""What ``culpa audit`` says of its cost before it begins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

import culpa
from culpa.behaviour import Behaviour
from culpa.cli.summary import trainings
from culpa.errors import ResourceError
from culpa.problem import Problem
from culpa.report.forecast import cells
from culpa.report.numbers import duration
from culpa.trajectory.run import Run

WORTH = 60.0
"""Seconds of an audit from which on its forecast is measured; below, the recorder's clock tells."""


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

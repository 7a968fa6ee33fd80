"""``culpa forecast``: what the jobs would take, before any of them runs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

import culpa
from culpa.cli.options import AllowDrift, AsJson, ProblemName
from culpa.report.numbers import duration, plural

out = Console(highlight=False)


class Place(StrEnum):
    """Where updates wait."""

    memory = "memory"
    cpu = "cpu"
    disk = "disk"


def forecast(
    path: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A recorded run; none: --problem returns a plan."),
    ] = None,
    problem: ProblemName = "",
    budget: Annotated[float, typer.Option(help="Of the audit, in trainings.")] = 1.0,
    hold: Annotated[
        Place, typer.Option(help="Where the recomputed updates of attribute wait.")
    ] = Place.memory,
    half: Annotated[
        bool, typer.Option("--half", help="They wait in bfloat16: half the bytes.")
    ] = False,
    processes: Annotated[
        int, typer.Option(help="That share replay, attribute and embed (culpa.across_ranks).")
    ] = 1,
    allow_drift: AllowDrift = False,
    json: AsJson = False,
) -> None:
    """Say what the jobs will take in time, memory and disk, measured on a few updates.

    Of a recorded run: replay, attribute, embed and audit. Of one to come also record: then
    --problem names a function that returns a culpa.Plan, or (plan, behaviours).

    Example: culpa forecast culpa-demo/run --problem culpa.experiments.demo:problem
    """
    from culpa.cli.problem import load_plan, load_problem

    if not problem:
        raise typer.BadParameter("is needed: MODULE:FUNCTION", param_hint="--problem")
    ways: dict[str, Any] = {"budget": budget, "hold": _held(hold, half), "processes": processes}
    if path is None:
        plan, behaviours = load_plan(problem)
        found = culpa.forecast(plan, behaviours=behaviours, **ways)
    else:
        task, behaviours = load_problem(problem)
        run = culpa.open_run(path)
        found = culpa.forecast(run, task, behaviours, allow_drift=allow_drift, **ways)
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


def _held(place: Place, half: bool) -> culpa.InMemory | culpa.OnCpu | culpa.OnDisk:
    import torch

    dtype = torch.bfloat16 if half else None
    if place is Place.disk:
        return culpa.OnDisk(dtype=dtype)
    return culpa.OnCpu(dtype) if place is Place.cpu else culpa.InMemory(dtype)

"""``culpa reproduce``: the paper's experiments, from data to a page of tables and figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from culpa.cli.progress import shown
from culpa.errors import OptionError
from culpa.experiments.frame.findings import Result

out, err = Console(highlight=False), Console(stderr=True, highlight=False)

EVERYTHING = "all"
SCALES = ("paper", "small", "smoke")


def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Experiments, or all; none: list them."),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(help="small: minutes on two cores. paper: its settings, on its data. smoke."),
    ] = "small",
    seeds: Annotated[int | None, typer.Option(help="How many; default as many as fit.")] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Where pages and figures are written.")
    ] = Path("culpa-reproduce/pages"),
    work: Annotated[
        Path, typer.Option(help="Where finished parts and recorded runs are kept.")
    ] = Path("culpa-reproduce"),
    data: Annotated[
        Path | None, typer.Option(help="Folder of data sets; default the variable CULPA_DATA.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch data sets that are absent and public.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew instead of going on with finished parts.")
    ] = False,
    keep_runs: Annotated[
        bool, typer.Option("--keep-runs/--drop-runs", help="Keep the recorded runs on disk.")
    ] = True,
) -> None:
    """Run the paper's experiments and write their tables and figures beside the paper's numbers.

    An interrupted command goes on where it was when it is run again: every finished seed is kept.

    Example: culpa reproduce table1 --scale small
    """
    from culpa.experiments.data.folder import DataFolder
    from culpa.experiments.frame.page import write_page
    from culpa.experiments.frame.reproduce import reproduce as run_experiment
    from culpa.experiments.registry import MODULES, experiment

    if scale not in SCALES:
        raise OptionError(f"--scale is one of {', '.join(SCALES)}, got {scale!r}.")
    if not names:
        out.print(_listed())
        return
    chosen = list(MODULES) if EVERYTHING in names else names
    for found in [experiment(name) for name in chosen]:
        with shown(err) as progress:
            result = run_experiment(
                found,
                scale=scale,
                seeds=seeds,
                work=work,
                data=DataFolder.find(data, download=download),
                fresh=fresh,
                keep_runs=keep_runs,
                progress=progress,
            )
        _print(result, write_page(result, folder)[0], work if keep_runs else None)


def _listed() -> Table:
    from culpa.experiments.registry import MODULES, experiment

    table = Table(box=None, show_header=True)
    for column in ("experiment", "the paper's", "must show"):
        table.add_column(column)
    for name in MODULES:
        found = experiment(name)
        table.add_row(name, found.paper, found.must_show)
    return table


def _print(result: Result, page: Path, work: Path | None) -> None:
    out.print(f"[bold]{result.experiment}[/]: {escape(result.title)} (the paper's {result.paper})")
    for claim in result.findings.claims:
        mark = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        out.print(f"  {mark}: {escape(claim.text)} {escape(claim.numbers)}")
    for stand_in in result.findings.stand_ins:
        out.print(f"  Stand-in: {escape(stand_in)}")
    kept = "" if work is None else f" in {os.fspath(work / result.scale / result.experiment)}/runs"
    out.print(f"  Recorded runs, each accepted by culpa verify: {len(result.runs)}{escape(kept)}")
    out.print(f"  Page: {escape(os.fspath(page))}")

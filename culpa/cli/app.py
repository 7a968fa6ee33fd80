"""The command line: thin commands around the library's functions. Numbers are made elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import culpa
from culpa.cli.problem import load_problem
from culpa.cli.progress import shown
from culpa.errors import CulpaError

app = typer.Typer(
    help="Which stage of training is to be credited or blamed for what a model does.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder given to culpa.record.")]
ProblemName = Annotated[
    str,
    typer.Option(
        "--problem",
        metavar="MODULE:FUNCTION",
        help=(
            "A function without arguments that returns (problem, behaviours); found like an import "
            "from the current folder."
        ),
    ),
]
Removal = Annotated[
    str,
    typer.Option(help="What 'without' means: skip, restart or zero-gradient.", metavar="MEANING"),
]


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for the run and the report.")
    ] = Path("culpa-demo"),
    seed: Annotated[int, typer.Option(help="Of initial weights and shuffling.")] = 0,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    budget: Annotated[float, typer.Option(help="Trainings to spend on replays.")] = 1.0,
) -> None:
    """Train four stages on real digits, one of them mislabelled, and find the culprit.

    Example: culpa demo --optimizer adamw --seed 1
    """
    from culpa.experiments.demo import train

    with shown(err) as progress:
        run, problem, behaviours = train(folder / "run", seed=seed, optimizer=optimizer)
        out.print(
            f"Trained and recorded {run.num_steps} updates in {len(run.stages)} stages: {run.path}"
        )
        audit = culpa.audit(run, problem, behaviours, budget=budget, progress=progress)
    _show(audit, folder)
    out.print(
        f"Look again: culpa inspect {run.path}   Prove it: culpa verify {run.path} --problem"
        " culpa.experiments.demo:problem"
    )


@app.command()
def audit(
    path: RunPath,
    problem: ProblemName,
    budget: Annotated[float, typer.Option(help="Trainings to spend on replays; 0: none.")] = 1.0,
    counterfactual: Removal = "skip",
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for audit.json and audit.html; default RUN-audit."),
    ] = None,
) -> None:
    """Attribute behaviours to the stages and updates of a run, and replay the main ones.

    Example: culpa audit culpa-demo/run --problem culpa.experiments.demo:problem
    """
    task, behaviours = load_problem(problem)
    run = culpa.open_run(path)
    with shown(err) as progress:
        found = culpa.audit(
            run, task, behaviours, budget=budget, counterfactual=counterfactual, progress=progress
        )
    _show(found, folder or path.with_name(f"{path.name}-audit"))


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="AUDIT", help="The audit.json of an audit.")],
    html: Annotated[
        Path | None, typer.Option(help="Where to write the page; default beside AUDIT.")
    ] = None,
) -> None:
    """Show an audit again, and write its HTML page.

    Example: culpa report culpa-demo/audit.json
    """
    found = culpa.Audit.load(path)
    target = html or path.with_suffix(".html")
    found.to_html(target)
    _print_audit(found)
    out.print(f"Report: {target}")


@app.command()
def inspect(path: RunPath) -> None:
    """Show what is in a run: stages, updates, learning rates, kept states, bytes.

    Example: culpa inspect culpa-demo/run
    """
    run = culpa.open_run(path)
    facts = Table.grid(padding=(0, 2))
    states = len(run.kept_states)
    parameters = run.manifest.parameters
    for name, value in (
        ("Run", f"{run.path} ({run.manifest.status}, recorded {run.manifest.created})"),
        ("Updates", f"{run.num_steps} over {run.num_examples} distinct training examples"),
        (
            "Model",
            (
                f"{len(parameters)} parameter tensors, {len(run.manifest.frozen)} of them never"
                " trained"
            ),
        ),
        (
            "On disk",
            f"{run.bytes_on_disk / 1e6:.2f} MB, {states} of {run.num_steps + 1} states kept",
        ),
        ("Root digest", run.root_digest or "none: the run was not closed"),
        (
            "Recorded with",
            ", ".join(
                f"{n} {run.manifest.environment.get(n)}" for n in ("torch", "python", "threads")
            ),
        ),
    ):
        facts.add_row(f"[bold]{name}", value)
    out.print(facts)
    table = Table("Stage", "Updates", "Optimizer", "Learning rate")
    for stage in run.stages:
        rates = [run.step(k).hypers[0]["lr"] for k in stage.updates]
        spread = (
            f"{rates[0]:g}" if min(rates) == max(rates) else f"{min(rates):g} to {max(rates):g}"
        )
        table.add_row(
            escape(stage.name),
            f"{stage.start} to {stage.stop - 1}",
            run.step(stage.start).optimizer.name,
            spread,
        )
    out.print(table)


@app.command()
def verify(
    path: RunPath,
    problem: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Also execute every update again and compare bit for bit.",
        ),
    ] = None,
) -> None:
    """Prove that a run is complete and unchanged; with --problem, that it reproduces.

    Example: culpa verify culpa-demo/run --problem culpa.experiments.demo:problem
    """
    run = culpa.open_run(path)
    task = load_problem(problem)[0] if problem else None
    with shown(err) as progress:
        run.verify(task, level="replay" if task else "digest", progress=progress)
    how = "every update executed again, bit for bit" if task else "every digest recomputed"
    out.print(f"{path} is intact ({how}).\nRoot digest {run.root_digest}")


@app.command()
def replay(
    path: RunPath,
    problem: ProblemName,
    without: Annotated[list[str], typer.Option(help="A stage to leave out; may be repeated.")],
    counterfactual: Removal = "skip",
    weights: Annotated[
        Path | None, typer.Option("--out", help="Write the model without it here (safetensors).")
    ] = None,
) -> None:
    """Re-run history without a stage, and show what the behaviours would have been.

    Example: culpa replay RUN --problem my_training:problem --without mislabelled
    """
    task, behaviours = load_problem(problem)
    run = culpa.open_run(path)
    with shown(err) as progress:
        found = culpa.replay(
            run, task, without=without, counterfactual=counterfactual, progress=progress
        )
    table = Table("Behaviour", "True effect", "Unit")
    for behaviour in behaviours:
        table.add_row(
            escape(behaviour.name), f"{float(found.effect(behaviour).mean()):+.4g}", behaviour.unit
        )
    out.print(
        f"Without {escape(', '.join(without))} ({len(found.without)} updates;"
        f" {found.updates_executed} executed again):"
    )
    out.print(table)
    out.print("> 0: what was left out had raised the behaviour.")
    if weights is not None:
        found.save(weights)
        out.print(f"The model without it: {weights}")


def _show(found: culpa.Audit, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found.to_json(folder / "audit.json")
    found.to_html(folder / "audit.html")
    _print_audit(found)
    out.print(f"Report: {folder / 'audit.html'}   Data: {folder / 'audit.json'}")


def _print_audit(found: culpa.Audit) -> None:
    from culpa.report.table import tables

    for verdict in found.record.verdicts:
        out.print(f"[bold]*[/] {escape(verdict)}")
    out.print()
    for table in tables(found.record):
        out.print(table)
    for caution in found.record.cautions:
        out.print(f"[dim]Note: {escape(caution)}")


def main() -> None:
    """The console script: errors of ours as one message, exit code 1."""
    try:
        app()
    except CulpaError as error:
        err.print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)

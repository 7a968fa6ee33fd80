"""The command line: thin commands around the library's functions. Numbers are made elsewhere.

Loading torch takes seconds, and ``--help``, completion and a misspelt option need none of it: what
needs it is imported inside of the commands.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

import culpa
from culpa.cli.forecast import forecast
from culpa.cli.options import AllowDrift, Anyway, AsJson, ProblemName, Removal, RunPath, ShowName
from culpa.cli.progress import shown
from culpa.cli.reproduce import reproduce
from culpa.errors import OptionError

app = typer.Typer(
    help=(
        "Which stage of training is to be credited or blamed for what a model does.\n\n"
        "Exit codes: 0 fine, 1 an error, 2 something asked for that does not exist (an option, a"
        " stage, a problem), 3 something is not as it was recorded (damage, another environment)."
        "\n\nErrors are one message; with --debug, anywhere on the line, they show a traceback."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for the run and the report.")
    ] = Path("culpa-demo"),
    seed: Annotated[int, typer.Option(help="Of initial weights and shuffling.")] = 0,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    budget: Annotated[float, typer.Option(help="Trainings to spend on replays.")] = 1.0,
    json: AsJson = False,
) -> None:
    """Train four stages on real digits, one of them mislabelled, and find the culprit.

    Example: culpa demo --optimizer adamw --seed 1
    """
    from culpa.cli.audits import show
    from culpa.experiments.demo import shown as picture
    from culpa.experiments.demo import train

    with shown(err) as progress:
        run, problem, behaviours = train(folder / "run", seed=seed, optimizer=optimizer)
        err.print(
            f"Trained and recorded {run.num_steps} updates in {len(run.stages)} stages: {run.path}"
        )
        audit = culpa.audit(run, problem, behaviours, budget=budget, progress=progress)
    show(out, audit, folder, json=json, run=run, decoder=picture)
    if json:
        return
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
    allow_drift: AllowDrift = False,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for audit.json and audit.html; default RUN-audit."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an audit that was interrupted.")
    ] = False,
    again: Annotated[
        Path | None,
        typer.Option(
            metavar="AUDIT",
            help="Reproduce this audit.json, with its options, and compare every number.",
        ),
    ] = None,
    examples: ShowName = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="Replay side by side: processes, or ray. Worth it for replays of minutes.",
            metavar="WHERE",
        ),
    ] = None,
    number: Annotated[
        int | None, typer.Option("--workers", help="How many processes; default: the cores.")
    ] = None,
    anyway: Anyway = False,
    json: AsJson = False,
) -> None:
    """Attribute behaviours to the stages and updates of a run, and replay the main ones.

    Says beforehand what it will take. Every result is kept in OUT/work as it comes: after Ctrl-C,
    --resume takes what is there and goes on.

    Example: culpa audit culpa-demo/run --problem culpa.experiments.demo:problem
    """
    from culpa.auditing.again import options_of, require_same_run
    from culpa.cli.announce import announce
    from culpa.cli.audits import reproduced, show, work_folder, workers
    from culpa.cli.problem import load_problem, load_show

    task, behaviours = load_problem(problem)
    decoder = load_show(examples)
    run = culpa.open_run(path)
    old = None if again is None else culpa.Audit.load(again).record
    if old is not None:
        require_same_run(old, run.root_digest)
        budget, counterfactual, allow_drift = options_of(old)
    into = folder or Path(f"{path.rstrip('/')}-audit")
    if old is None:
        announce(err, run, task, behaviours, budget=budget, folder=into, anyway=anyway)
    with workers(executor, number, problem) as beside, shown(err) as progress:
        found = culpa.audit(
            run,
            task,
            behaviours,
            budget=budget,
            counterfactual=counterfactual,
            allow_drift=allow_drift,
            work=None if old is not None else work_folder(into, resume=resume),
            executor=beside,
            progress=progress,
        )
    if old is not None:
        said = reproduced(old, found.record)
        if json:
            _print_json({"reproduced": True, "audit": str(again)})
        else:
            out.print(said)
        return
    show(out, found, into, json=json, run=None if examples is None else run, decoder=decoder)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="AUDIT", help="The audit.json of an audit.")],
    html: Annotated[
        Path | None, typer.Option(help="Where to write the page; default beside AUDIT.")
    ] = None,
    examples: ShowName = None,
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="With --show: the run that was audited.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write a model card's section here.", metavar="FILE")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write the charts here, as PNG.", metavar="FOLDER")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="Also write Parquet tables here.", metavar="FOLDER")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show an audit again, and write its HTML page.

    Example: culpa report culpa-demo/audit.json
    """
    from culpa.cli.audits import export, print_audit
    from culpa.cli.problem import load_show

    found = culpa.Audit.load(path)
    target = html or path.with_suffix(".html")
    if (run is None) is not (examples is None):
        raise OptionError("--show needs --run, where the examples are, and --run needs --show.")
    of = None if run is None else culpa.open_run(run)
    found.to_html(target, run=of, show=load_show(examples))
    written = export(found, markdown=markdown, figures=figures, tables=tables)
    if json:
        _print_json({"report": str(target), "written": [str(path) for path in written]})
        return
    print_audit(out, found)
    out.print(f"Report: {escape(str(target))}")
    for path in written:
        out.print(f"Wrote {escape(str(path))}")


@app.command()
def inspect(path: RunPath, json: AsJson = False) -> None:
    """Show what is in a run, whether it replays here, and what can be found out at what cost.

    Example: culpa inspect culpa-demo/run
    """
    from culpa.cli.screen import inspection
    from culpa.cli.summary import summarize

    summary = summarize(culpa.open_run(path))
    if json:
        _print_json(summary)
        return
    for part in inspection(summary):
        out.print(part)


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
    sample: Annotated[
        int | None,
        typer.Option(help="With --problem: so many random segments instead of every update."),
    ] = None,
    root_digest: Annotated[
        str | None, typer.Option(help="Also prove that it is the run quoted by this digest.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Prove that a run is complete and unchanged; with --problem, that it reproduces.

    Example: culpa verify culpa-demo/run --problem culpa.experiments.demo:problem
    """
    from culpa.cli.problem import load_problem

    run = culpa.open_run(path)
    task = load_problem(problem)[0] if problem else None
    level = "replay" if task else "digest"
    with shown(err) as progress:
        found = run.verify(
            task, level=level, sample=sample, root_digest=root_digest, progress=progress
        )
    if json:
        _print_json({"run": path, "level": level, "intact": True, **asdict(found)})
        return
    out.print(f"{escape(path)} is intact: {found}")


app.command()(forecast)
app.command()(reproduce)


@app.command()
def replay(
    path: RunPath,
    problem: ProblemName,
    without: Annotated[
        list[str] | None,
        typer.Option(help="A stage to leave out; may be repeated. None: the run itself."),
    ] = None,
    counterfactual: Removal = "skip",
    allow_drift: AllowDrift = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Do not replay: take the embedding of the stage.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option("--out", help="Write the model without it here (safetensors).")
    ] = None,
    json: AsJson = False,
) -> None:
    """Re-run history without a stage, and show what the behaviours would have been.

    Example: culpa replay RUN --problem my_training:problem --without mislabelled
    """
    from culpa.cli.estimate import estimated
    from culpa.cli.outcome import replayed, replayed_facts
    from culpa.cli.problem import load_problem

    task, behaviours = load_problem(problem)
    run = culpa.open_run(path)
    with shown(err) as progress:
        options: Any = {"counterfactual": counterfactual, "allow_drift": allow_drift}
        if estimate:
            found = estimated(run, task, without or [], progress=progress, **options)
        else:
            found = culpa.replay(run, task, without=without or (), progress=progress, **options)
    if weights is not None:
        found.save(weights)
    if json:
        _print_json(replayed_facts(path, without or [], found, behaviours, weights))
        return
    for part in replayed(without or [], found, behaviours, weights):
        out.print(part)


def _print_json(facts: object) -> None:
    """On standard output and nothing else; numbers that are not finite become null."""
    typer.echo(msgspec.json.format(msgspec.json.encode(facts), indent=1).decode())

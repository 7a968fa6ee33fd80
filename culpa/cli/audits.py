"""``culpa audit`` as a person reads it: the verdicts, the tables, how it was done; and again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import typer
from rich.console import Console
from rich.markup import escape

import culpa
from culpa.auditing.again import compare
from culpa.auditing.processes import Processes
from culpa.auditing.record import AuditRecord
from culpa.auditing.tasks import Executor
from culpa.cli.problem import Loaded
from culpa.errors import IntegrityError, OptionError, StoreError
from culpa.report.showing import Show
from culpa.trajectory.files import write_durably
from culpa.trajectory.run import Run


def work_folder(folder: Path, *, resume: bool) -> Path:
    """Where an audit keeps its results while it runs; emptied first unless it is to go on."""
    work = folder / "work"
    if not resume and work.is_dir():
        rmtree(work)
    return work


@contextmanager
def workers(name: str | None, number: int | None, problem: str) -> Generator[Executor | None]:
    """What ``--executor`` and ``--workers`` name; ``None``: this process.

    Raises:
        OptionError: for another name, or a number of workers without a use.
    """
    if name not in (None, "processes", "ray") or (name == "ray" and number is not None):
        raise OptionError(
            "--executor is processes or ray, and --workers says how many processes (what Ray runs"
            f" on, ray.init and its cluster say); got --executor {name} --workers {number}."
        )
    if name == "ray":
        from culpa.integrations.ray import Ray

        yield Ray(Loaded(problem))
    elif name is None and number is None:
        yield None
    else:
        with Processes(Loaded(problem), number) as executor:
            yield executor


def show(
    out: Console,
    found: culpa.Audit,
    folder: Path,
    *,
    json: bool = False,
    run: Run | None = None,
    decoder: Show | None = None,
) -> None:
    """Write the audit and its page, with examples of ``run``, into ``folder``, and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    found.to_json(folder / "audit.json")
    found.to_html(folder / "audit.html", run=run, show=decoder)
    if json:
        typer.echo((folder / "audit.json").read_text(encoding="utf-8"))
        return
    print_audit(out, found)
    out.print(f"Report: {folder / 'audit.html'}   Data: {folder / 'audit.json'}")


def print_audit(out: Console, found: culpa.Audit) -> None:
    """The verdicts, a table for each behaviour, how it was done, and the cautions."""
    from culpa.report.conduct import conduct
    from culpa.report.table import tables

    for verdict in found.record.verdicts:
        out.print(f"[bold]*[/] {escape(verdict)}")
    out.print()
    for table in tables(found.record):
        out.print(table)
        out.print()
    for line in conduct(found.record):
        out.print(escape(line))
    for caution in found.record.cautions:
        out.print(f"[dim]Note: {escape(caution)}")


def export(
    found: culpa.Audit, *, markdown: Path | None, figures: Path | None, tables: Path | None
) -> list[Path]:
    """Write what was asked for besides the page; the files."""
    written: list[Path] = []
    if markdown is not None:
        try:
            write_durably(markdown, found.to_markdown().encode())
        except OSError as error:
            raise StoreError(f"cannot write {markdown}: {error}.") from error
        written.append(markdown)
    if figures is not None:
        written += found.to_figures(figures)
    if tables is not None:
        written += found.to_parquet(tables)
    return written


def reproduced(old: AuditRecord, new: AuditRecord) -> str:
    """The sentence that says so.

    Raises:
        IntegrityError: naming what differs.
    """
    differences = compare(old, new)
    if differences:
        shown = "\n".join(f"  {d}" for d in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise IntegrityError(f"the audit does not reproduce:\n{shown}{more}")
    return f"Reproduced: every number of the audit of {old.created} is the same."

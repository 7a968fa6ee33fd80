"""A result as a page of Markdown with SVG figures beside it."""

from __future__ import annotations

import json
from pathlib import Path

from culpa.errors import UnsupportedError
from culpa.experiments.frame.findings import Figure, Result, Table
from culpa.trajectory.files import write_durably

FOLDER = "figures"
NOTHING = "Nothing stands in for the paper's data or model."


def write_page(result: Result, folder: Path) -> list[Path]:
    """Write ``<folder>/<experiment>.md`` and its figures; returns the files, the page first.

    Raises:
        UnsupportedError: if there are figures and vl-convert is not installed.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    page = folder / f"{result.experiment}.md"
    files = [page]
    for figure in result.findings.figures:
        file = folder / figure_name(result, figure)
        write_durably(file, drawn(figure).encode())
        files.append(file)
    write_durably(page, markdown(result).encode())
    return files


def figure_name(result: Result, figure: Figure) -> str:
    """Relative to the page."""
    return f"{FOLDER}/{result.experiment}-{figure.name}.svg"


def drawn(figure: Figure) -> str:
    """The figure as SVG."""
    try:
        import vl_convert
    except ImportError as error:
        raise UnsupportedError(
            "figures need vl-convert, which is not installed. Run: pip install"
            " 'culpa[experiments]'."
        ) from error
    return str(vl_convert.vegalite_to_svg(json.dumps(figure.spec)))


def markdown(result: Result) -> str:
    """The page's text."""
    found = result.findings
    blocks = [f"# {result.title}", f"The paper's {result.paper}. {found.settings}"]
    if found.claims:
        blocks.append("What it must show, and whether it did here:")
        blocks.append(
            "\n".join(f"* {_verdict(c.holds)} {c.text} {c.numbers}" for c in found.claims)
        )
    blocks += [_table(table) for table in found.tables]
    for figure in found.figures:
        blocks.append(f"![{_plain(figure.caption)}]({figure_name(result, figure)})")
        blocks.append(f"*{figure.caption}*")
    if found.notes:
        blocks.append("## Notes")
        blocks.append("\n".join(f"* {note}" for note in found.notes))
    blocks.append(_caption(result))
    return "\n\n".join(blocks) + "\n"


def _verdict(holds: bool) -> str:
    return "**Holds:**" if holds else "**Does not hold:**"


def _table(table: Table) -> str:
    lines = [
        f"**{table.title}**",
        "",
        f"| {' | '.join(table.columns)} |",
        f"|{'---|' * len(table.columns)}",
        *(f"| {' | '.join(row)} |" for row in table.rows),
    ]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)


def _caption(result: Result) -> str:
    stand_ins = " ".join(f"Stand-in: {s}" for s in result.findings.stand_ins)
    seeds = f"{len(result.seeds)} seed{'s' * (len(result.seeds) != 1)}"
    minutes = f"{result.minutes:.1f} processor minutes"
    runs = "one recorded run" if len(result.runs) == 1 else f"{len(result.runs)} recorded runs"
    return (
        f"Scale `{result.scale}`, {seeds}; {result.machine}; {minutes}; {runs}, "
        "each accepted by `culpa verify`. "
        f"{stand_ins or NOTHING} "
        f"Made by `culpa reproduce {result.experiment} --scale {result.scale}`."
    )


def _plain(text: str) -> str:
    """For a picture's alternative text."""
    return text.translate(str.maketrans("", "", "*`[]"))

"""The audit as one HTML file that needs nothing else: no network, no font, no neighbour file.

The page forbids itself the network with a Content-Security-Policy, under which only the two
scripts written here (known by their hashes) may run; so even a mistake in the escaping of the
record's text could neither load nor execute anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from culpa.auditing.record import AuditRecord
from culpa.errors import OptionError, StoreError, UnsupportedError
from culpa.report import numbers
from culpa.report.charts.bars import row_height
from culpa.report.charts.scale import GRADES, grade_index
from culpa.report.charts.theme import import_altair
from culpa.report.citations import linked
from culpa.report.conduct import placebos, searching, spending, windows
from culpa.report.drill import drills
from culpa.report.matrix import matrix
from culpa.report.panels import grade_of, panel
from culpa.report.record_check import checked
from culpa.report.showing import Show, shown_examples
from culpa.report.table import known
from culpa.trajectory.run import Run


def render(record: AuditRecord, *, run: Run | None = None, show: Show | None = None) -> str:
    """The report of ``record``: one HTML document below 2 MB for any run, however long.

    With ``run`` it shows the training examples it names, at most ``showing.SHOWN`` at each end of
    each behaviour; ``show`` turns one into what is shown. Without it no data of the run is shown.

    Every text of the record is treated as hostile. Numbers that are not finite are shown as such.
    Vega is inlined, 0.9 MB of the file; the first call of a process bundles it (about 1.5 s).

    Raises:
        UnsupportedError: Altair, vl-convert or Jinja2 is not installed.
        OptionError: the record contradicts itself (lists of different lengths), ``run`` is another
            run, or ``show`` came without it.
    """
    if show is not None and run is None:
        raise OptionError("show= turns the examples of run= into what is shown: give both.")
    environment, markup = _templates()
    record = checked(record)
    shown = {} if run is None else shown_examples(record, run, show)
    panels = [panel(record, q) for q in range(len(record.behaviours))]
    specs: dict[str, Any] = {}
    for each in panels:
        specs |= {f"bars-{each.index}": each.bars, f"strip-{each.index}": each.strip}
    scripts = [_vega_bundle(), _resource("page.js")]
    page = environment.from_string(_resource("page.html.j2")).render(
        record=record,
        panels=panels,
        matrix=matrix(record),
        drills=[drill for drill in drills(record, shown) if not drill.empty],
        pictured=run is not None,
        conducted=[*spending(record), *placebos(record), *searching(record)],
        windows=windows(record),
        grades=GRADES,
        specs={key: markup(_json(d.spec)) for key, d in specs.items() if d is not None},
        policy=_policy(scripts),
        style=markup(_resource("style.css")),
        scripts=[markup(script) for script in scripts],
    )
    return str(page)


def write(
    record: AuditRecord,
    path: str | os.PathLike[str],
    *,
    run: Run | None = None,
    show: Show | None = None,
) -> None:
    """Write ``render(...)`` to ``path``, all of it or nothing; an existing file is replaced.

    Raises:
        StoreError: the file cannot be written.
    """
    page = render(record, run=run, show=show)
    target = Path(path)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=".culpa-", delete=False, encoding="utf-8", newline="\n"
        ) as file:
            temporary = Path(file.name)
            file.write(page)
        temporary.chmod(0o644)  # temporary files are private; a report is to be shown around
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StoreError(
            f"the report cannot be written to {str(target)!r}: {error.strerror or error}. "
            "Give the path of a file in an existing folder that you may write to."
        ) from error


def _templates() -> tuple[Any, Any]:
    """A Jinja2 environment that escapes everything and forgives no missing name, and Markup."""
    import_altair()
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UnsupportedError(
            "the HTML report needs Jinja2, which is not installed. "
            "Run: pip install 'culpa[report]'. The terminal table and the JSON do without."
        ) from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., Any]] = {
        "signed": numbers.signed,
        "magnitude": numbers.magnitude,
        "count": numbers.count,
        "plural": numbers.plural,
        "data_size": numbers.data_size,
        "duration": numbers.duration,
        "small": numbers.small,
        "moment": numbers.moment,
        "grade_index": grade_index,
        "grade_of": grade_of,
        "linked": linked,
        "row_height": row_height,
    }
    environment.filters.update(filters)
    tests: dict[str, Callable[..., Any]] = {
        "known": known,
        "finite": _is_finite,
    }
    environment.tests.update(tests)
    return environment, Markup


def _is_finite(value: float | None) -> bool:
    return numbers.finite(value) is not None


@cache
def _vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, of the version Altair writes for."""
    try:
        import vl_convert
    except ImportError as error:
        raise UnsupportedError(
            "the HTML report needs vl-convert, which is not installed. "
            "Run: pip install 'culpa[report]'. The terminal table and the JSON do without."
        ) from error
    wanted = ".".join(import_altair().SCHEMA_VERSION.lstrip("v").split(".")[:2])
    version = wanted if wanted in vl_convert.get_vegalite_versions() else None  # None: its latest
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    if "</script" in script.lower() or "<!--" in script:
        raise UnsupportedError(
            "the Vega bundle of the installed vl-convert contains an HTML tag and cannot stand "
            "in a page. Install another version of vl-convert-python."
        )
    return script.replace("\r\n", "\n")


def _policy(scripts: Sequence[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    """JSON that can stand inside of a script element: nothing in it opens or ends a tag."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    text = files("culpa.report").joinpath(name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")

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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from culpa.errors import OptionError, StoreError, UnsupportedError
from culpa.report import numbers
from culpa.report.charts import Band, Bar, Drawing, Stem, stage_bars, update_strip
from culpa.report.charts.bars import row_height
from culpa.report.charts.scale import GRADES, grade_index
from culpa.report.charts.theme import import_altair
from culpa.report.charts.thinning import allowance, thin
from culpa.report.citations import linked
from culpa.report.matrix import matrix
from culpa.report.record_check import checked

if TYPE_CHECKING:
    from culpa.audit.record import AuditRecord, BehaviourFacts


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What the page shows of one behaviour."""

    index: int
    behaviour: BehaviourFacts
    bars: Drawing | None
    strip: Drawing | None
    groups: list[tuple[str, list[Stem]]]
    """The updates the strip shows, by stage: its table."""
    shown: int


def render(record: AuditRecord) -> str:
    """The report of ``record``: one HTML document below 2 MB for any run, however long.

    Every text of the record is treated as hostile. Numbers that are not finite are shown as such.
    Vega is inlined, 0.9 MB of the file; the first call of a process bundles it (about 1.5 s).

    Raises:
        UnsupportedError: Altair, vl-convert or Jinja2 is not installed.
        OptionError: the record contradicts itself (lists of different lengths).
    """
    environment, markup = _templates()
    record = checked(record)
    panels = [_panel(record, q) for q in range(len(record.behaviours))]
    specs: dict[str, Any] = {}
    for panel in panels:
        specs |= {f"bars-{panel.index}": panel.bars, f"strip-{panel.index}": panel.strip}
    scripts = [_vega_bundle(), _resource("page.js")]
    page = environment.from_string(_resource("page.html.j2")).render(
        record=record,
        panels=panels,
        matrix=matrix(record),
        grades=GRADES,
        specs={key: markup(_json(d.spec)) for key, d in specs.items() if d is not None},
        policy=_policy(scripts),
        style=markup(_resource("style.css")),
        scripts=[markup(script) for script in scripts],
    )
    return str(page)


def write(record: AuditRecord, path: str | os.PathLike[str]) -> None:
    """Write ``render(record)`` to ``path``, all of it or nothing; an existing file is replaced.

    Raises:
        StoreError: the file cannot be written.
    """
    page = render(record)
    target = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".culpa-", suffix=".html", dir=target.parent)
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(
            f"the report cannot be written to {str(target)!r}: {error.strerror or error}. "
            "Give the path of a file in an existing folder that you may write to."
        ) from error


def _panel(record: AuditRecord, q: int) -> Panel:
    behaviour = record.behaviours[q]
    bars = [
        Bar(
            stage=stage.name,
            effect=stage.effects[q],
            score=stage.scores[q],
            replayed=stage.replayed[q],
            grade=stage.grade,
        )
        for stage in record.stages
    ]
    stems = _stems(record, q)
    bands = [Band(stage=s.name, start=s.start, stop=s.stop) for s in record.stages]
    total = len(record.updates.scores)
    return Panel(
        index=q,
        behaviour=behaviour,
        bars=stage_bars(
            bars, behaviour=behaviour.name, unit=behaviour.unit, description=_in_words(bars, behaviour)
        )
        if bars
        else None,
        strip=update_strip(
            stems,
            bands,
            num_updates=total,
            behaviour=behaviour.name,
            unit=behaviour.unit,
            description=f"Effect of {numbers.plural(len(stems), 'single update')} of "
            f"{numbers.count(total)} on {behaviour.name}, over the stages they belong to. "
            "The table after the chart holds the same numbers.",
        )
        if stems
        else None,
        groups=_by_stage(stems, [stage.name for stage in record.stages]),
        shown=len(stems),
    )


def _stems(record: AuditRecord, q: int) -> list[Stem]:
    updates = record.updates
    spans = [(stage.start, stage.stop) for stage in record.stages]
    owner = [-1] * len(updates.scores)
    for i, (start, stop) in enumerate(spans):
        for k in range(max(0, start), min(stop, len(owner))):
            owner[k] = i
    scores = [row[q] for row in updates.scores]
    return [
        Stem(
            update=k,
            stage=owner[k],
            score=scores[k],
            grade=updates.grades[k],
            growth=updates.growth[k],
            displacement=updates.displacement[k],
            learning_rate=updates.learning_rates[k],
        )
        for k in thin(scores, spans, allowance(len(record.behaviours), len(spans)))
    ]


def _by_stage(stems: Sequence[Stem], names: Sequence[str]) -> list[tuple[str, list[Stem]]]:
    groups: list[tuple[str, list[Stem]]] = []
    last: int | None = None
    for stem in stems:
        if stem.stage != last:
            groups.append(("outside of every stage" if stem.stage < 0 else names[stem.stage], []))
            last = stem.stage
        groups[-1][1].append(stem)
    return groups


def _in_words(bars: Sequence[Bar], behaviour: BehaviourFacts) -> str:
    """The chart as a sentence, for those who do not see it."""
    each = "; ".join(
        f"{bar.stage}: {numbers.signed(bar.effect)}"
        + ("" if bar.replayed is None else f", replayed {numbers.signed(bar.replayed)}")
        for bar in bars
    )
    return (
        f"Estimated effect of {numbers.plural(len(bars), 'stage')} on {behaviour.name} in "
        f"{behaviour.unit}. {each}. The table after the chart holds the same numbers."
    )


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
    environment.filters |= {
        "signed": numbers.signed,
        "magnitude": numbers.magnitude,
        "count": numbers.count,
        "plural": numbers.plural,
        "data_size": numbers.data_size,
        "duration": numbers.duration,
        "grade_index": grade_index,
        "linked": linked,
        "row_height": row_height,
    }
    return environment, Markup


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
    version = ".".join(import_altair().SCHEMA_VERSION.lstrip("v").split(".")[:2])
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    if "</script" in script.lower() or "<!--" in script:
        raise UnsupportedError(
            f"the Vega bundle of vl-convert {vl_convert.__version__} cannot stand in a page "
            "(it contains a tag). Install another version of vl-convert-python."
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

"""The report: one file, complete, true to its record, and deaf to what its texts would like."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culpa.auditing.record import AuditRecord
from culpa.errors import OptionError, StoreError, UnsupportedError
from culpa.report.citations import linked
from culpa.report.html import render, write
from culpa.report.numbers import NOT_FINITE, magnitude, signed, visible
from report.page import LOADING, Page
from report.records import make_record

pytest.importorskip("altair", reason="needs: pip install 'culpa[report]'")
pytest.importorskip("vl_convert", reason="needs: pip install 'culpa[report]'")
pytest.importorskip("jinja2", reason="needs: pip install 'culpa[report]'")

Build = Callable[..., AuditRecord]
LIMIT = 2_000_000
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)> & {{ 7 * 7 }} {% raw %} <!-- ]]>",
    "javascript:alert(1)//\u202egnp\x1b[31m\udc80",
]
replace = msgspec.structs.replace


def specs(page: Page) -> dict[str, Any]:
    return {
        script.attributes["id"].removeprefix("spec-"): json.loads("".join(script.parts))
        for script in page.all("script", type="application/json")
    }


def with_texts(record: AuditRecord, text: str) -> AuditRecord:
    """The same record with ``text`` wherever a record has words of its own."""
    return replace(
        record,
        culpa_version=text,
        created=text,
        run=replace(
            record.run,
            name=text,
            root_digest=text,
            optimizer=text,
            counterfactual=text,
            environment=dict.fromkeys([text], text),
        ),
        behaviours=[replace(b, name=text, unit=text) for b in record.behaviours],
        stages=[replace(s, name=text, reason=text) for s in record.stages],
        verdicts=[text],
        cautions=[text],
        spent=[replace(s, what=text) for s in record.spent],
        options=dict.fromkeys([text], text),
        sources=[replace(s, what=text, citation=text) for s in record.sources],
    )


def test_the_page_is_one_small_file_that_loads_nothing(record: AuditRecord) -> None:
    document = render(record)
    page = Page(document)
    assert len(document.encode()) < LIMIT
    for element in page.elements:
        assert element.tag not in {
            "iframe",
            "object",
            "embed",
            "base",
            "img",
            "form",
            "video",
            "audio",
        }
        assert not LOADING & set(element.attributes)
        if element.tag == "link":
            assert element.attributes == {"rel": "icon", "href": "data:,"}
        elif "href" in element.attributes:
            assert element.tag == "a"
            assert element.attributes["href"].startswith(("#", "https://"))
    style = page.one("style").text
    assert "url(" not in style
    assert "@import" not in style
    assert "@font-face" not in style
    for spec in specs(page).values():
        assert '"url"' not in json.dumps(spec)
        assert "$schema" in spec


def test_the_policy_allows_the_scripts_that_are_there_and_no_network(record: AuditRecord) -> None:
    page = Page(render(record))
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    scripts = [e for e in page.all("script") if "type" not in e.attributes]
    digests = [hashlib.sha256("".join(s.parts).encode()).digest() for s in scripts]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [
        f"'sha256-{base64.b64encode(d).decode()}'" for d in digests
    ]
    assert "connect-src" not in rules
    assert "unsafe-eval" not in policy


def test_the_verdict_comes_first(record: AuditRecord) -> None:
    page = Page(render(record))
    assert page.one("html").attributes["lang"] == "en"
    assert page.one("title").text == "Audit of mnist-three-jobs – culpa"
    text = page.one("main").text
    assert text.startswith("Audit of mnist-three-jobs " + " ".join(record.verdicts))
    assert text.index(record.verdicts[-1]) < text.index(record.run.root_digest)
    for said in (*record.cautions, *record.options, *record.run.environment.values()):
        assert said in text
    for spending in record.spent:
        assert spending.what in text


def test_headings_and_anchors_are_in_order(record: AuditRecord) -> None:
    page = Page(render(record))
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch(r"h[1-6]", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        for name in ("aria-labelledby", "for"):
            assert element.attributes.get(name, ids[0]) in ids
        if element.attributes.get("href", "").startswith("#"):
            assert element.attributes["href"][1:] in ids
    first_link = page.all("a")[0]
    assert (first_link.attributes["class"], first_link.attributes["href"]) == ("skip", "#verdict")


def test_every_chart_has_words_and_a_table_with_its_numbers(record: AuditRecord) -> None:
    page = Page(render(record))
    drawn = specs(page)
    charts = [e for e in page.elements if "data-chart" in e.attributes]
    assert [e.attributes["data-chart"] for e in charts] == [
        *(f"bars-{q}" for q in range(3)),
        *(f"strip-{q}" for q in range(3)),
    ]
    for chart in charts:
        kind, q = chart.attributes["data-chart"].split("-")
        spec = drawn[f"{kind}-{q}"]
        assert record.behaviours[int(q)].name in spec["description"]
        figure = chart.parents[-1]
        assert figure.tag == "figure"
        (table,) = page.below(figure, "table")
        rows = [[c.text for c in page.below(row, "td")] for row in page.below(table, "tr")]
        rows = [row for row in rows if row]
        if kind == "bars":
            assert [row[1:] for row in rows] == [
                [
                    signed(s.scores[int(q)]),
                    signed(s.effects[int(q)]),
                    "not replayed" if s.replayed[int(q)] is None else signed(s.replayed[int(q)]),
                    magnitude(s.intervals[int(q)], digits=2),
                    magnitude(s.floors[int(q)], digits=2),
                    s.grades[int(q)],
                ]
                for s in record.stages
            ]
            assert [r["label"] for r in spec["datasets"]["stages"]] == [
                row[2] if row[3] == "not replayed" else row[3] for row in rows
            ]
        else:
            updates = record.updates
            assert rows == [
                [
                    str(k),
                    signed(updates.scores[k][int(q)]),
                    magnitude(updates.growth[k]),
                    magnitude(updates.displacement[k]),
                    magnitude(updates.learning_rates[k]),
                    updates.grades[k],
                ]
                for k in range(record.run.num_steps)
            ]
            assert [r["k"] for r in spec["datasets"]["updates"]] == [int(row[0]) for row in rows]


def test_the_matrix_and_the_trust_table_hold_the_numbers(record: AuditRecord) -> None:
    page = Page(render(record))
    matrix, trust = (
        page.one("table", **{"class": "matrix"}),
        page.one("table", **{"class": "trust"}),
    )
    for row, stage in zip(page.below(matrix, "tr")[1:], record.stages, strict=True):
        cells = page.below(row, "td")
        for cell, effect, true, known in zip(
            cells, stage.effects, stage.replayed, stage.grades, strict=True
        ):
            said = known if true is None else f"{known}, estimated {signed(effect)}"
            best = effect if true is None else true
            assert cell.text == signed(best) + said
            assert cell.attributes["class"].split()[0] == ("lower" if best < 0 else "raise")
    for row, stage in zip(page.below(trust, "tr")[1:], record.stages, strict=True):
        assert [cell.text for cell in page.below(row, "td")] == [
            stage.grade,
            magnitude(stage.displacement),
            magnitude(stage.growth),
            magnitude(stage.residual),
            stage.reason,
        ]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_change_no_tag(build: Build, text: str) -> None:
    small = build(stages=["a", "b"], behaviours=[("c", "d")], steps=6)
    plain, attacked = Page(render(with_texts(small, "x"))), Page(render(with_texts(small, text)))
    assert attacked.skeleton == plain.skeleton
    assert attacked.one("h1").text == f"Audit of {' '.join(visible(text).split())}"
    rows = specs(attacked)["bars-0"]["datasets"]["stages"]
    assert [row["name"] for row in rows] == [visible(text)] * 2


@settings(max_examples=8)
@given(text=st.text(st.characters(exclude_categories=[]), min_size=1, max_size=30))
def test_no_text_changes_a_tag(text: str) -> None:
    small = make_record(stages=["a", "b"], behaviours=[("c", "d")], steps=4)
    document = render(with_texts(small, text))
    document.encode()
    links = [e for e in Page(document).all("a") if e.attributes["href"].startswith("http")]
    plain = Page(render(with_texts(small, "x")))
    assert [tag for tag, _ in Page(document).skeleton if tag != "a" or not links] == [
        tag for tag, _ in plain.skeleton if tag != "a" or not links
    ]


def test_numbers_that_are_not_finite_are_said_to_be(record: AuditRecord) -> None:
    bad = replace(
        record.stages[0],
        effects=[math.nan, math.inf, -math.inf],
        scores=[math.nan] * 3,
        replayed=[math.inf, None, 1.0],
        growth=math.inf,
        displacement=math.nan,
        residual=math.inf,
    )
    updates = replace(
        record.updates,
        scores=[[math.nan] * 3, *record.updates.scores[1:]],
        growth=[math.inf] * record.run.num_steps,
    )
    page = Page(render(replace(record, stages=[bad, *record.stages[1:]], updates=updates)))
    for spec in specs(page).values():
        assert "NaN" not in json.dumps(spec)
    trust = page.one("table", **{"class": "trust"})
    assert [c.text for c in page.below(page.below(trust, "tr")[1], "td")][1:4] == [NOT_FINITE] * 3
    matrix = page.one("table", **{"class": "matrix"})
    assert [c.text for c in page.below(page.below(matrix, "tr")[1], "td")] == [
        f"{NOT_FINITE}not identified, estimated {NOT_FINITE}",
        f"{NOT_FINITE}not identified",
        f"+1.00not identified, estimated {NOT_FINITE}",
    ]
    assert specs(page)["strip-0"]["datasets"]["updates"][0]["s"] is None
    notes = [p.text for p in page.all("p", **{"class": "note warn"})]
    assert sum("not finite, no bar: upright digits" in note for note in notes) == 3
    assert sum("not finite, drawn as a cross on the zero line: 1." in note for note in notes) == 3


def test_where_nothing_was_linearised_there_is_no_residual(record: AuditRecord) -> None:
    last = replace(record.stages[-1], residual=math.nan)
    page = Page(render(replace(record, stages=[*record.stages[:-1], last])))
    row = page.below(page.one("table", **{"class": "trust"}), "tr")[-1]
    assert page.below(row, "td")[3].text == "–"


def test_one_stage_one_behaviour_one_update(build: Build) -> None:
    page = Page(render(build(stages=["only"], behaviours=[("clean", "nats")], steps=1)))
    assert not page.all("select")
    assert set(specs(page)) == {"bars-0", "strip-0"}


def test_several_behaviours_have_a_selector(record: AuditRecord) -> None:
    page = Page(render(record))
    options = page.below(page.one("select", id="strip-behaviour"), "option")
    assert [o.text for o in options] == [b.name for b in record.behaviours]
    assert page.one("label", **{"for": "strip-behaviour"}).text == "Behaviour"


def test_a_record_of_almost_nothing_is_still_a_page(record: AuditRecord) -> None:
    no_updates = replace(
        record.updates, scores=[], growth=[], displacement=[], grades=[], learning_rates=[]
    )
    bare = replace(
        record, behaviours=[], stages=[], updates=no_updates, verdicts=[], cautions=[], spent=[],
        options={}, sources=[], run=replace(record.run, environment={}, num_steps=0),
    )  # fmt: skip
    page = Page(render(bare))
    assert specs(page) == {}
    assert "came to no verdict" in page.one("main").text
    assert "scored no single updates" in page.one("main").text
    stages_only = Page(render(replace(record, updates=no_updates)))
    assert set(specs(stages_only)) == {"bars-0", "bars-1", "bars-2"}


@pytest.mark.parametrize("behaviours", [1, 3])
def test_ten_thousand_updates_stay_small_and_keep_their_peaks(
    build: Build, behaviours: int
) -> None:
    record = build(steps=10_000, behaviours=[(f"b{q}", "nats") for q in range(behaviours)])
    scores = [list(row) for row in record.updates.scores]
    scores[4321][0], scores[8765][0] = 0.077, -0.066
    record = replace(record, updates=replace(record.updates, scores=scores))
    document = render(record)
    assert len(document.encode()) < LIMIT
    page = Page(document)
    shown = {row["k"]: row["s"] for row in specs(page)["strip-0"]["datasets"]["updates"]}
    assert (shown[4321], shown[8765]) == (0.077, -0.066)
    assert f"Shown: {len(shown):,} of 10,000 updates." in page.one("main").text
    assert len(shown) > 1000


def test_many_stages_and_behaviours_stay_small(build: Build) -> None:
    record = build(
        stages=[f"stage {i}" for i in range(40)],
        behaviours=[(f"digit {q}", "nats") for q in range(10)],
        steps=4000,
    )
    assert len(render(record).encode()) < LIMIT


def test_write_leaves_the_page_and_nothing_else(record: AuditRecord, tmp_path: Path) -> None:
    path = tmp_path / "audit.html"
    path.write_text("an older report", encoding="utf-8")
    write(record, path)
    assert path.read_bytes() == render(record).encode()
    assert list(tmp_path.iterdir()) == [path]


def test_write_says_where_it_cannot_write(record: AuditRecord, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"missing.*existing folder"):
        write(record, tmp_path / "missing" / "audit.html")
    with pytest.raises(StoreError, match="cannot be written"):
        write(record, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not list(tmp_path.parent.glob(".culpa-*"))


def test_a_record_that_contradicts_itself_is_refused(record: AuditRecord) -> None:
    short = replace(record.updates, growth=[1.0])
    with pytest.raises(OptionError, match=r"growth has 1 entries for 240"):
        render(replace(record, updates=short))


@pytest.mark.parametrize("missing", ["altair", "jinja2", "vl_convert"])
def test_a_missing_extra_says_what_to_install(
    record: AuditRecord, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    from culpa.report import html

    html._vega_bundle.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnsupportedError, match=re.escape("pip install 'culpa[report]'")):
        render(record)


def test_citations_link_to_the_web_and_to_nothing_else() -> None:
    assert linked("see arXiv 2506.00175, and https://example.org/a?b=1.") == (
        'see <a href="https://arxiv.org/abs/2506.00175" rel="noreferrer noopener">arXiv 2506.00175'
        '</a>, and <a href="https://example.org/a?b=1" rel="noreferrer noopener">'
        "https://example.org/a?b=1</a>."
    )
    assert linked("javascript:alert(1) <b>") == "javascript:alert(1) &lt;b&gt;"
    assert '"onclick' not in linked('https://example.org/"onclick="alert(1)')

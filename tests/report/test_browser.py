"""The report in a real browser: its charts are drawn, its controls work, it asks for nothing."""

from __future__ import annotations

import functools
import http.server
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from culpa.auditing.record import AuditRecord
from culpa.report.html import render
from report.browser import drive, needs_chromium, open_page
from report.page import Page

pytest.importorskip("altair", reason="needs: pip install 'culpa[report]'")
pytest.importorskip("vl_convert", reason="needs: pip install 'culpa[report]'")

pytestmark = [pytest.mark.browser, needs_chromium]


def labels(page: Page, chart: str) -> list[str]:
    """Every text drawn in a chart."""
    box = next(e for e in page.elements if e.attributes.get("data-chart") == chart)
    return [e.text for e in page.below(box, "text")]


def marks(page: Page, chart: str, kind: str) -> int:
    """How many marks of ``kind`` ("rect", "rule", "text" ...) a chart draws."""
    box = next(e for e in page.elements if e.attributes.get("data-chart") == chart)
    groups = [
        g for g in page.below(box, "g") if f"mark-{kind}" in g.attributes.get("class", "").split()
    ]
    groups = [g for g in groups if "role-mark" in g.attributes["class"].split()]
    return sum(e.parents[-1:] == (group,) for group in groups for e in page.elements)


def test_every_chart_is_drawn_and_the_console_is_silent(
    record: AuditRecord, tmp_path: Path
) -> None:
    page, console = open_page(render(record), tmp_path)
    assert console == []
    assert page.one("html").attributes["data-charts"] == "drawn"
    for q, behaviour in enumerate(record.behaviours):
        box = next(e for e in page.elements if e.attributes.get("data-chart") == f"bars-{q}")
        (svg,) = page.below(box, "svg")
        assert int(float(svg.attributes["width"])) > 300
        (described,) = [e for e in page.below(box, "svg") if "aria-label" in e.attributes] or [box]
        assert behaviour.name in described.attributes["aria-label"]
        drawn = labels(page, f"bars-{q}")
        assert all(stage.name in drawn for stage in record.stages)
        assert f"effect on {behaviour.name} [{behaviour.unit}]; > 0: the stage raised it" in drawn
        assert marks(page, f"bars-{q}", "rect") >= len(record.stages)
    assert marks(page, "strip-0", "rule") == record.run.num_steps + 1  # and the zero line
    assert all(stage.name in labels(page, "strip-0") for stage in record.stages)
    assert marks(page, "strip-1", "rule") == 0  # until it is chosen


def test_hard_records_are_drawn_too(build: Callable[..., AuditRecord], tmp_path: Path) -> None:
    record = build(stages=["</script><b>a", "<img src=x>", "c"], behaviours=[("{{x}}'\"", "<i>")])
    wild = msgspec.structs.replace(
        record.stages[0], effects=[math.nan], scores=[-1e308], grade="not identified"
    )
    scores = [[math.inf], [-1e308], *record.updates.scores[2:]]
    record = msgspec.structs.replace(
        record,
        stages=[wild, *record.stages[1:]],
        updates=msgspec.structs.replace(record.updates, scores=scores),
    )
    page, console = open_page(render(record), tmp_path)
    assert console == []
    assert page.one("html").attributes["data-charts"] == "drawn"
    assert "</script><b>a" in labels(page, "bars-0")
    assert "not finite" in labels(page, "bars-0")
    assert not page.all("img")
    assert marks(page, "strip-0", "rule") >= record.run.num_steps - 1


def test_ten_thousand_updates_are_drawn(build: Callable[..., AuditRecord], tmp_path: Path) -> None:
    page, console = open_page(render(build(steps=10_000)), tmp_path)
    assert console == []
    assert page.one("html").attributes["data-charts"] == "drawn"
    assert marks(page, "strip-0", "rule") > 1000


def test_buttons_zoom_and_the_selector_changes_the_behaviour(
    record: AuditRecord, tmp_path: Path
) -> None:
    program = """
        const wait = () => new Promise((done) => setTimeout(done, 300));
        const axis = () => [...document.querySelectorAll(
            '[data-strip="0"] .role-axis-label text')].map((t) => t.textContent).join(" ");
        const say = (what) => {
            const p = document.createElement("p"); p.id = what; p.textContent = axis();
            document.body.append(p);
        };
        const press = async (what, name = what) => {
            document.querySelector(`[data-strip="0"] [data-move="${what}"]`).click();
            await wait(); say(name);
        };
        say("first");
        await press("in"); await press("later"); await press("earlier"); await press("out");
        await press("in", "in-again"); await press("all");
        const select = document.getElementById("strip-behaviour");
        select.value = "1"; select.dispatchEvent(new Event("change")); await wait();
    """
    page, console = open_page(drive(render(record), program), tmp_path)
    assert console == []
    seen = {
        e.attributes["id"]: sorted(int(t) for t in e.text.split() if t.isdigit() and t != "0")
        for e in page.all("p")
        if "id" in e.attributes
    }
    assert (min(seen["first"]), max(seen["first"])) == (20, 220)
    assert (min(seen["in"]), max(seen["in"])) == (60, 170)  # the middle half of -0.5 ... 239.5
    assert (min(seen["later"]), max(seen["later"])) == (90, 200)
    assert seen["earlier"] == seen["in-again"] == seen["in"]
    assert seen["out"] == seen["first"] == seen["all"]
    panels = [e for e in page.elements if "data-strip" in e.attributes]
    assert ["hidden" in e.attributes for e in panels] == [True, False, True]
    assert marks(page, "strip-1", "rule") == record.run.num_steps + 1


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """A web server on this machine, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("guarded", [True, False])
def test_the_policy_stops_what_escaping_would_have_missed(
    record: AuditRecord, tmp_path: Path, guarded: bool
) -> None:
    with listener() as (address, asked):
        attack = (
            f'<img src="{address}/image"><script>document.title = "taken";'
            f'fetch("{address}/fetch")</script></main>'
        )
        document = render(record).replace("</main>", attack, 1)
        if not guarded:  # without the policy the same page does all of it: the test can fail
            document = drive(document, "")
        page, _ = open_page(document, tmp_path)
    assert asked == [] if guarded else sorted(asked) == ["/fetch", "/image"]
    assert (page.one("title").text == "taken") is not guarded

"""axe-core, the engine of accessibility checkers, finds nothing wrong with the report."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from culpa.auditing.record import AuditRecord
from culpa.report.html import render
from report.browser import drive, needs_chromium, open_page

pytest.importorskip("altair", reason="needs: pip install 'culpa[report]'")
pytest.importorskip("axe_core_python", reason="needs: pip install axe-core-python")
pytestmark = [pytest.mark.browser, needs_chromium]

LIGHT, DARK = (f"--blink-settings=preferredColorScheme={n}" for n in (1, 0))
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
CHECK = (
    f"const only = {json.dumps(TAGS)};"
    + """
    for (const details of document.querySelectorAll("details")) details.open = true;
    const found = await axe.run(document, {runOnly: only});
    const said = {
        dark: matchMedia("(prefers-color-scheme: dark)").matches,
        width: innerWidth,
        scrolls: document.documentElement.scrollWidth > innerWidth,
        passed: found.passes.length,
        violations: found.violations.map((v) => [v.id, v.nodes.map((n) => n.html.slice(0, 200))]),
    };
    const write = (text) => {
        const pre = document.createElement("pre"); pre.id = "axe"; pre.textContent = text;
        document.body.append(pre);
    };
    window.parent === window ? write(JSON.stringify(said)) : parent.postMessage(said, "*");
"""
)
FRAME = """<!doctype html><title>A phone</title><style>* { margin: 0; border: 0 }</style>
<iframe src="phone.html" width="390" height="1800"></iframe><script>addEventListener("message",
(event) => { const pre = document.createElement("pre"); pre.id = "axe";
pre.textContent = JSON.stringify(event.data); document.body.append(pre); })</script>"""


def with_axe(document: str) -> str:
    """The page with axe in it, which looks at it once it is drawn."""
    engine = files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    head, rest = drive(document, CHECK).split("</head>", 1)
    engine = engine.replace("</script", "<\\/script")
    return f"{head}<script>{engine}</script></head>{rest}"


def checked(document: str, folder: Path, *, scheme: str, phone: bool) -> dict[str, Any]:
    """What axe says of the page."""
    document = with_axe(document)
    if phone:  # a window of this browser is 500 pixels wide at least
        (folder / "phone.html").write_text(document, encoding="utf-8", newline="\n")
    page, console = open_page(FRAME if phone else document, folder, scheme)
    assert console == []
    return json.loads(html.unescape(page.one("pre", id="axe").text))


@pytest.mark.parametrize("phone", [False, True], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_axe_finds_nothing_wrong(
    record: AuditRecord, tmp_path: Path, scheme: str, phone: bool
) -> None:
    said = checked(render(record), tmp_path, scheme=scheme, phone=phone)
    assert said["dark"] is (scheme == DARK)
    assert said["width"] == (390 if phone else 1280)
    assert said["violations"] == []
    assert said["passed"] > 30
    assert not said["scrolls"]  # sideways: wide tables do so inside of their own box


def test_axe_would_say_so(build: Callable[..., AuditRecord], tmp_path: Path) -> None:
    broken = render(build()).replace("</main>", '<img src="data:,"><button></button></main>', 1)
    said = checked(broken, tmp_path, scheme=LIGHT, phone=False)
    assert {name for name, _ in said["violations"]} >= {"image-alt", "button-name"}

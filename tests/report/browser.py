"""A real browser, headless: the document as it has made it, and what its console said."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from report.page import Page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium here. Run: apt-get install chromium && pytest -m browser tests/report",
)


def open_page(document: str, folder: Path, *extra: str) -> tuple[Page, list[str]]:
    """The document as the browser has made it after five seconds, and what its console said."""
    path = folder / "report.html"
    path.write_text(document, encoding="utf-8", newline="\n")
    assert CHROMIUM is not None
    quiet = ("component-update", "background-networking", "sync", "gpu")
    options = [
        *("--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet)),
        *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000", "--dump-dom"),
        *("--window-size=1280,2000", f"--user-data-dir={folder / 'profile'}", *extra),
    ]
    done = subprocess.run(
        [CHROMIUM, *options, path.as_uri()],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Page(done.stdout), console


def drive(document: str, program: str) -> str:
    """The page with a program of ours at its end, for which the policy must go."""
    head, policy = document.split('<meta http-equiv="Content-Security-Policy"', 1)
    body, end = policy.split(">", 1)[1].rsplit("</body>", 1)
    return f"{head}{body}<script>setTimeout(async () => {{{program}}}, 1500)</script></body>{end}"

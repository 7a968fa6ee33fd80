"""The site builds without a warning, needs no network, and shows every public name."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import culpa

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
API = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.rst")))
NEEDED = ("sphinx", "myst_parser", "furo", "latex2mathml", "transformers", "lightning", "ray")


def documented() -> set[str]:
    return set(re.findall(r"^\.\. auto\w+:: culpa\.((?:behaviours\.)?\w+)$", API, re.MULTILINE))


def test_every_public_name_is_in_the_api_reference() -> None:
    public = {name for name in culpa.__all__ if name[0] != "_" and name != "behaviours"}
    public |= {
        f"behaviours.{name}"
        for name in re.findall(r" as (\w+)$", source(culpa.behaviours.__file__), re.MULTILINE)
    }
    # Where a behaviour is on the façade too it stands with its neighbours.
    twice = {name for name in public if f"behaviours.{name}" in public}
    assert documented() == public - twice - {"behaviours.Completions"}


def source(file: str | None) -> str:
    assert file is not None
    return Path(file).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="needs what `make docs` installs: pip install -e '.[docs]'",
)
def test_the_site_builds_without_a_warning_and_reads_without_a_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {f"{page.stem}.html" for page in DOCS.rglob("*.md")} <= {page.name for page in pages}
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)\"",
            page.read_text(encoding="utf-8"),
        )
        assert not loaded, f"{page.name} loads {loaded}"
    formulas = (tmp_path / "mathematics.html").read_text(encoding="utf-8")
    assert formulas.count("<math ") > 50
    assert "$$" not in formulas
    judging = (tmp_path / "api" / "judging.html").read_text(encoding="utf-8")
    assert 'href="#culpa.Counterfactual"' in judging, "types in signatures are no links"
